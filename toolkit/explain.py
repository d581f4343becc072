"""One message per mistake: `file:line: key: what was given; close matches; the fix`. Imports no torch."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

COMMAND_LINE = "command line"
EXIT_BAD_RECIPE = 2
EXIT_UNREAD = 141
"""As shells tell of a command whose reader has gone (128 + SIGPIPE)."""

_SHOWN = 4
"""Problems printed at once; three lines each keeps a message within twelve lines."""


@dataclass(frozen=True)
class Problem:
    """One mistake. place: `file:line` or `command line`; matches: best first, at most three are shown."""

    place: str
    key: str
    what: str
    matches: tuple[str, ...] = ()
    fix: str = ""

    def __str__(self) -> str:
        lines = [": ".join(part for part in (self.place, self.key, self.what) if part)]
        if self.matches:
            lines.append("  did you mean: " + ", ".join(self.matches[:3]))
        if self.fix:
            lines.append("  fix: " + self.fix)
        return "\n".join(lines)


class BadRecipe(ValueError):
    """What a user asked for cannot be run; carries every problem found, in reading order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    def message(self) -> str:
        """At most twelve lines."""
        lines = [str(p) for p in self.problems[:_SHOWN]]
        hidden = len(self.problems) - _SHOWN
        if hidden > 0:
            lines[-1] = f"... and {hidden + 1} more; fix these first"
        return "\n".join(lines)


def fail(place: str, key: str, what: str, *, matches: Iterable[str] = (), fix: str = "") -> BadRecipe:
    """A BadRecipe with one problem, to be raised."""
    return BadRecipe([Problem(place, key, what, tuple(matches), fix)])


def closest(word: str, known: Iterable[str]) -> list[str]:
    """At most three of `known`, the likeliest intended first. The last part of a path counts too."""
    scored = []
    enough = 0.5 if len(word) <= 3 else 0.6
    for candidate in dict.fromkeys(known):
        score = max(
            _ratio(word, candidate), 0.98 * _ratio(word, candidate.rsplit("/", 1)[-1].rsplit(".", 1)[-1])
        )
        if score >= enough:
            scored.append((-score, candidate))
    return [candidate for _, candidate in sorted(scored)[:3]]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def given(value: object) -> str:
    """A value as a message quotes it, with its type."""
    if value is None:
        return "nothing (null)"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def guarded(main: Callable[[], int]) -> int:
    """Runs `main`; a BadRecipe becomes its message on stderr and exit code 2 (TOOLKIT_TRACE=1 re-raises).

    Where nobody reads on (`... | head`), it ends as a shell's own commands do.
    """
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes once more as it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNREAD
    except BadRecipe as error:
        if os.environ.get("TOOLKIT_TRACE") == "1":
            raise
        print(error.message(), file=sys.stderr)
        return EXIT_BAD_RECIPE
