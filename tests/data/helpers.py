"""Small pictures, records and stand-ins for prompt and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from data.records import IMAGE_TAG
from data.shards import Record, write_shards
from toolkit.contracts import ImageSlot, Segment, Text, Turn


def picture(number: int, *, kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    """A picture whose pixels depend on its number."""
    data = bytes((number * 37 + i * 11) % 256 for i in range(size[0] * size[1] * 3))
    out = BytesIO()
    Image.frombytes("RGB", size, data).save(out, kind)
    return out.getvalue()


def conversation(question: str, answer: str, *, image: bool = True) -> list[dict[str, str]]:
    human = f"{IMAGE_TAG}\n{question}" if image else question
    return [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]


def mixed_records(n: int) -> Iterator[Record]:
    """n records: one dialog, several dialogs and text only in turn; PNG, JPEG and WebP pictures."""
    for i in range(n):
        if i % 3 == 2:
            yield {"id": f"t{i}", "conversations": conversation(f"q{i}", f"a{i}", image=False)}, None
        elif i % 3 == 1:
            dialogs = [
                {"type": f"type{d}", "conversations": conversation(f"q{i} {d}", f"a{d}")}
                for d in range(i % 4 + 1)
            ]
            yield (
                {"id": f"d{i}", "source": "made", "dialogs": dialogs},
                picture(i, kind="JPEG" if i % 2 else "WEBP"),
            )
        else:
            yield {"id": f"p{i}", "conversations": conversation(f"q{i}", f"a{i}")}, picture(i)


def shard_folder(out: Path, n: int = 12, *, shard_bytes: int = 1 << 13) -> Path:
    return write_shards(mixed_records(n), out, shard_bytes=shard_bytes, about={"source": "test"})


def plain_prompt(turns: Sequence[Turn]) -> list[Segment]:
    """The image first, then every turn on its own; only answers are learned."""
    image: list[Segment] = [ImageSlot()] if any(IMAGE_TAG in turn.text for turn in turns) else []
    texts = [Text(turn.text.replace(IMAGE_TAG, "").strip() + "\n", loss=turn.role == "gpt") for turn in turns]
    return [*image, *texts]


class Letters:
    """One id per character: its code point."""

    size = 512
    end_id = 10
    pad_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)


def mean_color(image: Any) -> Any:
    """A deterministic transform: [3, 2, 2] floats."""
    import torch

    pixels = torch.tensor(list(image.resize((2, 2)).tobytes()), dtype=torch.float32)
    return pixels.view(2, 2, 3).permute(2, 0, 1) / 255
