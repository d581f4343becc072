"""Text to token ids and back: the RWKV world vocabulary, its compact form, and segments to a sample.

Encoding is the package `pyrwkv-tokenizer`: its ids equal those of the original's trie on every text
tried (random Unicode, control characters, 3 MB in one piece). Decoding is done here, over the
vocabulary file that the package ships: the package's decode panics on ids without an entry and on
bytes that are no whole UTF-8, which generated ids may be, and its `get_vocab` lacks hundreds of tokens.

Source: `rwkv_vocab_v20230424`, ids 1..65529 ascending; byte b has id b+1; longest match first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

from toolkit.contracts import END_ID, IGNORE, NO_IMAGE, PAD_ID, ImageSlot, Segment

VOCABULARY = "rwkv_vocab_v20230424"

ROLE_TEXTS = ("User:", "User: ", "Assistant:", " ", "\n", "\n\n")
"""What every prompt may put around the turns; a compact vocabulary always holds their ids."""

_BAD_TOKEN = "\ufffd".encode()


class Tokenizer(Protocol):
    """Text <-> ids. `size` is the number of embedding rows; a turn ends with `end_id`."""

    @property
    def size(self) -> int: ...

    @property
    def end_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def raw(self, ids: Sequence[int]) -> bytes: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, path: Path) -> None: ...


@cache
def _encoder() -> Any:
    from pyrwkv_tokenizer import RWKVTokenizer

    return RWKVTokenizer()


@cache
def _entries() -> tuple[bytes, ...]:
    """Bytes of every world id; id 0 (padding, end of text) has none."""
    import ast
    from importlib import resources

    file = resources.files("pyrwkv_tokenizer") / f"{VOCABULARY}.txt"
    # Not splitlines(): literals may hold characters that it takes for line ends.
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line]
    literals = ",".join(line[line.index(" ") + 1 : line.rindex(" ")] for line in lines)
    tokens = ast.literal_eval(f"[{literals}]")
    return (b"", *(t.encode() if isinstance(t, str) else t for t in tokens))


@lru_cache(maxsize=1 << 14)
def _encode(text: str) -> tuple[int, ...]:
    """World ids of a text; cached, for the questions and answers of a data set repeat."""
    try:
        return tuple(_encoder().encode(text))
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {text[:60]!r} holds half a surrogate pair at position {error.start}, which is no "
            "character; repair the text in the data set"
        ) from error


class WorldTokenizer:
    """All 65,536 rows of the released checkpoints (65,529 tokens, padding, unused rows)."""

    size = 65536
    end_id = END_ID
    pad_id = PAD_ID

    def encode(self, text: str) -> list[int]:
        """World ids by longest match. Raises ValueError where `text` is not valid Unicode."""
        return list(_encode(text))

    def raw(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids`, perhaps no whole UTF-8; padding is empty, a bad id is U+FFFD."""
        entries = _entries()
        return b"".join(entries[i] if 0 <= i < len(entries) else _BAD_TOKEN for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; padding is empty, a bad id or broken UTF-8 becomes U+FFFD.

        Paper: the original returns one U+FFFD for the *whole* string as soon as one id has no entry
        or the bytes are no UTF-8, so a single generated id 0 destroys an answer.
        """
        return self.raw(ids).decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Writes the vocabulary's name as JSON."""
        _save(path, {"vocabulary": VOCABULARY})


class CompactTokenizer:
    """World ids that occur in a data set, renumbered 0..V-1 in ascending order.

    Tokenisation is that of the world vocabulary; only the numbers differ, so a tiny model needs no
    65,536 embedding rows. PAD_ID is 0 here too; END_ID and the ids of the roles are always in.
    """

    pad_id = PAD_ID

    def __init__(self, world_ids: Iterable[int]) -> None:
        self.world_ids = tuple(sorted({PAD_ID, END_ID, *world_ids}))
        self._row = {world: row for row, world in enumerate(self.world_ids)}
        self._world = WorldTokenizer()

    @classmethod
    def collect(cls, texts: Iterable[str], world: Tokenizer) -> CompactTokenizer:
        """The vocabulary of `texts`, each as one prompt segment holds it, and of the roles."""
        return cls({i for text in (*ROLE_TEXTS, *texts) for i in world.encode(text)})

    @classmethod
    def load(cls, path: Path) -> CompactTokenizer:
        """Reads what `save` wrote. Raises ValueError naming the file if it is something else."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            name, ids = stored["vocabulary"], [int(i) for i in stored["world_ids"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error!r} in a saved vocabulary; delete the file") from error
        loaded = cls(ids)
        # `cls` sorts and adds what every vocabulary holds, so this also finds a shuffled or cut list.
        same = name == VOCABULARY and list(loaded.world_ids) == ids
        if not same or ids[0] < 0 or ids[-1] >= WorldTokenizer.size:
            raise ValueError(f"{path}: no ascending ids of {VOCABULARY} in it; delete the file")
        return loaded

    def save(self, path: Path) -> None:
        """Writes the vocabulary's name and the ids in use as JSON."""
        _save(path, {"vocabulary": VOCABULARY, "world_ids": self.world_ids})

    @property
    def size(self) -> int:
        return len(self.world_ids)

    @property
    def end_id(self) -> int:
        return self._row[END_ID]

    def encode(self, text: str) -> list[int]:
        """Compact ids. Raises ValueError for a token that the data set does not hold."""
        world = self._world.encode(text)
        for i in world:
            if i not in self._row:
                raise ValueError(
                    f"token {self._world.decode([i])!r} of text {text[:80]!r} is not among the {self.size} "
                    "tokens of the data set's own vocabulary; set model.vocab=world"
                )
        return [self._row[i] for i in world]

    def raw(self, ids: Sequence[int]) -> bytes:
        """As `WorldTokenizer.raw`; ids from `size` on are bad tokens."""
        return self._world.raw([self.world_ids[i] if 0 <= i < self.size else -1 for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """As `WorldTokenizer.decode`; ids from `size` on are bad tokens."""
        return self.raw(ids).decode("utf-8", errors="replace")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer whose `save` wrote the file. Raises ValueError naming the file if none did."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no saved vocabulary can be read from it: {error}") from error
    if stored == {"vocabulary": VOCABULARY}:
        return WorldTokenizer()
    return CompactTokenizer.load(path)


def _save(path: Path, facts: dict[str, Any]) -> None:
    """Writes JSON; a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


@dataclass(frozen=True)
class Encoded:
    """One sample: ids and labels of T positions, and the index of its first image position."""

    ids: list[int]
    labels: list[int]
    image_start: int


def encode_segments(segments: Iterable[Segment], tokenizer: Tokenizer, n_image: int) -> Encoded:
    """Segments of a prompt -> one sample; labels are not shifted.

    Each text is tokenised on its own, so no token spans the image. The image becomes `n_image`
    positions of PAD_ID and IGNORE, overwritten in embedding space; without one, `image_start` is
    NO_IMAGE. Raises ValueError for a second image.
    """
    ids: list[int] = []
    labels: list[int] = []
    image_start = NO_IMAGE
    for segment in segments:
        if isinstance(segment, ImageSlot):
            if image_start != NO_IMAGE:
                raise ValueError("the prompt made two image slots; a sample takes one image")
            image_start = len(ids)
            ids += [tokenizer.pad_id] * n_image
            labels += [IGNORE] * n_image
        else:
            tokens = tokenizer.encode(segment.text)
            ids += tokens
            labels += tokens if segment.loss else [IGNORE] * len(tokens)
    return Encoded(ids, labels, image_start)


def trim_answer(text: str) -> str:
    """The answer in a generated text: up to the first blank line, stripped."""
    return text.split("\n\n", 1)[0].strip()
