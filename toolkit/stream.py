"""Text as its tokens come: nothing is shown that the finished answer will not hold."""

from __future__ import annotations

import codecs

from data.tokens import Tokenizer

TURN_END = "\n\n"
"""A turn of the prompt holds no blank line, so a blank line ends an answer whatever tokens wrote it."""


class TextStream:
    """Ids in, text out; what it gave, joined, is `data.tokens.trim_answer` of all.

    Held back: bytes of a character that is not whole yet, and white space that may end the answer.
    `ended` turns true at the end token or at a blank line.

    The end token (261) is two newlines, but longest match writes a Chinese full stop and a newline as *one*
    token (28329, likewise a comma 28331, and a space before both newlines 3336): an answer that ends so
    never shows 261, in training neither. Paper: the original's evaluation then goes on to its limit.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._begun = False
        self.ended = False

    def feed(self, token: int) -> str:
        """What can be shown after one more token."""
        if token == self._tokenizer.end_id:
            return self._end()
        return self._show(self._bytes.decode(self._tokenizer.raw([token])))

    def close(self) -> str:
        """What is left of an answer that its limit cut."""
        return "" if self.ended else self._show(self._bytes.decode(b"", final=True))

    def _end(self) -> str:
        rest = self.close()
        self.ended = True
        return rest

    def _show(self, text: str) -> str:
        if self.ended:
            return ""
        text, blank, _ = (self._held + text).partition(TURN_END)
        self.ended = bool(blank)
        if not self._begun:
            stripped = text.lstrip()
            # White space at the start is kept until it is known not to be a blank line.
            text = stripped or text
            self._begun = bool(stripped)
        shown = text.rstrip()
        self._held = text[len(shown) :]
        return shown


def ends(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether an answer of these ids has ended."""
    return tokenizer.end_id in ids or TURN_END.encode() in tokenizer.raw(ids)
