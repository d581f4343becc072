"""Data that a seed makes: converted at first use, and checked to be what everybody else gets."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.index import manifest_hash, read_manifest
from data.records import dump_json
from data.shards import Record
from data.sources.convert import converted
from data.sources.expected import MANIFESTS, PROBES

Records = Callable[[], Iterable[Record]]


def generated(
    cache: Path, name: str, options: Sequence[Any], splits: Mapping[str, Records], probe: tuple[str, Records]
) -> dict[str, Path]:
    """Split -> folder, made in `cache` at first use, found again by `options` (the version included).

    probe: name and records of a small fixed sample. It is drawn first where the repository does not
    know the manifest hashes of these options. Raises ValueError if anything is drawn differently from
    what `data.sources.expected` says.
    """
    folder = cache / f"{name}-{hashlib.sha256(dump_json(options)).hexdigest()[:12]}"
    known = MANIFESTS.get(folder.name)
    if known is None and not all((folder / split).exists() for split in splits):
        _check(f"the sample {probe[0]!r}", name, digest(probe[1]()), PROBES[probe[0]])
    about = {"source": name, "options": list(options), "licence": "generated"}
    made = {split: converted(folder / split, partial(_call, of), about) for split, of in splits.items()}
    if known is not None:
        for split, path in made.items():
            _check(f"split {split!r} in {path}", name, manifest_hash(read_manifest(path)), known[split])
    return made


def _call(records: Records) -> Iterable[Record]:
    return records()


def digest(records: Iterable[Record]) -> str:
    """SHA-256 over all texts and pictures of records."""
    total = hashlib.sha256()
    for meta, image in records:
        for part in (dump_json(meta), image or b""):
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def _check(what: str, name: str, found: str, expected: str) -> None:
    if found == expected:
        return
    raise ValueError(
        f"data={name}: {what} has hash {found[:16]}, expected is {expected[:16]}: the generator or a library "
        f"({_versions()}) draws differently, so results would not compare with other people's. Install "
        f"other versions and delete the folder; who changed the generator raises its version and writes "
        f"the new hashes to data/sources/expected.py (full hash: {found})"
    )


def _versions() -> str:
    found = []
    for package in ("numpy", "mlxtend", "safetensors"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)
