"""Layouts as strings, and ids and labels of the original's text pipeline for 360 conversations."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.prompts import SHORT_ANSWER, prefix, sandwich, suffix
from data.tokens import WorldTokenizer, encode_segments
from toolkit import register
from toolkit.contracts import IGNORE, NO_IMAGE, ImageSlot, Segment, Text, Turn

GOLDEN = Path(__file__).parent / "golden" / "conversations_v6.jsonl.gz"
LAYOUT = {"first": prefix, "middle": sandwich, "last": suffix}
BOUND = [{"name": "sandwich", "form": "v5"}, *({"name": name} for name in register.components("prompt"))]
ASK = [Turn("human", f"<image>\nWhich colour?\n\n{SHORT_ANSWER}"), Turn("gpt", "red")]
SYSTEM = Turn("system", "b")  # type: ignore[arg-type]
ROUNDS = [*ASK, Turn("human", " And\n\nthe size? "), Turn("gpt", "large")]


def shown(segments: list[Segment]) -> str:
    """Learned text in brackets, the image as its tag."""
    parts = []
    for segment in segments:
        text = "<image>" if isinstance(segment, ImageSlot) else segment.text
        parts.append(f"[{text}]" if isinstance(segment, Text) and segment.loss else text)
    return "".join(parts)


def golden() -> list[dict[str, Any]]:
    with gzip.open(GOLDEN, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_ids_and_labels_of_the_original() -> None:
    """All 360, the image as its single id -200; cut and padded to 96 likewise."""
    rows = golden()
    assert len(rows) == 360
    for row in rows:
        turns = [Turn(turn["from"], turn["value"]) for turn in row["conversations"]]
        segments = LAYOUT[row["image_position"]](turns)
        assert shown(segments).replace("[", "").replace("]", "") == row["text"]
        sample = encode_segments(segments, WorldTokenizer(), 1)
        ids, labels = list(sample.ids), list(sample.labels)
        if sample.image_start != NO_IMAGE:
            ids[sample.image_start] = -200
        assert (ids, labels) == (row["input_ids"], row["labels"])
        pad = 96 - len(ids)
        assert ids[:96] + [0] * pad == row["padded_96_input_ids"]
        assert labels[:96] + [IGNORE] * pad == row["padded_96_labels"]


@pytest.mark.parametrize("node", BOUND, ids=str)
@pytest.mark.parametrize("turns", [ASK, ROUNDS, ROUNDS[:3], ROUNDS[2:], [ASK[0]], [ASK[0], Turn("gpt", "")]])
def test_image_once_and_loss_only_on_answers(node: dict[str, str], turns: list[Turn]) -> None:
    segments = register.bind("prompt", node)(turns)
    images = sum(isinstance(segment, ImageSlot) for segment in segments)
    assert images == any("<image>" in turn.text for turn in turns)
    learned = [segment.text for segment in segments if isinstance(segment, Text) and segment.loss]
    assert learned == [f" {turn.text}\n\n" for turn in turns if turn.role == "gpt" and turn.text]
    asks = turns[-1].role == "human" or not turns[-1].text
    assert (segments[-1] == Text("Assistant:")) == asks
    assert "<image>" not in "".join(segment.text for segment in segments if isinstance(segment, Text))


def test_layouts_of_one_question() -> None:
    q = f"Which colour?\n{SHORT_ANSWER}"
    rest = "\n\nAssistant:[ red\n\n]"
    assert shown(prefix(ASK)) == f"User: <image>\n{q}{rest}"
    assert shown(suffix(ASK)) == f"User: {q}\n<image>{rest}"
    assert shown(sandwich(ASK)) == f"User: Which colour?\n<image>\n{q}{rest}"
    assert shown(sandwich(ASK, form="v5")) == f"User: {q}\n<image>\n{q}{rest}"


def test_v6_sandwich_asks_all_questions_first_and_keeps_their_blank_lines() -> None:
    assert shown(sandwich(ROUNDS)) == (
        "User: Which colour?\nAnd\n\nthe size?\n<image>\n"
        f"Which colour?\n{SHORT_ANSWER}\n\nAssistant:[ red\n\n]"
        "User: And\nthe size?\n\nAssistant:[ large\n\n]"
    )


def test_v6_sandwich_keeps_the_short_answer_sentence_of_other_turns() -> None:
    turns = [Turn("human", "<image>\nWhat?"), Turn("gpt", "x"), Turn("human", f"Why? {SHORT_ANSWER}")]
    assert shown(sandwich(turns)).startswith(f"User: What?\nWhy? {SHORT_ANSWER}\n<image>\nWhat?\n\n")


@pytest.mark.parametrize("layout", [prefix, suffix, sandwich])
def test_image_without_a_question(layout: Callable[..., list[Segment]]) -> None:
    assert shown(layout([Turn("human", " <image>\n")])) == "User: <image>\n\nAssistant:"


@pytest.mark.parametrize("node", BOUND, ids=str)
def test_tag_in_an_answer_is_deleted_and_later_turns_may_hold_the_image(node: dict[str, str]) -> None:
    turns = [Turn("human", "Hi"), Turn("gpt", "<image> ok"), Turn("human", "<image>")]
    text = shown(register.bind("prompt", node)(turns))
    assert text.startswith("User: Hi\n\nAssistant:[ ok\n\n]User: ")
    assert text.count("<image>") == 1


def test_empty_turns_are_a_role_alone() -> None:
    turns = [Turn("human", " \n"), Turn("gpt", "\n"), Turn("human", "b")]
    assert shown(prefix(turns)) == "User:Assistant:User: b\n\nAssistant:"


@pytest.mark.parametrize("node", BOUND, ids=str)
@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "without turns"),
        ([Turn("human", "a <image> <image>")], "2 times <image>"),
        ([Turn("human", "<image>"), Turn("gpt", "a"), Turn("human", "<image>")], "2 times <image>"),
        ([Turn("human", "a"), SYSTEM], "turn 2 has the role 'system'; write human or gpt"),
    ],
)
def test_malformed_conversations_are_refused(node: dict[str, str], turns: list[Turn], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register.bind("prompt", node)(turns)
