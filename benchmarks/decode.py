"""Decoding on a GPU: the step kernels inside a CUDA graph, and whole models, tokens a second.

    python -m benchmarks.decode [--out FOLDER]

Writes decode.json and decode.md into benchmarks/results. The state's floor is its bytes, read and written
once, over the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.kernel_timing import medians
from kernels.step import (
    Ending,
    Late,
    Norm,
    ddlerp_step,
    norm_shift_step_,
    wkv4_step_,
    wkv5_step_,
    wkv6_step_,
)
from toolkit import register
from toolkit.decode import Decoder
from toolkit.trunk import LanguageModel

RESULTS = Path(__file__).parent / "results"
LAYERS, HEADS, SIZE, RANK = 32, 40, 64, 32
POSITIONS = {1: (64, 4096, 24576), 8: (64, 4096), 64: (64, 4096)}
MODELS = {"12 x 768": (12, 768), "24 x 2048": (24, 2048)}
STEPS = (("rwkv6", 1), ("rwkv6", 8), ("rwkv6", 64), ("rwkv5", 1), ("rwkv4", 1))
BATCHES = (1, 8, 16, 64)
VOCABULARY = 65536
RESIDENT = 200e6  # bytes of states to rotate through: four times the H100's cache

Unit = Callable[[], object]


def events(once: Unit, rounds: int = 21) -> float:
    """Median milliseconds of one call between CUDA events."""
    times = []
    for turn in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        once()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def captured(units: list[Unit]) -> torch.cuda.CUDAGraph:
    """One graph that runs the units in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for unit in units[:2]:
            unit()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for unit in units:
            unit()
    return graph


class Layer:
    """The parameters, states and activations of one layer's step kernels; matrix products left out."""

    def __init__(self, op: str, batch: int) -> None:
        def row(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        def weight(*shape: int) -> Tensor:
            return torch.rand(*shape, device="cuda")

        d = HEADS * SIZE
        self.op, self.heads = op, (batch, HEADS, SIZE)
        self.x, self.before, self.channel = (torch.randn(batch, d, device="cuda") for _ in range(3))
        self.late, self.gated = Late(row(batch, d)), Late(row(batch, d), row(batch, d))
        self.norms = [Norm(weight(d), weight(d), 1e-5) for _ in range(2)]
        self.mixes = [weight(d) for _ in range(6)]
        self.low, self.up = row(batch, 5 * RANK), row(5, RANK, d)
        self.r, self.k, self.v, self.w = (row(batch, d) for _ in range(4))
        self.u, self.base = weight(d), torch.empty(d, device="cuda").uniform_(-6, -1)
        self.ending = Ending(weight(d), weight(d), 64e-5, row(batch, d))
        square = (batch, 3, d) if op == "rwkv4" else (batch, HEADS, SIZE, SIZE)
        self.state = torch.rand(square, device="cuda")
        self.tiny = torch.zeros(32, device="cuda")

    def recurrence(self) -> None:
        """The recurrence, its decay, head norm and gate: one kernel."""
        if self.op == "rwkv4":
            wkv4_step_(self.k, self.v, None, self.u, self.state, base=self.base, gate=self.r)
            return
        r, k, v, w = (t.view(self.heads) for t in (self.r, self.k, self.v, self.w))
        u, base = self.u.view(self.heads[1:]), self.base.view(self.heads[1:])
        if self.op == "rwkv5":
            wkv5_step_(r, k, v, None, u, self.state, base=base, ending=self.ending)
        else:
            wkv6_step_(r, k, v, w, u, self.state, base=base, ending=self.ending)

    def time_shift(self, mixes: int) -> None:
        """Residual, LayerNorm and the token shift of the time mix; RWKV-6 also its low-rank second half."""
        six = self.op == "rwkv6" and mixes > 0
        shares = self.mixes[: 1 if six else mixes]
        _, change = norm_shift_step_(
            self.x,
            self.gated,
            self.norms[0],
            self.before,
            shares,
            of_previous=six,
            dtype=torch.bfloat16,
            keep=six,
        )
        if change is not None:
            ddlerp_step(self.before, change, self.low, self.up, self.mixes[1:], dtype=torch.bfloat16)

    def channel_shift(self, mixes: int) -> None:
        """Residual, LayerNorm and the token shift of the channel mix."""
        norm_shift_step_(
            self.x,
            self.late,
            self.norms[1],
            self.channel,
            self.mixes[:mixes],
            of_previous=False,
            dtype=torch.bfloat16,
        )

    def everything(self) -> None:
        """All step kernels of a layer, in their order."""
        self.time_shift({"rwkv4": 3, "rwkv5": 4, "rwkv6": 5}[self.op])
        self.recurrence()
        self.channel_shift(2)

    def launches_only(self) -> None:
        """As many kernels as `everything` runs, with nothing to do."""
        for _ in range(4 if self.op == "rwkv6" else 3):
            self.tiny.add_(1)

    def norms_only(self) -> None:
        """What a layer without recurrence and shift would still run: two residuals and LayerNorms."""
        self.time_shift(0)
        self.channel_shift(0)


def step_rows(op: str, batch: int, early: bool) -> dict[str, Any]:
    """Milliseconds a token of all layers' step kernels inside a graph, by position and by part."""
    from kernels.gpu import one_token

    one_token.early = early
    bytes_state = 4 * batch * HEADS * SIZE * (3 if op == "rwkv4" else SIZE) * LAYERS
    sets = min(8, max(1, round(RESIDENT / bytes_state)))  # tokens a graph holds, each with its own states
    layers = [Layer(op, batch) for _ in range(LAYERS * sets)]
    parts = {"recurrence": Layer.recurrence, "norms": Layer.norms_only, "all": Layer.everything}
    parts["launches"] = Layer.launches_only
    row: dict[str, Any] = {"op": op, "batch": batch, "early": early, "bytes": 2 * bytes_state}
    for name, part in parts.items():
        graph = captured([lambda part=part, layer=layer: part(layer) for layer in layers])  # type: ignore[misc]
        row[name] = events(graph.replay) / sets
    row["at"] = by_position(layers[:LAYERS], POSITIONS[batch]) if op == "rwkv6" and not early else {}
    one_token.early = False
    return row


def by_position(layers: list[Layer], positions: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds of one token, one set of states, after so many tokens."""
    graph = captured([layer.everything for layer in layers])
    done, found = 0, {}
    for position in positions:
        for _ in range(position - done):
            graph.replay()
        done = position
        found[str(position)] = events(graph.replay)
    return found


def bandwidth() -> float:
    """Copy bandwidth, bytes a second, read and write counted."""
    x = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (events(lambda: y.copy_(x)) * 1e-3)


def random_model(op: str, n_layer: int, d_model: int) -> LanguageModel:
    """A model of random weights, made on the GPU (published initial values take minutes)."""
    register.discover()
    with torch.device("meta"):
        mixers = register.bind("recurrence", {"name": op})(d_model, n_layer)
        model = LanguageModel(mixers, d_model=d_model, n_layer=n_layer, vocab_size=VOCABULARY)
    model = model.to_empty(device="cuda").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.02)
    return model


@torch.inference_mode()
def model_row(op: str, name: str, batch: int) -> dict[str, Any]:
    """Milliseconds a token of a whole model: float32 weights under bf16 autocast, as evaluation runs."""
    model = random_model(op, *MODELS[name])
    with torch.autocast("cuda", torch.bfloat16):
        with kernels.use("torch"):
            _, state = model(model.emb(torch.randint(0, VOCABULARY, (batch, 16), device="cuda")))
        token = torch.randint(0, VOCABULARY, (batch,), device="cuda")

        def forward() -> None:
            hidden, _ = model(model.emb(token).unsqueeze(1), state=state)
            model.head(hidden[:, 0]).argmax(-1)

        eager, graph = Decoder(model, state, graph=False), Decoder(model, state)
        apart = Decoder(model, state, overlap=False)
        eager.load(token, state)
        graph.load(token, state)
        same = all(torch.equal(eager.step(), graph.step()) for _ in range(8))
        alike = torch.equal(eager.logits, graph.logits)
        apart.load(token, state)
        times = {"forward": events(forward, 9), "eager": events(eager.step, 9)}
        both = {"graph": lambda turn: graph.step(), "apart": lambda turn: apart.step()}
        times |= medians(both, token.device, mode="stream", reps=21, budget_ms=1000)
    weights = sum(p.numel() for p in model.parameters()) - model.emb.weight.numel()
    row: dict[str, Any] = {"op": op, "model": name, "batch": batch, "mode": graph.mode, **times}
    return row | {"same_tokens": same, "same_logits": alike, "weight_bytes": 2 * weights}


def attempt(rows: list[dict[str, Any]], what: Callable[..., dict[str, Any]], *given: Any) -> None:
    """Adds a row, or the error it ended in."""
    try:
        row = what(*given)
    except Exception as error:  # one failing case must not hide the others
        row = {"given": list(map(str, given)), "error": f"{type(error).__name__}: {str(error)[:200]}"}
    rows.append(row)
    print(json.dumps(row), flush=True)
    torch.cuda.empty_cache()


def table(result: dict[str, Any]) -> str:
    """The Markdown form of the results."""
    rate = result["machine"]["bytes_per_s"]
    head = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    lines = ["# Decoding", "", f"`python -m benchmarks.decode`; medians; {head}.", ""]
    lines += [f"Step kernels of {LAYERS} layers of {HEADS * SIZE} in a CUDA graph, ms a token:", ""]
    lines += [
        "`all`: residuals, LayerNorms, token shifts with RWKV-6's low-rank product, recurrence with decay,"
    ]
    lines += [
        "head norm and gate. `norms`: the residuals and LayerNorms alone. `launches`: as many kernels with",
        "nothing to do. `early`: programmatic launch.",
        "",
    ]
    lines += [
        "| op | B | early | recurrence | norms | all | all - norms | launches | state's floor | at position |"
    ]
    lines += ["|" + "---|" * 10]
    for row in (r for r in result["steps"] if "error" not in r):
        at = ", ".join(f"{p}: {ms:.3f}" for p, ms in row["at"].items())
        cells = [row["recurrence"], row["norms"], row["all"], row["all"] - row["norms"]]
        cells += [row["launches"], 1e3 * row["bytes"] / rate]
        numbers = " | ".join(f"{c:.3f}" for c in cells)
        lines.append(f"| {row['op']} | {row['batch']} | {row['early']} | {numbers} | {at} |")
    lines += ["", "Whole models, vocabulary 65,536, bf16 products, ms a token:", ""]
    lines += [
        "| op | model | B | forward | eager step | graph, not early | graph | tokens/s | weights' floor |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in (r for r in result["models"] if "error" not in r):
        numbers = " | ".join(f"{row[c]:.3f}" for c in ("forward", "eager", "apart", "graph"))
        floor, speed = 1e3 * row["weight_bytes"] / rate, 1e3 * row["batch"] / row["graph"]
        lines.append(
            f"| {row['op']} | {row['model']} | {row['batch']} | {numbers} | {speed:.0f} | {floor:.3f} |"
        )
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """What the times depend on."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "bytes_per_s": bandwidth(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(), "steps": [], "models": []}
    steps, models = result["steps"], result["models"]
    out.mkdir(parents=True, exist_ok=True)
    jobs = [
        *((steps, step_rows, op, batch, early) for early in (False, True) for op, batch in STEPS),
        *((models, model_row, "rwkv6", name, batch) for name in MODELS for batch in BATCHES),
        *((models, model_row, op, "24 x 2048", 1) for op in ("rwkv5", "rwkv4")),
    ]
    for job in jobs:  # a run that is cut off keeps what it has
        attempt(*job)
        (out / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "decode.md").write_text(table(result))
    return int(any("error" in row for row in steps + models))


if __name__ == "__main__":
    raise SystemExit(main())
