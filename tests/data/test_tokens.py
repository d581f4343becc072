"""World and compact vocabularies, segments to samples, trimming of answers."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.tokens import (
    ROLE_TEXTS,
    CompactTokenizer,
    Encoded,
    Tokenizer,
    WorldTokenizer,
    encode_segments,
    trim_answer,
)
from toolkit.contracts import END_ID, IGNORE, NO_IMAGE, PAD_ID, ImageSlot, Text

WORLD = WorldTokenizer()
TEXTS = ["User: red circle\n\n", " yes\n\n", "Größe 两只猫 🦜\n"]


@pytest.fixture(scope="module")
def original() -> Any:
    """The trie of the `rwkv` package over the same vocabulary."""
    rwkv = pytest.importorskip("rwkv")
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt"))


def random_text(rng: random.Random, pieces: list[str]) -> str:
    n = rng.randrange(40)
    kind = rng.randrange(3)
    if kind == 0:
        return "".join(rng.choice(pieces) for _ in range(n))
    if kind == 1:
        return "".join(chr(rng.randrange(0x250)) for _ in range(n))
    codes = [rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(n)]
    return "".join(map(chr, codes))


def test_random_unicode_has_the_ids_of_the_original(original: Any) -> None:
    rng = random.Random(0)
    pieces = [t.decode("utf-8", "ignore") for t in original.idx2token.values()]
    for _ in range(1500):
        text = random_text(rng, pieces)
        ids = WORLD.encode(text)
        assert ids == original.encode(text)
        assert WORLD.decode(ids) == text


def test_every_token_decodes_to_the_bytes_of_the_original(original: Any) -> None:
    for i, token in original.idx2token.items():
        assert WORLD.decode([i]) == token.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("\n", [11]),
        ("\n\n", [END_ID]),
        ("\x00", [1]),
        ("User: ", [24281, 59, 33]),
        ("Assistant: yes\n\n", [5585, 41693, 59, 22796, END_ID]),
        ("。\n", [28329]),
        ("<image>", [61, 34733, 63]),
    ],
)
def test_known_ids(text: str, ids: list[int]) -> None:
    assert WORLD.encode(text) == ids
    assert WORLD.decode(ids) == text


@pytest.mark.parametrize("text", ["a" * 1_000_000, "\r\n\t \x7f\x85\u2028", "trailing\n\n\n", " \n" * 5000])
def test_no_byte_is_lost(text: str) -> None:
    assert WORLD.decode(WORLD.encode(text)) == text


def test_encode_returns_a_list_of_its_own() -> None:
    WORLD.encode("yes").append(7)
    assert 7 not in WORLD.encode("yes")


def test_a_bad_token_spoils_only_itself() -> None:
    hi = WORLD.encode(" hi")
    assert WORLD.decode([*hi, PAD_ID, *hi]) == " hi hi"
    assert WORLD.decode([*hi, 65535, 70000, -1, *hi]) == " hi\ufffd\ufffd\ufffd hi"
    assert WORLD.decode([*hi, 0xE4 + 1, *hi]) == " hi\ufffd hi"


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'ab\\ud83d' holds half a surrogate pair at position 2"):
        WORLD.encode("ab\ud83d")


def test_no_token_spans_the_colon_and_the_space_of_a_role() -> None:
    """What lets prompts end the given text after `Assistant:`."""
    spans = tuple("Assistant: "[first:] for first in range(len("Assistant:")))
    assert not [i for i in range(1, 65530) if WORLD.decode([i]).startswith(spans)]


def test_import_is_cheap_and_loads_no_vocabulary() -> None:
    code = "import sys, data.tokens; print(sorted({'torch', 'numpy', 'pyrwkv_tokenizer'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_compact_ids_are_consecutive_and_say_the_same() -> None:
    compact = CompactTokenizer.collect(TEXTS, WORLD)
    used = {i for text in TEXTS for i in compact.encode(text)}
    assert max(used) < compact.size < 60
    for text in (*TEXTS, *ROLE_TEXTS):
        assert compact.decode(compact.encode(text)) == text
        assert [compact.world_ids[i] for i in compact.encode(text)] == WORLD.encode(text)
    assert compact.pad_id == PAD_ID == compact.world_ids[0]
    assert compact.world_ids[compact.end_id] == END_ID
    assert compact.decode([compact.pad_id, *compact.encode(" yes"), compact.size, -1]) == " yes\ufffd\ufffd"


def test_compact_ids_do_not_depend_on_the_order_of_texts() -> None:
    there, back = (CompactTokenizer.collect(texts, WORLD) for texts in (TEXTS, TEXTS[::-1]))
    assert there.world_ids == back.world_ids


def test_compact_refuses_what_the_data_set_does_not_hold() -> None:
    compact = CompactTokenizer.collect(TEXTS, WORLD)
    with pytest.raises(ValueError, match=r"' green' of text 'User: green\\n\\n' .* model\.vocab=world"):
        compact.encode("User: green\n\n")


def test_compact_survives_saving_and_pickling(tmp_path: Path) -> None:
    compact = CompactTokenizer.collect(TEXTS, WORLD)
    path = tmp_path / "run" / "vocab.json"
    compact.save(path)
    compact.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["vocab.json"]
    for other in (CompactTokenizer.load(path), pickle.loads(pickle.dumps(compact))):
        assert other.world_ids == compact.world_ids
        assert other.encode(TEXTS[0]) == compact.encode(TEXTS[0])


@pytest.mark.parametrize(
    "stored",
    [
        "{",
        "[]",
        '{"vocabulary": "rwkv_vocab_v20230424"}',
        json.dumps({"vocabulary": "other", "world_ids": [0, 261]}),
        json.dumps({"vocabulary": "rwkv_vocab_v20230424", "world_ids": []}),
        json.dumps({"vocabulary": "rwkv_vocab_v20230424", "world_ids": [0, 300, 261]}),
        json.dumps({"vocabulary": "rwkv_vocab_v20230424", "world_ids": [0, 261, 65536]}),
        json.dumps({"vocabulary": "rwkv_vocab_v20230424", "world_ids": [-5, 0, 261]}),
    ],
)
def test_compact_load_names_a_damaged_file(tmp_path: Path, stored: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(stored)
    with pytest.raises(ValueError, match=r"vocab\.json: "):
        CompactTokenizer.load(path)


@pytest.mark.parametrize("tokenizer", [WORLD, CompactTokenizer.collect(TEXTS, WORLD)])
def test_segments_become_one_sample(tokenizer: Tokenizer) -> None:
    ask, answer = tokenizer.encode("User: "), tokenizer.encode(" yes\n\n")
    sample = encode_segments([Text("User: "), ImageSlot(), Text(" yes\n\n", loss=True)], tokenizer, 4)
    assert sample == Encoded(
        ids=[*ask, PAD_ID, PAD_ID, PAD_ID, PAD_ID, *answer],
        labels=[IGNORE] * (len(ask) + 4) + answer,
        image_start=len(ask),
    )


def test_each_text_is_tokenised_on_its_own() -> None:
    sample = encode_segments([Text("\n"), Text("\n")], WORLD, 4)
    assert sample == Encoded([11, 11], [IGNORE, IGNORE], NO_IMAGE)


def test_a_second_image_is_refused() -> None:
    with pytest.raises(ValueError, match="two image slots"):
        encode_segments([ImageSlot(), Text("a"), ImageSlot()], WORLD, 1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" yes\n\nUser: more", "yes"), ("two\nlines\n", "two\nlines"), ("\n\nlate", ""), ("", "")],
)
def test_answer_ends_at_the_first_blank_line(text: str, answer: str) -> None:
    assert trim_answer(text) == answer
