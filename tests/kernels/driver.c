/* The part of CUDA's driver that Triton calls, on a machine without a GPU: it keeps the last launch, runs nothing.

A test says how many bytes each parameter of the next launch has (`expect`), launches, and reads them (`kept`).
*/
#include "cuda.h"
#include <string.h>

static int sizes[256], count, launches, length;
static unsigned char bytes[4096];
static unsigned long shape[9], functions;

void expect(int n, const int *each) {
    count = n;
    memcpy(sizes, each, n * sizeof *each);
}

int kept(unsigned char *parameters, unsigned long *launch) {
    memcpy(parameters, bytes, length);
    memcpy(launch, shape, sizeof shape);
    return length;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
    unsigned long found[9] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->sharedMemBytes,
                              (unsigned long)c->hStream, c->numAttrs, (unsigned long)f, ++launches};
    memcpy(shape, found, sizeof shape);
    length = 0;
    for (int i = 0; i < count; length += sizes[i++])
        memcpy(bytes + length, parameters[i], sizes[i]);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute asked, CUdevice device) {
    switch (asked) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
    default: *value = 64; /* what Triton only passes on */
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute asked, CUfunction f) {
    *value = asked == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute asked, CUdeviceptr address) {
    *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "none", CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *n) { return *n = 1, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *found) { return *found = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext given) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice device) { return cuCtxGetCurrent(found); }
CUresult cuModuleLoadData(CUmodule *found, const void *image) { return *found = (CUmodule)2, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule given) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
    *f = (CUfunction)++functions;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit which) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit which, size_t value) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { return *n = 1, CUDA_SUCCESS; }
