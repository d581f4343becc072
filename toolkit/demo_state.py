"""What the web page knows and does: the model's facts, and conversations that keep their states."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.contracts import ImageSlot, Segment
from toolkit.conversation import Conversation
from toolkit.sampling import Sampling
from toolkit.session import Answerer, opened
from toolkit.trunk import ScanSteps

KEPT = 32
"""Conversations that are kept; the one that was not asked for longest is dropped for a new one."""

EXAMPLE = "What is in the picture?"


@dataclass
class Talk:
    """A conversation of the page. stop: set to end the answer that is being written."""

    conversation: Conversation
    stop: threading.Event = field(default_factory=threading.Event)
    busy: threading.Lock = field(default_factory=threading.Lock)


class Desk:
    """One model and the conversations of all pages that ask it. Its methods may be called from any thread.

    The model writes one token at a time; conversations that are asked at once take turns between pieces.
    """

    def __init__(self, model: Answerer) -> None:
        self.model = model
        self._turn = threading.Lock()  # of the model
        self._book = threading.Lock()  # of `_talks`
        self._talks: OrderedDict[str, Talk] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """What the page shows of the model, as JSON."""
        model = self.model
        return {
            "name": model.name,
            "device": str(model.device),
            "precision": model.precision,
            "parameters": sum(p.numel() for p in (model.vision or model.rwkv).parameters()),
            "scan": None if model.vision is None else scan_facts(model),
            "layout": model.layout,
            "options": dataclasses.asdict(Sampling()),
        }

    def begin(self, image: bytes) -> str:
        """The name of a new conversation about an encoded picture, or about none for b"". ValueError."""
        if image and self.model.vision is None:
            raise ValueError(f"{self.model.name} has no vision parts; ask it without an image")
        picture = opened(image) if image else None
        name = secrets.token_urlsafe(12)
        with self._book:
            self._talks[name] = Talk(self.model.chat(picture))
            while len(self._talks) > KEPT:
                self._talks.popitem(last=False)[1].stop.set()
        return name

    def stop(self, name: str) -> None:
        """Ends the answer that is being written, if one is."""
        self._talk(name).stop.set()

    def close(self) -> None:
        """Ends all answers for good, once the token that is being written is done.

        A thread inside torch while Python ends would abort the process: the others wait from now on.
        """
        self._turn.acquire()

    def ask(self, name: str, question: str, options: Sampling) -> Iterator[dict[str, Any]]:
        """Events of one answer: `read` (what the model was given), `text` pieces, `done` with its numbers.

        Raises ValueError, before the first event, for what cannot be asked.
        """
        talk = self._talk(name)
        if not talk.busy.acquire(blocking=False):
            raise ValueError("this conversation is still answering; stop it first")
        try:
            talk.stop.clear()
            began = time.monotonic()
            first = talk.conversation.state is None
            with self._turn:
                pieces = talk.conversation.stream(question, options)
            read = self._segments(talk.conversation, question, first=first)
        except BaseException:
            talk.busy.release()
            raise
        events = self._events(talk, pieces, {"read": read, "prefill": time.monotonic() - began})
        next(events)  # begun: closing it now gives the conversation back
        return events

    def _events(self, talk: Talk, pieces: Iterator[str], opening: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            began = time.monotonic()
            yield {}
            yield opening
            while not talk.stop.is_set():
                with self._turn:
                    piece = next(pieces, None)
                if piece is None:
                    break
                yield {"text": piece}
            seconds = time.monotonic() - began
            yield {"done": True, "tokens": talk.conversation.written, "seconds": seconds}
        finally:
            with self._turn:
                pieces.close()  # type: ignore[attr-defined]
            talk.busy.release()

    def _segments(self, conversation: Conversation, question: str, *, first: bool) -> list[dict[str, Any]]:
        image = first and conversation.image is not None
        return shown(self.model.first_turn(question, image=image))

    def _talk(self, name: str) -> Talk:
        with self._book:
            if name not in self._talks:
                raise ValueError("this conversation is no longer kept; begin a new one")
            self._talks.move_to_end(name)
            return self._talks[name]


def shown(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Segments of a prompt as JSON: {"text": ...} or {"image": true}, neighbouring texts joined."""
    made: list[dict[str, Any]] = []
    for segment in segments:
        if isinstance(segment, ImageSlot):
            made.append({"image": True})
        elif made and "text" in made[-1]:
            made[-1]["text"] += segment.text
        else:
            made.append({"text": segment.text})
    return made


def scan_facts(model: Answerer) -> dict[str, Any]:
    """The scan as JSON: grid, extra vectors, fit of the picture, and each distinct order with its layers."""
    assert model.vision is not None
    height, width = model.vision.proj.grid
    layers: dict[tuple[int, ...], list[int]] = {}
    for layer, order in enumerate(orders(model.vision.scan)):
        layers.setdefault(order, []).append(layer)
    transform = model.vision.encoder.transform()
    return {
        "name": model.scan,
        "grid": [height, width],
        "extra": model.vision.encoder.n_extra,
        "extra_first": model.vision.extra_first,
        "fit": getattr(transform, "fit", "stretch"),
        "orders": [{"order": order, "layers": which} for order, which in layers.items()],
        "layout": shown(model.first_turn(EXAMPLE, image=True)),
    }


def orders(steps: ScanSteps) -> list[tuple[int, ...]]:
    """Per layer the patch indices in reading order, from the steps between layers."""
    current = list(range(steps.n_patches))
    found = []
    for use in steps.use[:-1]:
        if use is not None:
            current = [current[i] for i in steps.steps[use].tolist()]
        found.append(tuple(current))
    return found
