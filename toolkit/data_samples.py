"""Samples as the model reads them: the rendered prompt and how many positions it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data.images import decode
from data.index import FEATURE_KIND
from data.reader import ShardReader
from data.records import Example
from data.tokens import WorldTokenizer
from toolkit import register
from toolkit.contracts import ImageSlot, Prompt, Text

_SHORT = 2000
"""Characters of a rendered prompt that are printed."""


@dataclass(frozen=True)
class Rendering:
    """How a recipe lays out a sample. n_image: positions of the image, 0 where `why` says it is unknown."""

    prompt: Prompt
    name: str
    n_image: int
    ctx_len: int
    why: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Rendering:
        """The rendering of a composed recipe; the model is built without memory."""
        from toolkit.build import build_model, from_dict, on_meta

        conf = from_dict(config)
        prompt = register.bind("prompt", conf.prompt)
        n_image, why = 0, ""
        try:
            with on_meta():
                n_image = build_model(conf, vocab_size=1).n_image
        except ValueError as error:
            why = f"image positions unknown: {error}"
        return cls(prompt, str(conf.prompt["name"]), n_image, conf.model.ctx_len, why)

    def text(self, example: Example) -> str:
        """The prompt with the image as `⟨image⟩` and what is learned in `[[...]]`."""
        return "".join(self._pieces(example))

    def _pieces(self, example: Example) -> Iterator[str]:
        for segment in self.prompt(example.turns):
            if isinstance(segment, Text):
                yield f"[[{segment.text}]]" if segment.loss else segment.text
            else:
                yield "⟨image⟩"

    def count(self, example: Example) -> str:
        """`31 text + 16 image = 47 of 256 positions, 4 learned`, in tokens of the world vocabulary."""
        world = WorldTokenizer()
        segments = self.prompt(example.turns)
        texts = [(len(world.encode(s.text)), s.loss) for s in segments if isinstance(s, Text)]
        words, learned = sum(n for n, _ in texts), sum(n for n, loss in texts if loss)
        slots = sum(isinstance(s, ImageSlot) for s in segments)
        if slots and not self.n_image:
            return f"{words} text + the image's positions, {learned} learned"
        total = words + slots * self.n_image
        over = " (too long)" if total > self.ctx_len else ""
        image = f" + {self.n_image} image" if slots else ""
        return f"{words} text{image} = {total} of {self.ctx_len:,} positions{over}, {learned} learned"


def show(split: str, reader: ShardReader, rendering: Rendering, n: int) -> None:
    """Prints the first n samples of a split."""
    if rendering.why and n:
        print(f"  {rendering.why}")
    for j in range(min(n, len(reader.examples.record))):
        example = reader.example(j)
        kind = f", type {example.kind}" if example.kind else ""
        print(f"  {split} sample {example.key}{kind}, {pictures(reader, example.record)}")
        print(f"    prompt={rendering.name}: {described(rendering, example)}")


def described(rendering: Rendering, example: Example) -> str:
    """Counts and rendered prompt on two lines, or why the prompt cannot be rendered."""
    try:
        shown = repr(rendering.text(example))[1:-1]
        count = rendering.count(example)
    except ValueError as error:
        return str(error)
    return f"{count}\n    {shown if len(shown) <= _SHORT else shown[:_SHORT] + ' ...'}"


def pictures(reader: ShardReader, record: int) -> str:
    """`jpg 336 x 336, 29,104 bytes` of each picture of a record."""
    found = []
    for kind, data in reader.images(record):
        size = (
            "features" if kind == FEATURE_KIND else "{} x {}".format(*decode(data, reader.key(record)).size)
        )
        found.append(f"{kind} {size}, {len(data):,} bytes")
    return "; ".join(found) or "no picture"
