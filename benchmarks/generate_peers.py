"""What generation is compared with: the `rwkv` package, and a Llama of the same size with a KV cache."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.loading import SIZES
from toolkit.trunk import LanguageModel

HEAD = 64
_build: subprocess.Popen[str] | None = None


class Unable(Exception):
    """Why there is no number."""


# --- the rwkv package -------------------------------------------------------------------------

_BUILD = """
import sys, tempfile, torch
from benchmarks.generate_peers import package_of, tiny_weights
with tempfile.TemporaryDirectory() as place:
    torch.save(tiny_weights(), place + "/m.pth")
    package_of(place + "/m", "cuda fp16").forward([1, 2, 3], None)
"""


def tiny_weights() -> dict[str, Tensor]:
    """A model of the package's layout, for which it builds the kernels that larger ones use."""
    from benchmarks.loading import sizes_of
    from toolkit.pretrained import ghost

    state = ghost(sizes_of("tiny")).state_dict()
    return {name: 0.02 * torch.randn(t.shape) for name, t in state.items()}


def start_build(device: str) -> None:
    """Lets the package compile its CUDA kernels in a process of its own, while other things are measured."""
    global _build
    os.environ["RWKV_CUDA_ON"] = "0"
    os.environ.setdefault("RWKV_JIT_ON", "1")  # the default of the package
    if device != "cuda" or importlib.util.find_spec("rwkv") is None:
        return
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if shutil.which("nvcc") is None and not Path(home, "bin", "nvcc").exists():
        return
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    env = {**os.environ, "RWKV_CUDA_ON": "1"}
    _build = subprocess.Popen(
        [sys.executable, "-c", _BUILD], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def built() -> str:
    """Waits for the build: "" if the package's kernels can be used, else why not."""
    if _build is None:
        return "no nvcc to build its kernels"
    try:
        output, _ = _build.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        _build.kill()
        return "its kernels were not built within 90 s"
    if _build.returncode:
        last = [line for line in (output or "").splitlines() if line.strip()][-1:]
        return f"its kernels did not build: {(last or [''])[0][:120]}"
    return ""


def package_of(path: str, strategy: str) -> Any:
    from rwkv.model import RWKV

    return RWKV(model=path, strategy=strategy, verbose=False)


class Package:
    """The `rwkv` package with the same weights. `how` says what of it runs."""

    def __init__(self, model: LanguageModel, device: str) -> None:
        if importlib.util.find_spec("rwkv") is None:
            raise Unable("the rwkv package is not installed")
        self.how = "torch"
        if device == "cuda" and "rwkv.model" not in sys.modules:
            reason = built()
            os.environ["RWKV_CUDA_ON"] = "0" if reason else "1"
            self.how = f"torch ({reason})" if reason else "its CUDA kernels"
        elif device == "cuda":
            self.how = "its CUDA kernels" if os.environ["RWKV_CUDA_ON"] == "1" else "torch"
        room = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        place = tempfile.mkdtemp(dir="/dev/shm" if room > 2 * size else None)
        try:
            torch.save({n: t.cpu() for n, t in model.state_dict().items()}, Path(place, "m.pth"))
            strategy = "cuda fp16" if device == "cuda" else "cpu fp32"
            self._model = package_of(str(Path(place, "m")), strategy)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        self._token = 1
        _, self._state = self._model.forward(list(range(1, 17)), None)

    def step(self) -> None:
        """One token, the most likely one chosen."""
        logits, self._state = self._model.forward([self._token], self._state)
        self._token = int(logits.argmax())


# --- Llama ------------------------------------------------------------------------------------


def llama_sizes(size: str, parameters: int, vocab: int) -> tuple[int, int, int]:
    """(layers, width, width of the MLP) of a Llama of so many parameters: the RWKV's layers and width."""
    n_layer, d_model, _ = SIZES[size]
    left = (parameters - 2 * vocab * d_model) / n_layer - 4 * d_model**2
    return n_layer, d_model, max(64, round(left / (3 * d_model) / 64) * 64)


class Layer(nn.Module):
    """A Llama layer for one token (arXiv 2302.13971): RMSNorm, rotary attention over a cache, SwiGLU."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(d, eps=1e-5) for _ in range(2))
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.gate_up, self.down = nn.Linear(d, 2 * hidden, bias=False), nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, cache: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, D]; cache [2, B, H, T, N], whose last place takes this token."""
        b = x.shape[0]
        q, k, v = self.qkv(self.norms[0](x)).view(b, 3, -1, 1, HEAD).unbind(1)  # [B, H, 1, N]
        q, k = rotated(q, turn), rotated(k, turn)
        cache[0, :, :, -1:], cache[1, :, :, -1:] = k, v
        x = x + self.out(F.scaled_dot_product_attention(q, cache[0], cache[1]).reshape(b, -1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), halves of the head exchanged."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = turn
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Llama:
    """One token of a Llama whose cache holds `position` others, as a CUDA graph on a GPU."""

    def __init__(
        self, size: str, parameters: int, vocab: int, batch: int, position: int, device: str
    ) -> None:
        n_layer, d, hidden = llama_sizes(size, parameters, vocab)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        need = 2 * n_layer * batch * d * (position + 1) * dtype.itemsize
        _check_room(need + 2 * parameters, device)
        with torch.device(device), torch.inference_mode():
            self.emb, self.head = nn.Embedding(vocab, d), nn.Linear(d, vocab, bias=False)
            self.layers = nn.ModuleList(Layer(d, hidden).to(dtype) for _ in range(n_layer))
            self.norm = nn.RMSNorm(d, eps=1e-5).to(dtype)
            self.emb, self.head = self.emb.to(dtype), self.head.to(dtype)
            self.caches = [
                torch.randn(2, batch, d // HEAD, position + 1, HEAD, dtype=dtype) for _ in range(n_layer)
            ]
            self.token = torch.ones(batch, dtype=torch.long)
            angle = position / 10000 ** (torch.arange(HEAD // 2) / (HEAD // 2))
            self.turn = (angle.cos().to(dtype), angle.sin().to(dtype))
        self._graph = self._captured() if device == "cuda" else None

    def step(self) -> None:
        """One token. A method: a graph alone does not keep the tensors alive that it reads."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    @torch.inference_mode()
    def _step(self) -> None:
        x = self.emb(self.token)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x = layer(x, cache, self.turn)
        self.token.copy_(self.head(self.norm(x)).argmax(-1))

    def _captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph


def transformers_llama(
    size: str, parameters: int, vocab: int, batch: int, position: int, device: str
) -> Callable[[], object]:
    """The same Llama by the transformers library, its cache growing by a token each step."""
    if importlib.util.find_spec("transformers") is None:
        raise Unable("transformers is not installed")
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    n_layer, d, hidden = llama_sizes(size, parameters, vocab)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # Its cache is copied to be longer at every token: the largest layer's twice.
    _check_room(2 * batch * d * (position + 1) * dtype.itemsize * (n_layer + 2) + 6 * parameters, device)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=hidden,
        num_hidden_layers=n_layer,
        num_attention_heads=d // HEAD,
        num_key_value_heads=d // HEAD,
        max_position_embeddings=position + 4096,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
        shape = (batch, d // HEAD, position, HEAD)
        cache = DynamicCache()
        for layer in range(n_layer):
            cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)
        token = torch.ones(batch, 1, dtype=torch.long)

    @torch.inference_mode()
    def step() -> None:
        found = model(input_ids=token, past_key_values=cache, use_cache=True)
        token.copy_(found.logits[:, -1:].argmax(-1))

    return step


def _check_room(need: int, device: str) -> None:
    """Raises Unable for what the GPU has no memory for."""
    if device != "cuda":
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if need > 0.95 * free:
        raise Unable(f"needs {need / 1e9:.0f} GB for weights and KV cache, {free / 1e9:.0f} GB are free")
