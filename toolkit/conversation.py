"""A conversation with a model, kept in its recurrent state."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.records import IMAGE_TAG
from data.tokens import encode_segments
from toolkit.continuation import Writer
from toolkit.contracts import ImageSlot, Segment, Turn
from toolkit.memory import save_conversation
from toolkit.sampling import Picker, Sampling
from toolkit.stream import TextStream
from toolkit.trunk import State

if TYPE_CHECKING:
    from toolkit.session import Answerer, Picture

GREEDY = Sampling()


class Conversation:
    """Turns about one image, or about none. The state holds all of them: asking again costs the new text.

    state: after everything read, None before the first turn. unread: ids written since. looked: whether
    the image was read without a question. resumed: whether it comes from a file, which holds no image.
    written: tokens of the last answer, counted as they come.
    """

    def __init__(self, model: Answerer, image: Picture | None = None) -> None:
        self.model, self.image = model, image
        self.turns: list[Turn] = []
        self.state: State | None = None
        self.unread: list[int] = []
        self.looked = False
        self.resumed = False
        self.written = 0
        self._writing: Generator[str, None, None] | None = None

    def fork(self) -> Conversation:
        """The same conversation again, to be continued in another way."""
        other = Conversation(self.model, self.image)
        other.turns, other.unread = list(self.turns), list(self.unread)
        other.state, other.looked = self.state, self.looked  # a state is never changed in place
        other.resumed = self.resumed
        return other

    def save(self, path: str | Path) -> None:
        """Writes turns and state to a safetensors file, for `Answerer.resume` of the same model."""
        save_conversation(self, Path(path))

    def ask(self, question: str, options: Sampling = GREEDY) -> str:
        """The answer, which becomes part of the conversation."""
        return "".join(self.stream(question, options))

    def stream(self, question: str, options: Sampling = GREEDY) -> Iterator[str]:
        """The answer in pieces. The question is read at once; closing the iterator, or asking again, ends
        the answer early."""
        if self._writing is not None:
            self._writing.close()
        with torch.inference_mode(), self.model.cast():
            logits, self.state = self._read(question)
        self.turns += [Turn("human", question), Turn("gpt", "")]
        self.unread = [self.model.words.end_id]
        self._writing = self._write(logits, self.state, options)
        return self._writing

    def _read(self, question: str) -> tuple[Tensor, State]:
        model = self.model
        if self.state is None:
            first = model.first_turn(question, image=self.image is not None)
            return model.read_first([first], [(self.image, question)])
        if self.turns:
            if IMAGE_TAG in question and self.image is not None:
                raise ValueError(
                    f"the question holds {IMAGE_TAG}, and a conversation has one image, which stands in its "
                    f"first question; take {IMAGE_TAG} out, or begin anew with the other image"
                )
            segments = model.first_turn(question, image=False)
        else:  # the image was read before; what follows it is left
            segments = after_image(model.first_turn(question, image=True))
        return model.read_on(self.state, self.unread + encode_segments(segments, model.words, 0).ids)

    def _write(self, logits: Tensor, state: State, options: Sampling) -> Generator[str, None, None]:
        tokenizer = self.model.words
        text = TextStream(tokenizer)
        said: list[str] = []
        ids: list[int] = []
        try:
            with torch.inference_mode(), self.model.cast():
                writer = Writer(self.model.rwkv, logits, state, Picker(options), owner=self.model)
            with writer:
                try:
                    while True:
                        ids.append(int(writer.token))
                        self.written = len(ids)
                        said.append(text.feed(ids[-1]))
                        if said[-1]:
                            yield said[-1]
                        if text.ended or len(ids) == options.max_new_tokens:
                            break
                        with torch.inference_mode(), self.model.cast():
                            writer.step()
                finally:
                    with torch.inference_mode():
                        self.state = writer.state()
            said.append(text.close())
            if said[-1]:
                yield said[-1]
        finally:
            self.unread = [*ids[-1:], *([] if text.ended else [tokenizer.end_id])]
            self.turns[-1] = Turn("gpt", "".join(said))


def after_image(segments: list[Segment]) -> list[Segment]:
    """The segments that follow the image."""
    return segments[1 + next(i for i, s in enumerate(segments) if isinstance(s, ImageSlot)) :]
