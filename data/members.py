"""Which members of a tar make up a sample, and what is structurally wrong with the tar.

A sample is every member with the same name up to its extension: `dir/0001.jpg` and `dir/0001.json`; further
pictures of it are `dir/0001.1.jpg` and so on. webdataset cuts names at their first dot and takes only
neighbours together; here names may hold dots and a sample's members may lie apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data.faults import Fault
from data.tar import Damage, Member, scan

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("json", "txt")
MAX_FAULTS = 1_000
"""Faults after which a shard is given up: it is no data set, or an attack."""
GIVEN_UP = "too many faults; the rest is not looked at"


@dataclass
class Sample:
    """Members of one sample by their place in the shard; pictures in the order of their numbers."""

    key: str
    texts: dict[str, Member] = field(default_factory=dict)
    pictures: list[tuple[int, Member]] = field(default_factory=list)

    def first(self) -> int:
        """The lowest offset of a member."""
        return min(m.offset for m in (*self.texts.values(), *(m for _, m in self.pictures)))


def members(path: Path) -> tuple[list[Sample], list[Fault]]:
    """Samples of a tar in the order of their first member, and what is structurally wrong with it.

    Never raises for what is in the file; a file that cannot be opened is a fault of the whole shard.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        return [], [Fault(path.name, "", "", 0, f"cannot be read: {error.strerror}")]
    try:
        return _grouped(path.name, scan(handle, os.fstat(handle).st_size))
    finally:
        os.close(handle)


def _grouped(shard: str, found: Iterator[Member | Damage]) -> tuple[list[Sample], list[Fault]]:
    samples: dict[str, Sample] = {}
    pictures: list[tuple[str, Member]] = []
    faults: list[Fault] = []
    seen: set[str] = set()
    for item in found:
        stem, kind = split_name(item.name)
        if isinstance(item, Damage):
            faults.append(Fault(shard, stem, kind, item.offset, item.cause))
        elif item.name in seen:
            faults.append(Fault(shard, stem, kind, item.offset, "the name comes twice in the shard"))
        elif kind in TEXTS and stem in samples and kind in samples[stem].texts:
            faults.append(Fault(shard, stem, kind, item.offset, "a second text, its name in other case"))
        elif kind in TEXTS:
            samples.setdefault(stem, Sample(stem)).texts[kind] = item
        elif kind in PICTURES:
            pictures.append((stem, item))
        seen.add(item.name)
        if len(faults) >= MAX_FAULTS:
            faults.append(Fault(shard, "", "", item.offset, GIVEN_UP))
            break
    for stem, member in pictures:
        place = _place(stem, samples)
        if place is None:
            fault = Fault(shard, stem, split_name(member.name)[1], member.offset, "a picture without a text")
            faults.append(fault)
        else:
            samples[place[0]].pictures.append((place[1], member))
    for sample in samples.values():
        sample.pictures.sort(key=lambda numbered: numbered[0])
    return sorted(samples.values(), key=Sample.first), faults


def split_name(name: str) -> tuple[str, str]:
    """(`dir/a.b`, `jpg`) of `dir/a.b.jpg`: cut at the last dot, for keys may hold dots."""
    stem, dot, kind = name.rpartition(".")
    return (stem, kind.lower()) if dot and "/" not in kind else (name, "")


def named(name: str, key: str) -> bool:
    """Whether a member of this name can belong to the sample of this key."""
    stem = split_name(name)[0]
    return stem == key or bool(re.fullmatch(r"\.\d{1,4}", stem.removeprefix(key)))


def _place(stem: str, samples: Mapping[str, Sample]) -> tuple[str, int] | None:
    """(key, number) of the sample that a picture belongs to: `0001`, or `0001.2` of `0001`; None for none."""
    if stem in samples:
        return stem, 0
    numbered = re.fullmatch(r"(.+)\.(\d{1,4})", stem)
    return (numbered[1], int(numbered[2])) if numbered and numbered[1] in samples else None
