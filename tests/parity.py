"""Compares the toolkit with golden files taken from the original VisualRWKV code.

    python -m tests.parity FILE... [--backend torch|reference|triton] [--device cpu|cuda] [--pixels]

Prints one line per file, scan and backend with the largest relative error (Frobenius norm) of logits,
loss and gradients over the file's inputs, and exits 1 above the bounds, 2 for what is no golden file. Sizes,
recurrence version, projector and pooling are read from the file (format: tests/golden/README.md). With
--pixels the file's weights go through toolkit.convert first, and its own CLIP tower sees the pixels;
without, the stored features of the original's tower stand for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import kernels
from toolkit import register
from toolkit.contracts import IGNORE, PAD_ID, Batch, ImageFeatures
from toolkit.convert.convert import convert
from toolkit.lit import to_device
from toolkit.loss import lm_loss
from toolkit.model import VisualRWKV
from toolkit.pretrained import fill_part, load_language_model
from toolkit.trunk import LanguageModel

BOUNDS = {"logits": 1e-4, "loss": 1e-4, "gradients": 1e-3}
BACKENDS = ["torch", "reference", "triton"]
SCANS = {"unidirection": "uni", "bidirection": "bi", "multidirection": "2d"}
"""The original's scan names where ours differ."""
STATIC = ("spiral", "snake", "zigzag")
"""Scans that the original applies once before block 0 and never undoes."""
IMAGE = -200


class StoredFeatures(nn.Module):
    """Stands for the vision tower: the golden files carry its output."""

    learned = False

    def __init__(self, patches: int, d_out: int) -> None:
        super().__init__()
        side = round(patches**0.5)
        self.grid, self.d_out, self.n_extra = (side, side), d_out, 1

    def transform(self) -> Any:
        raise ValueError("golden files carry features, not pictures")

    def forward(self, pixels: Tensor) -> ImageFeatures:
        """pixels: [B, 1 + P, D] as the tower leaves them, class token first."""
        return ImageFeatures(pixels[:, 1:], pixels[:, :1], self.grid)


@dataclass
class Golden:
    """One golden file."""

    path: Path
    args: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> Golden:
        try:
            opened = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: no safetensors file can be read: {error}") from error
        with opened as file:
            metadata = file.metadata() or {}
            if "args" not in metadata:
                raise ValueError(f"{path}: no hyper-parameters under metadata key 'args'; not a golden file")
            names = file.keys()  # no mapping: it can be listed, not iterated
            found = cls(path, json.loads(metadata["args"]), {k: file.get_tensor(k) for k in names})
        if "in0/vision_features" not in found.tensors:
            raise ValueError(
                f"{path}: holds no input with an image (in0/vision_features); only VisualRWKV v5.1 and v6.0 "
                "are compared here"
            )
        return found

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.under("param/").items() if k.startswith(("rwkv.", "proj."))}

    @property
    def version(self) -> int:
        return 6 if "rwkv.blocks.0.att.time_maa_x" in self.parameters else 5

    @property
    def inputs(self) -> list[int]:
        return sorted({int(k.split("/")[0][2:]) for k in self.tensors if k.startswith("in")})

    @property
    def scans(self) -> list[str]:
        return sorted({k.split("/")[1] for k in self.tensors if k.startswith("out0/")})


def converted(golden: Golden, folder: Path) -> Path:
    """The file's checkpoint (rwkv.*, proj.*, vit.*) through `toolkit.convert`, below `folder`."""
    import open_clip

    torch.save(golden.under("param/"), folder / "original.pth")
    facts = convert(folder / "original.pth", folder / "converted")["parts"]["vit"]
    name = f"golden-{facts['width']}-{facts['n_layer']}"
    vision = {"image_size": facts["image_size"], "layers": facts["n_layer"], "width": facts["width"]}
    # Heads cannot be told from a tower's tensors; the golden files' tower has four.
    vision |= {"head_width": facts["width"] // 4, "patch_size": facts["patch"], "mlp_ratio": 2.0}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    (folder / "tower").write_text(name)
    return folder / "converted"


def from_folder(golden: Golden, scan: str, folder: Path) -> VisualRWKV:
    """The model of a golden file from its converted weights, the CLIP tower's own among them."""
    register.discover()
    args, given = golden.args, str(folder)
    name = (folder.parent / "tower").read_text()
    encoder = register.bind("encoder", {"name": "open_clip", "model": name, "weights": given})()
    grid = args["grid_size"]
    projector = {"name": "linear", "tokens": grid**2 if grid > 0 else grid}
    proj = register.bind("projector", projector)(encoder.d_out, args["n_embd"], encoder.grid)
    fill_part(proj, given, prefix="proj.", key="proj.weights", download="")
    rwkv, _ = load_language_model(given)
    table = register.bind("scan", {"name": SCANS.get(scan, scan)})(args["n_layer"], *proj.grid)
    return VisualRWKV(encoder, proj, rwkv, table=table)


def build(golden: Golden, scan: str) -> VisualRWKV:
    """The model of a golden file, its weights loaded strictly by name."""
    register.discover()
    args, weights = golden.args, golden.parameters
    options: dict[str, Any] = {"name": f"rwkv{golden.version}", "head_size": args["head_size_a"]}
    if golden.version == 6:
        options["shift_rank"] = weights["rwkv.blocks.0.att.time_maa_w2"].shape[1]
        options["decay_rank"] = weights["rwkv.blocks.0.att.time_decay_w2"].shape[0]
    options["d_ffn"] = weights["rwkv.blocks.0.ffn.key.weight"].shape[0]
    recurrence = register.bind("recurrence", options)(args["n_embd"], args["n_layer"])
    features = golden.tensors["in0/vision_features"]
    encoder = StoredFeatures(features.shape[1] - 1, features.shape[2])
    grid = args["grid_size"]
    projector = {
        "name": "linear" if "proj.weight" in weights else "gated",
        "tokens": grid**2 if grid > 0 else grid,
    }
    proj = register.bind("projector", projector)(encoder.d_out, args["n_embd"], encoder.grid)
    vocab = weights["rwkv.emb.weight"].shape[0]
    rwkv = LanguageModel(recurrence, d_model=args["n_embd"], n_layer=args["n_layer"], vocab_size=vocab)
    table = register.bind("scan", {"name": SCANS.get(scan, scan)})(args["n_layer"], *proj.grid)
    model = VisualRWKV(encoder, proj, rwkv, table=table)
    model.load_state_dict(weights, strict=True)
    return model


def batch_of(golden: Golden, i: int, n_image: int) -> Batch:
    """Input i with the one placeholder -200 widened to n_image positions."""

    def widen(row: Tensor, at: int, fill: int) -> Tensor:
        return torch.cat((row[:at], row.new_full((n_image,), fill), row[at + 1 :]))

    ids, labels = golden.tensors[f"in{i}/input_ids"], golden.tensors[f"in{i}/labels"]
    starts = [int((row == IMAGE).nonzero()[0]) for row in ids]
    ids = torch.stack([widen(r, s, PAD_ID) for r, s in zip(ids, starts, strict=True)])
    labels = torch.stack([widen(r, s, IGNORE) for r, s in zip(labels, starts, strict=True)])
    b, t = ids.shape
    return Batch(
        ids,
        labels,
        torch.full((b,), t),
        torch.tensor(starts),
        torch.ones(b),
        [str(n) for n in range(b)],
        pixels=golden.tensors[f"in{i}/vision_features"],
    )


def as_original(logits: Tensor, batch: Batch, model: VisualRWKV, scan: str) -> Tensor:
    """Our logits with the image positions where the original leaves them."""
    if scan not in STATIC:
        return logits
    order = torch.as_tensor(register.bind("scan", {"name": scan})(1, *model.proj.grid)[0])
    moved = logits.clone()
    for row, start in enumerate(batch.image_start.tolist()):
        moved[row, start : start + len(order)] = logits[row, start + order]
    return moved


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Frobenius error over Frobenius norm, in fp64; NaN counts as infinite."""
    ours, theirs = ours.detach().double(), theirs.double()
    error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def errors(
    golden: Golden, scan: str, backend: str, device: str = "cpu", folder: Path | None = None
) -> dict[str, float]:
    """Largest relative errors of one scan over all inputs of the file.

    folder: what `converted` made, to begin from pixels; None begins from the stored features.
    """
    worst = dict.fromkeys(BOUNDS, 0.0)

    def note(what: str, value: float) -> None:
        worst[what] = max(worst[what], value)

    model = (build(golden, scan) if folder is None else from_folder(golden, scan, folder)).to(device)
    for part in (model.proj, model.rwkv):
        part.requires_grad_(True)
    reduction = "sample" if golden.version == 6 else "batch"
    with kernels.use(backend):
        for i in golden.inputs:
            expected = golden.under(f"out{i}/{scan}/")
            batch = batch_of(golden, i, model.n_image)
            if folder is not None:
                batch.pixels = golden.tensors[f"in{i}/images"][:, 0]
            assert torch.equal(batch.labels, expected["targets"]), (
                f"{golden.path}: targets of input {i} differ"
            )
            here = to_device(batch, torch.device(device))
            with torch.no_grad():
                logits = as_original(model.logits(here).cpu(), batch, model, scan)
                note("logits", relative(logits, expected["logits"]))
            model.zero_grad()
            loss = lm_loss(model(here, l2="all"), reduction=reduction)
            loss.backward()
            note("loss", relative(loss.detach().cpu(), expected["loss"].squeeze()))
            for key, gradient in golden.under(f"grad{i}/{scan}/").items():
                if not key.startswith("vit."):
                    note("gradients", relative(model.get_parameter(key).grad.cpu(), gradient))
    return worst


def report(
    paths: list[Path], backends: list[str], device: str = "cpu", *, pixels: bool = False
) -> Iterator[tuple[str, bool]]:
    """One line per file, scan and backend, and whether it is within the bounds."""
    for path in paths:
        golden = Golden.open(path)
        with tempfile.TemporaryDirectory() as place:
            folder = converted(golden, Path(place)) if pixels else None
            yield from _rows(golden, backends, device, folder)


def _rows(
    golden: Golden, backends: list[str], device: str, folder: Path | None
) -> Iterator[tuple[str, bool]]:
    for scan in golden.scans:
        for backend in backends:
            found = errors(golden, scan, backend, device, folder)
            good = all(found[k] <= BOUNDS[k] for k in BOUNDS)
            numbers = "  ".join(f"{k} {v:.1e}" for k, v in found.items())
            yield f"{'ok  ' if good else 'FAIL'} {golden.path.name}  {scan:15} {backend:10} {numbers}", good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="default: the first two")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--pixels", action="store_true", help="through toolkit.convert, from the stored pixels"
    )
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; write --device cpu")
    good = True
    try:
        for line, ok in report(
            options.files, options.backend or BACKENDS[:2], options.device, pixels=options.pixels
        ):
            print(line)
            good &= ok
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
