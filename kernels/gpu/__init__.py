"""The Triton kernels. Nothing here is imported before the Triton backend is asked for."""
