"""Streamed text: joined, it is the finished answer; nothing of it is ever taken back."""

from __future__ import annotations

import random

import pytest

from data.tokens import CompactTokenizer, WorldTokenizer, trim_answer
from toolkit.continuation import until
from toolkit.contracts import END_ID
from toolkit.stream import TextStream, ends

WORLD = WorldTokenizer()
STOP_NEWLINE, NEWLINE = 28329, 11  # a Chinese full stop and a newline in one token; a newline


def streamed(tokenizer: WorldTokenizer | CompactTokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    pieces = []
    for token in ids:
        pieces.append(stream.feed(token))
        if stream.ended:
            break
    return [*pieces, stream.close()]


@pytest.mark.parametrize("seed", range(200))
def test_the_pieces_are_the_answer(seed: int) -> None:
    """Random ids with much white space, single bytes of characters, padding and ids without an entry."""
    rng = random.Random(seed)
    odd = [NEWLINE, 33, 10, 3336, 0xE4 + 1, 0xBD + 1, 0xA0 + 1, 0, 65535, STOP_NEWLINE, 28331]
    ids = [rng.choice(odd) if rng.random() < 0.5 else rng.randrange(1, 65530) for _ in range(12)]
    if rng.random() < 0.5:
        ids.append(END_ID)
    assert "".join(streamed(WORLD, ids)) == trim_answer(WORLD.decode(until(ids, END_ID)))


def test_a_character_in_several_tokens_is_held_until_it_is_whole() -> None:
    ids = [byte + 1 for byte in "é你🙂".encode()]
    assert streamed(WORLD, ids) == ["", "é", "", "", "你", "", "", "", "🙂", ""]
    assert "".join(streamed(WORLD, ids[:-1])) == "é你\ufffd"


def test_white_space_is_held_until_it_is_inside_the_answer() -> None:
    assert streamed(WORLD, [*WORLD.encode(" yes"), NEWLINE, *WORLD.encode("no"), 33]) == [
        "yes", "", "\nno", "", ""
    ]  # fmt: skip


def test_a_full_stop_and_a_newline_in_one_token_end_the_answer_though_261_never_comes() -> None:
    ids = WORLD.encode(" 你好。\n\n")
    assert ids[-2:] == [STOP_NEWLINE, NEWLINE] and END_ID not in ids
    stream = TextStream(WORLD)
    text = "".join(stream.feed(token) for token in ids)
    assert text == "你好。" and stream.ended and ends(WORLD, ids) and not ends(WORLD, ids[:-1])


def test_the_end_token_of_a_compact_vocabulary_ends_too() -> None:
    compact = CompactTokenizer.collect([" yes\n\n"], WORLD)
    stream = TextStream(compact)
    assert "".join(stream.feed(i) for i in compact.encode(" yes\n\n")) == "yes" and stream.ended
    assert ends(compact, compact.encode(" yes\n\n")) and stream.feed(3) == ""
