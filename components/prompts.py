"""Prompt layouts: where the image stands among the texts of a conversation.

A layout is a list of segments, pure strings: no tokenizer, no tensor. All share the frame

    User: <human turn>⏎⏎Assistant: <answer>⏎⏎ ...

without a first token, and differ in what replaces the human turn that holds `<image>`. With q its
text without the tag:

    prefix      ⟨image⟩⏎q            the image reads nothing of the question
    suffix      q⏎⟨image⟩            the image reads the question, the answer is next to the image
    sandwich    A⏎⟨image⟩⏎q          A: what is asked, before the image as well

Source: VisualRWKV, tables 3 and 9; white space as in its code, version 6.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from toolkit import register
from toolkit.contracts import ImageSlot, Segment, Text, Turn

IMAGE_TAG = "<image>"
"""Marks the image in a human turn of LLaVA data."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""Sentence that benchmark prompts end with; the paper's sandwich repeats the question without it."""

Around = Callable[[str], tuple[str, str]]
"""Text q of the image turn -> (text before the image, text after it)."""


@register.prompt("prefix")
def prefix(turns: Sequence[Turn]) -> list[Segment]:
    """Image first, then the question."""
    return _arrange(turns, lambda q: ("", f"\n{q}"))


@register.prompt("suffix")
def suffix(turns: Sequence[Turn]) -> list[Segment]:
    """Question first, then the image."""
    return _arrange(turns, lambda q: (f"{q}\n", ""))


@register.prompt("sandwich")
def sandwich(turns: Sequence[Turn], *, form: Literal["v6", "v5"] = "v6") -> list[Segment]:
    """Question, image, question again.

    form v6 (the paper's model): before the image stand all human turns of the conversation, joined
    by newlines, the image turn's without the sentence that asks for a short answer. form v5 (the
    paper's prompt study): the image turn stands on both sides, unchanged.
    """
    if form == "v5":
        return _arrange(turns, lambda q: (f"{q}\n", f"\n{q}"))
    asked = "\n".join(_asked(turn.text) for turn in turns if turn.role == "human")
    return _arrange(turns, lambda q: (f"{asked}\n", f"\n{q}"))


def _asked(text: str) -> str:
    """A human turn as the v6 sandwich repeats it; blank lines stay in turns without the tag."""
    if IMAGE_TAG not in text:
        return text.strip()
    return _collapse(text.replace(IMAGE_TAG, "").strip().replace(SHORT_ANSWER, "").strip())


def _collapse(text: str) -> str:
    """Blank lines, also of white space only, fall away: two newlines end a turn."""
    return re.sub(r"\n(\s*\n)+", "\n", text.strip())


def _arrange(turns: Sequence[Turn], around: Around) -> list[Segment]:
    """The frame all layouts share. Raises ValueError for a conversation that has no form."""
    _check(turns)
    segments: list[Segment] = []
    for turn in turns:
        text = _collapse(turn.text.replace(IMAGE_TAG, ""))
        if turn.role == "gpt":
            segments += _answer(text)
        elif IMAGE_TAG in turn.text:
            before, after = around(text)
            # The original strips the turn with the tag in place, so only at its outer ends.
            segments += [Text(f"User: {before.lstrip()}"), ImageSlot(), Text(f"{after.rstrip()}\n\n")]
        else:
            segments.append(Text(f"User: {text}\n\n" if text else "User:"))
    if turns[-1].role == "human":
        segments += _answer("")
    return segments


def _answer(text: str) -> list[Segment]:
    """`Assistant:` is given, the rest is learned; an empty answer is one to be generated.

    Splitting there changes no id: no token of the world vocabulary begins with a colon and a space.

    Paper: the v5 code places this mask wrongly from the second round on and learns `Assistant:`
    too; the mask here is that of the v6 code for every layout.
    """
    given: list[Segment] = [Text("Assistant:")]
    return [*given, Text(f" {text}\n\n", loss=True)] if text else given


def _check(turns: Sequence[Turn]) -> None:
    if not turns:
        raise ValueError("a conversation without turns; give at least one human turn")
    for number, turn in enumerate(turns, 1):
        if turn.role not in ("human", "gpt"):
            raise ValueError(f"turn {number} has the role {turn.role!r}; write human or gpt")
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
    if tags > 1:
        raise ValueError(f"{tags} times {IMAGE_TAG} in one conversation; keep one, a sample takes one image")
