"""Generating from the state beside the other ways: tokens a second at positions 64, 4,096 and 24,576.

    python -m benchmarks.generate [--size 1b6 --size 3b] [--device cuda|cpu] [--out FOLDER]

RWKV-6 of random weights in bfloat16 (float32 on a CPU), batches of 1 and 16:

    ours           toolkit.decode.Decoder: one CUDA graph a token (eager on a CPU)
    recomputed     the whole prefix again for every token, as VisualRWKV's code does; our parallel form
    rwkv package   its own strategy, "cuda fp16" with its CUDA kernels where they build; one sequence only
    llama          a Llama of as many parameters, SDPA over a static KV cache, one CUDA graph a token
    transformers   that Llama by the transformers library: DynamicCache, SDPA, eager

What is timed takes turns; medians. The package's caller reads each token before the next, as it must; the
others choose on the device. A state costs the same whatever was read, so ours at a position has read
that many tokens with one sequence, repeated over the batch; KV caches hold random numbers. Then greedy texts
from the state against one pass over everything, in bfloat16. Writes generate.json, generate.md, generate.png.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generate_peers import Llama, Package, Unable, start_build, transformers_llama
from benchmarks.generate_table import plot, table
from benchmarks.loading import sizes_of
from toolkit.decode import Decoder
from toolkit.pretrained import ghost
from toolkit.trunk import LanguageModel, State

RESULTS = Path(__file__).parent / "results"
POSITIONS = {"cuda": (64, 4096, 24576), "cpu": (64, 4096)}
BATCHES = {"cuda": (1, 16), "cpu": (1, 2)}
CHUNK = 4096  # tokens of a prefill at once
PART = 65536  # positions of one pass that recomputes; a larger batch goes in parts
ROUNDS, TOKENS = 7, 8  # turns, and tokens timed in one of them
AGREE = 200  # tokens of the greedy texts

Step = Callable[[], object]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def random_model(size: str, device: str) -> LanguageModel:
    """Random weights made on the device (published initial values take minutes)."""
    torch.manual_seed(0)
    model = ghost(sizes_of(size)).to(torch.bfloat16 if device == "cuda" else torch.float32)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.02)
    return model


@torch.inference_mode()
def read(model: LanguageModel, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """(hidden [B, D] after the last of ids [B, T], state), read in chunks."""
    for part in ids.split(CHUNK, dim=1):
        hidden, state = model(model.emb(part), state=state)
    assert state is not None
    return hidden[:, -1], state


def repeated(state: State, batch: int) -> State:
    """A state of one sequence, for a batch."""
    return [
        (tuple(t.repeat(batch, *[1] * (t.dim() - 1)) for t in time_), channel.repeat(batch, 1))
        for time_, channel in state
    ]


def synchronised(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(step: Step, device: str, count: int) -> float:
    """Seconds of one call, over `count` in a row."""
    synchronised(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    synchronised(device)
    return (time.perf_counter() - began) / count


def in_turn(steps: dict[str, Step], device: str) -> dict[str, float]:
    """Median seconds of a call of each, taking turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds(step, device, 4)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            found[name].append(seconds(step, device, TOKENS))
    return {name: sorted(times)[len(times) // 2] for name, times in found.items()}


class Case:
    """One size of model: its steps at each batch and position, the reasons of those that cannot be."""

    def __init__(self, size: str, device: str) -> None:
        self.size, self.device = size, device
        self.model = random_model(size, device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.states: dict[int, State] = {}
        self.vocab = self.model.emb.num_embeddings
        self.package = self.made(lambda: Package(self.model, device))
        self.how = self.package.how if isinstance(self.package, Package) else str(self.package)
        say(f"{size}: {self.parameters:,} parameters; the rwkv package: {self.how}")

    def made(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, or the reason why it cannot."""
        try:
            return make()
        except Unable as error:
            return error
        except Exception as error:  # one way that fails must not hide the others
            self._tidy()
            return Unable(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")

    def ids(self, batch: int, length: int) -> Tensor:
        draw = torch.Generator().manual_seed(length)
        return torch.randint(1, self.vocab, (batch, length), generator=draw).to(self.device)

    def state_at(self, position: int) -> State:
        """The state of one sequence after so many tokens."""
        if position not in self.states:
            self.states[position] = read(self.model, self.ids(1, position))[1]
        return self.states[position]

    def row(self, batch: int, position: int) -> dict[str, Any]:
        """Milliseconds a token of every way; `reasons` of those that there is no number for."""
        made: dict[str, Any] = {"ours": self.made(lambda: self._ours(batch, position))}
        made["rwkv package"] = self._package_step(batch)
        shape = (self.parameters, self.vocab, batch, position, self.device)
        made["llama"] = self.made(lambda: Llama(self.size, *shape).step)
        reasons = {name: str(step) for name, step in made.items() if isinstance(step, Unable)}
        times = in_turn({n: step for n, step in made.items() if n not in reasons}, self.device)
        made.clear()  # the memory of one cache goes before the next one's is taken
        self._tidy()
        library = self.made(lambda: transformers_llama(self.size, *shape))
        if isinstance(library, Unable):
            reasons["transformers"] = str(library)
        else:
            times |= self._made_time("transformers", library, reasons)
        del library
        self._tidy()
        again = self.made(lambda: self._recomputed(batch, position))
        if isinstance(again, Unable):
            reasons["recomputed"] = str(again)
        else:
            times["recomputed"] = again
        self._tidy()
        return {
            "size": self.size,
            "batch": batch,
            "position": position,
            "ms": {n: 1e3 * t for n, t in times.items()},
            "reasons": reasons,
        }

    def _ours(self, batch: int, position: int) -> Step:
        state = repeated(self.state_at(position), batch)
        decoder = Decoder(self.model, state)
        decoder.load(torch.ones(batch, dtype=torch.long, device=self.device), state)
        return decoder.step

    def _made_time(self, name: str, step: Step, reasons: dict[str, str]) -> dict[str, float]:
        """The time of a step that may run out of memory, else a reason."""
        found = self.made(lambda: in_turn({name: step}, self.device))
        if isinstance(found, Unable):
            reasons[name] = str(found)
            return {}
        return dict(found)

    def flat(self, batch: int) -> dict[str, Any]:
        """Milliseconds a token of ours at every position, these taking turns."""
        steps = {str(position): self._ours(batch, position) for position in POSITIONS[self.device]}
        times = in_turn(steps, self.device)
        return {"size": self.size, "batch": batch, "ms": {p: 1e3 * t for p, t in times.items()}}

    def _package_step(self, batch: int) -> Any:
        if isinstance(self.package, Unable):
            return self.package
        return self.package.step if batch == 1 else Unable("reads one sequence at a time")

    def _recomputed(self, batch: int, position: int) -> float:
        """Seconds of one token by a pass over everything before it."""
        parts = self.ids(batch, position).split(max(1, PART // position))

        @torch.inference_mode()
        def step() -> list[Tensor]:
            found = (self.model(self.model.emb(ids))[0][:, -1] for ids in parts)
            return [self.model.head(hidden).argmax(-1) for hidden in found]

        # The first call compiles the kernels; where a call is long, one measured call is enough.
        times = [seconds(step, self.device, 1)]
        while len(times) < 4 and sum(times) < 6:
            times.append(seconds(step, self.device, 1))
        return sorted(times[1:] or times)[len(times[1:]) // 2]

    def _tidy(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def agreement(size: str, device: str, *, taught: bool) -> dict[str, Any]:
    """Greedy tokens from the state in bfloat16, beside one pass over the same text in bfloat16 and float32.

    taught: the head's rows of a random text point along the hidden states before them, so that the model is
    as sure of its next token as a trained one; with random rows the two largest of all logits are close.
    """
    whole = random_model(size, device).float()
    draw = torch.Generator().manual_seed(7)
    text = torch.randperm(whole.emb.num_embeddings - 1, generator=draw)[: AGREE + 64].to(device)[None] + 1
    if taught:
        hidden = whole(whole.emb(text))[0][0, :-1]
        whole.head.weight[text[0, 1:]] += hidden * (12.0 / hidden.square().sum(-1, keepdim=True))
    exact = _logits(whole, text)[0, 63:]
    model = whole.bfloat16()
    hidden, state = read(model, text[:, :64])
    logits = [model.head(hidden)[0].float()]
    decoder = Decoder(model, state)
    decoder.load(logits[0].argmax(-1, keepdim=True), state)
    said = [decoder.token.clone()]
    for _ in range(AGREE - 1):
        decoder.step()
        logits.append(decoder.logits[0].float())
        said.append(decoder.token.clone())
    mine = torch.stack(said, dim=1)  # [1, AGREE]
    again = _logits(model, torch.cat((text[:, :64], mine[:, :-1]), dim=1))[0, 63:]
    stepped = torch.stack(logits)
    scale = again.std()
    return {
        "size": size,
        "taught": taught,
        "tokens": AGREE,
        "agree": float((mine[0] == again.argmax(-1)).float().mean()),
        "largest_difference": float((stepped - again).abs().max() / scale),
        "mean_difference": float((stepped - again).abs().mean() / scale),
        "bf16_agrees_with_fp32": float(
            (_logits(model, text)[0, 63:].argmax(-1) == exact.argmax(-1)).float().mean()
        ),
        "follows_the_text": float((mine[0] == text[0, 64 : 64 + AGREE]).float().mean()) if taught else None,
    }


def _logits(model: LanguageModel, ids: Tensor) -> Tensor:
    logits: Tensor = model.head(model(model.emb(ids))[0]).float()
    return logits


def machine(device: str) -> dict[str, Any]:
    """What the times depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    found = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    return found | {"threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}


def write(out: Path, result: dict[str, Any], *, figure: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "generate.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "generate.md").write_text(table(result))
    if figure and result["rows"]:
        plot(result, out / "generate.png")


def agreements(sizes: list[str], device: str) -> list[dict[str, Any]]:
    """Both heads of every size; an error is told and hides nothing else."""
    found = []
    for size in sizes:
        for taught in (False, True):
            try:
                found.append(agreement(size, device, taught=taught))
                say(json.dumps(found[-1]))
            except Exception as error:
                say(f"agreement of {size}: {type(error).__name__}: {error}")
            gc.collect()
    return found


def rows(case: Case, result: dict[str, Any], ends: float, out: Path) -> None:
    """Every batch and position of one size; what is measured is kept if the machine goes."""
    for batch in BATCHES[case.device]:
        if time.monotonic() < ends:
            found = case.made(lambda batch=batch: case.flat(batch))  # type: ignore[misc]
            say(str(found))
            result["flat"] += [] if isinstance(found, Unable) else [found]
        for position in POSITIONS[case.device]:
            if time.monotonic() > ends:
                result["left_out"].append([case.size, batch, position])
                continue
            result["rows"].append(case.row(batch, position))
            say(json.dumps(result["rows"][-1]))
            write(out, result, figure=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", action="append", choices=("1b6", "3b", "tiny"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=200, help="seconds after which nothing new is begun")
    args = parser.parse_args(argv)
    ends = time.monotonic() + args.budget
    start_build(args.device)
    sizes = args.size or ["1b6", "3b"]
    result: dict[str, Any] = {"machine": machine(args.device), "rows": [], "flat": [], "left_out": []}
    result["agreement"] = agreements(sizes, args.device)
    for size in sizes:
        case = Case(size, args.device)
        result["machine"]["rwkv package"] = case.how
        rows(case, result, ends, args.out)
        write(args.out, result, figure=True)
        del case
        gc.collect()
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
