"""A training step of the 1.6B RWKV-6, ours beside fla's layers: tokens/s, model FLOP utilisation, memory.

    python -m benchmarks.whole_model              # on a GPU: eager, checkpointing off and on
    python -m benchmarks.whole_model --compile    # adds our blocks under torch.compile

Both models: 24 layers of 2,048, 32 heads, vocabulary 65,536, sequences of 2,048, bf16 weights, gradients
and moments (ours keeps `time_decay` in fp32), fused AdamW, no L2 term. fla: chunk_rwkv6, its fused norms and
fused cross entropy. Steps take turns in one process; the batch is the largest of --batches that both can
run, the same for both. Writes whole_model.json and whole_model.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import kernel_tuning
from components.recurrences.rwkv6 import Rwkv6
from kernels.cross_entropy import linear_cross_entropy
from toolkit.trunk import LanguageModel

RESULTS = Path(__file__).parent / "results"
SIZES = {"d_model": 2048, "n_layer": 24, "vocab_size": 65536, "steps": 2048}
TINY = {"d_model": 128, "n_layer": 2, "vocab_size": 256, "steps": 16}
HEAD = 64
PEAK_FLOP = 989.4e12
"""H100 SXM, dense bf16, datasheet: what utilisation is usually told against."""

Row = dict[str, Any]


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
        hidden, _ = self.model(self.model.emb(ids))
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


def allocated(device: torch.device) -> int:
    """Bytes in use on the device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_parameters(model: nn.Module) -> int:
    """Parameters that multiply every token: all matrices but the input embedding."""
    skip = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return sum(
        p.numel() for p in model.parameters() if p.squeeze().dim() > 1 and all(p is not s for s in skip)
    )


def step_flop(parameters: int, sizes: dict[str, int], batch: int) -> float:
    """Model FLOP of a step: 6 a matrix parameter and token, and the recurrence; nothing for recomputing."""
    tokens = batch * sizes["steps"]
    heads = sizes["d_model"] // HEAD
    recurrence = 14 * 64 * HEAD + 14 * HEAD * HEAD
    return float(tokens) * (6 * parameters + sizes["n_layer"] * heads * recurrence)


def timed_steps(
    trainers: dict[str, Trainer], batch: int, sizes: dict[str, int], device: torch.device, *, rounds: int
) -> dict[str, Row]:
    """Name -> median step ms, peak MiB of that model alone, last loss; the models take turns."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    losses: dict[str, float] = {}
    for turn in range(rounds + 3):
        shape = (batch, sizes["steps"])
        ids, labels = (torch.randint(0, sizes["vocab_size"], shape, device=device) for _ in range(2))
        for name, trainer in trainers.items():
            others = allocated(device) - trainer.static
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            sync(device)
            begin = time.perf_counter()
            loss = trainer.step(ids, labels)
            sync(device)
            ms = 1e3 * (time.perf_counter() - begin)
            losses[name] = float(loss)
            peak = torch.cuda.max_memory_allocated(device) - others if device.type == "cuda" else 0
            if turn >= 3:
                seen[name].append((ms, peak / 2**20))
    return {
        name: {
            "step_ms": round(statistics.median(ms for ms, _ in found), 2),
            "peak_mib": round(max(mib for _, mib in found)),
            "loss": round(losses[name], 4),
        }
        for name, found in seen.items()
    }


def largest_batch(
    trainers: dict[str, Trainer], wanted: list[int], sizes: dict[str, int], device: torch.device
) -> int:
    """The first of the batches that all models can run; raises ValueError if none."""
    for batch in wanted:
        try:
            timed_steps(trainers, batch, sizes, device, rounds=1)
            return batch
        except torch.OutOfMemoryError:
            print(f"batch {batch} does not fit all of {', '.join(trainers)}", flush=True)
        for trainer in trainers.values():  # after the exception, which holds the failed step's tensors
            trainer.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    raise ValueError(f"no batch of {wanted} fits; give smaller ones with --batches")


def measure(options: argparse.Namespace, sizes: dict[str, int], device: torch.device) -> list[Row]:
    """One row per model, checkpointing off and on; with --compile our compiled blocks as a third model."""
    makers: dict[str, Callable[[], nn.Module]] = {"ours": lambda: Ours(sizes)}
    if not options.no_fla:
        makers["fla"] = lambda: Fla(sizes)
    trainers = {name: Trainer(make, device) for name, make in makers.items()}
    rows: list[Row] = []
    for recompute in (False, True):
        for trainer in trainers.values():
            trainer.model.recompute(recompute)
        batch = largest_batch(trainers, options.batches, sizes, device)
        found = timed_steps(trainers, batch, sizes, device, rounds=options.rounds)
        rows += described(found, trainers, sizes, batch, how="eager", recompute=recompute)
    if options.compile:
        rows += compiled_rows(trainers["ours"], rows, sizes, device, options.rounds)
    return rows


def compiled_rows(
    trainer: Trainer, rows: list[Row], sizes: dict[str, int], device: torch.device, rounds: int
) -> list[Row]:
    """Our blocks under torch.compile at the batches of the eager rows; measured after, not between, them."""
    found: list[Row] = []
    trainer.model.recompute(False)
    trainer.model.compile_blocks()
    for recompute in (False, True):
        trainer.model.recompute(recompute)
        batch = next(r["batch"] for r in rows if r["recompute"] == recompute)
        timed = timed_steps({"ours": trainer}, batch, sizes, device, rounds=rounds)
        found += described(timed, {"ours": trainer}, sizes, batch, how="compiled", recompute=recompute)
    return found


def described(
    found: dict[str, Row], trainers: dict[str, Trainer], sizes: dict[str, int], batch: int, *, how: str,
    recompute: bool,
) -> list[Row]:  # fmt: skip
    """The measured numbers with tokens/s and utilisation; FLOP are counted on each model's own matrices."""
    rows = []
    for name, row in found.items():
        parameters = matrix_parameters(trainers[name].model)
        seconds = row["step_ms"] / 1e3
        fixed = {"model": name, "how": how, "recompute": recompute, "batch": batch}
        rates = {
            "matrix_parameters": parameters,
            "tokens_per_s": round(batch * sizes["steps"] / seconds),
            "mfu": round(step_flop(parameters, sizes, batch) / seconds / PEAK_FLOP, 4),
        }
        rows.append(fixed | row | rates)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
    """The Markdown form of the results."""
    lines = ["# Whole model: one training step of the 1.6B RWKV-6", ""]
    lines += [
        "`python -m benchmarks.whole_model`; " + ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    ]
    lines += ["", "bf16 weights, gradients and moments, fused AdamW; model FLOP against 989 TFLOP/s.", ""]
    lines += [
        "| model | blocks | checkpointing | batch x T | step ms | tokens/s | MFU | peak MiB | ours/fla |"
    ]
    lines += ["|" + "---|" * 9]
    rows = result["rows"]
    for row in rows:
        peers = [r for r in rows if r["model"] == "fla" and r["recompute"] == row["recompute"]]
        ratio = f"{row['tokens_per_s'] / peers[0]['tokens_per_s']:.2f}x" if peers else "-"
        lines.append(
            f"| {row['model']} | {row['how']} | {'on' if row['recompute'] else 'off'} "
            f"| {row['batch']} x {result['sizes']['steps']} | {row['step_ms']} | {row['tokens_per_s']} "
            f"| {row['mfu']:.3f} | {row['peak_mib']} | {ratio if row['model'] != 'fla' else ''} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_model")
    parser.add_argument("--batches", default="4,2,1", help="tried in this order")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="our blocks under torch.compile too")
    parser.add_argument("--no-fla", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=str(RESULTS))
    options = parser.parse_args(arguments)
    options.batches = [int(b) for b in options.batches.split(",")]
    out, device = Path(options.out), torch.device(options.device)
    sizes = TINY if options.tiny else SIZES
    if device.type == "cuda" and not options.no_fla:
        kernel_tuning.load(RESULTS / "fla_tuned.json")
        kernel_tuning.load(out / "fla_tuned.json")
        kernel_tuning.install()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    machine = {
        "device": name,
        "torch": torch.__version__,
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
    rows = measure(options, sizes, device)
    result = {"machine": machine, "sizes": sizes, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "whole_model.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "whole_model.md").write_text(table(result))


if __name__ == "__main__":
    main()
