"""The two 1.6B RWKV-6 models of `benchmarks.whole_model`, ours and fla's, each with its training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.kernel_timing import captured
from components.recurrences.rwkv6 import Rwkv6
from kernels.cross_entropy import linear_cross_entropy
from toolkit.trunk import LanguageModel, ScanSteps

SIZES = {"d_model": 2048, "n_layer": 24, "vocab_size": 65536, "steps": 2048}
TINY = {"d_model": 128, "n_layer": 2, "vocab_size": 256, "steps": 32}
HEAD = 64


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *arguments: Any) -> Any:
        return checkpoint(self.block, *arguments, use_reentrant=False)


class Ours(nn.Module):
    """toolkit's language model with the linear cross entropy of `toolkit.loss`."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.scan: ScanSteps | None = None
        d_model, n_layer = sizes["d_model"], sizes["n_layer"]
        recurrence = Rwkv6(d_model, n_layer, head_size=HEAD, d_ffn=0, shift_rank=0, decay_rank=0)
        self.model = LanguageModel(
            recurrence, d_model=d_model, n_layer=n_layer, vocab_size=sizes["vocab_size"]
        )
        self.bfloat16()
        for name, parameter in self.named_parameters():
            if name.endswith("time_decay"):
                parameter.data = parameter.data.float()

    def recompute(self, on: bool) -> None:
        plain = [b.block if isinstance(b, Checkpointed) else b for b in self.model.blocks]
        self.model.blocks = nn.ModuleList(Checkpointed(b) if on else b for b in plain)

    def compile_blocks(self) -> None:
        for block in self.model.blocks:
            block.compile()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels [B, T] -> mean cross entropy of the next label."""
        start = None if self.scan is None else torch.full((len(ids),), 8, device=ids.device)
        hidden, _ = self.model(self.model.emb(ids), scan=self.scan, image_start=start)
        targets = labels.roll(-1, 1).flatten()
        rows = torch.full(labels.shape, 1 / (labels.shape[0] * (labels.shape[1] - 1)), device=ids.device)
        rows[:, -1] = 0
        return linear_cross_entropy(hidden.flatten(0, 1), self.model.head.weight, targets, rows.flatten())


class Fla(nn.Module):
    """The same sizes from fla.models.rwkv6."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        from fla.models.rwkv6 import RWKV6Config, RWKV6ForCausalLM

        d_model = sizes["d_model"]
        config = RWKV6Config(
            attn_mode="chunk", hidden_size=d_model, expand_k=1.0, expand_v=1.0, hidden_ratio=3.5,
            num_hidden_layers=sizes["n_layer"], num_heads=d_model // HEAD, proj_low_rank_dim=32,
            gate_low_rank_dim=64, vocab_size=sizes["vocab_size"], max_position_embeddings=sizes["steps"],
            fuse_norm=True, fuse_cross_entropy=True, use_cache=False,
        )  # fmt: skip
        self.model = RWKV6ForCausalLM(config).bfloat16().train()

    def recompute(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=labels, use_cache=False).loss


@contextmanager
def cheap_initial_values() -> Iterator[None]:
    """Orthogonal matrices cost minutes at this size and change no time: normal ones instead."""
    orthogonal = nn.init.orthogonal_

    def normal(tensor: Tensor, gain: float = 1.0, generator: Any = None) -> Tensor:
        return nn.init.normal_(tensor, std=gain / tensor.shape[-1] ** 0.5)

    nn.init.orthogonal_ = normal
    try:
        yield
    finally:
        nn.init.orthogonal_ = orthogonal


class Trainer:
    """One model with its optimiser; `step` is what is timed."""

    def __init__(self, make: Callable[[], nn.Module], device: torch.device) -> None:
        before = allocated(device)
        with cheap_initial_values(), torch.device(device):
            self.model: Any = make()
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=fused)
        for parameter in self.model.parameters():  # moments exist before memory is read
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.static = allocated(device) - before

    def step(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = self.model(ids, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Captured:
    """A trainer whose forward and backward pass is one CUDA graph; the optimizer's kernels come after it.

    pool: memory shared with graphs that never run at once.
    """

    def __init__(self, trainer: Trainer, ids: Tensor, pool: Any) -> None:
        self.model, self.optimizer, self.static = trainer.model, trainer.optimizer, trainer.static
        self.ids, self.labels = ids.clone(), ids.clone()
        self.loss = ids
        self.replay = captured(self._both, 1, ids.device, pool=pool)

    def _both(self, turn: int) -> None:
        """A replay writes loss and gradients in the places that the capture gave them."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.ids, self.labels)
        loss.backward()
        self.loss = loss.detach()

    def step(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.labels.copy_(labels)
        self.replay(0)
        self.optimizer.step()
        return self.loss.clone()


class Scanned:
    """A trainer of our model under one scan; all share the model."""

    def __init__(self, trainer: Trainer, table: Any, device: torch.device) -> None:
        self.trainer, self.model, self.static = trainer, trainer.model, trainer.static
        self.optimizer = trainer.optimizer
        self.scan = ScanSteps(table).to(device)

    def step(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.model.scan = self.scan
        return self.trainer.step(ids, labels)


def allocated(device: torch.device) -> int:
    """Bytes in use on the device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
