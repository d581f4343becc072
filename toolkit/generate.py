"""`python -m toolkit.generate run=DIR image=FILE prompt="..."`: asks a trained model. torch comes last."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from toolkit import questions
from toolkit.asked import MODEL_HELP, ModelWords, check_flags, folder_of, opened, understood
from toolkit.explain import COMMAND_LINE, BadRecipe, fail, guarded
from toolkit.register import Range
from toolkit.sampling import Sampling

if TYPE_CHECKING:
    from toolkit.conversation import Conversation
    from toolkit.session import Answerer

COMMAND = "toolkit.generate"
FLAGS = ("--chat", "--help", "-h")


@dataclass(frozen=True)
class Words(Sampling, ModelWords):
    """What the command line may say; HELP tells of each."""

    image: str = ""
    prompt: str = ""
    file: str = ""
    out: str = ""
    batch: Annotated[int, Range(1)] = 8
    state: str = ""
    save: str = ""

    @property
    def options(self) -> Sampling:
        return Sampling(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sampling)})


USAGE = """\
usage: python -m toolkit.generate run=DIR [image=FILE] prompt="..." [key=value ...]
       python -m toolkit.generate run=DIR file=questions.jsonl [out=answers.jsonl]
       python -m toolkit.generate run=DIR [image=FILE] --chat

  --chat       reads questions line by line and keeps the state; /save FILE, /new, /quit
  -h, --help   this text
"""

HELP = {
    **{key: MODEL_HELP[key] for key in ("run", "weights")},
    "image": "a JPEG, PNG or WebP file",
    "prompt": "the question",
    "file": "instead of prompt: JSON lines with image, prompt and, by choice, id",
    "out": "with file: where answers go, continued if it is there; else they are printed",
    "batch": "with file: questions at once",
    "state": "goes on from a state that save wrote, without reading its image again",
    "save": "where the state goes afterwards; without a prompt, after the image alone",
    **MODEL_HELP,
    "max_new_tokens": "largest length of an answer",
    "temperature": "0 takes the most likely token, greater ones draw",
    "top_p": "draws from the most likely tokens that hold this share",
    "top_k": "draws from so many of the most likely tokens, 0 from all",
    "repetition_penalty": "above 1 keeps from repeating tokens of the answer",
    "seed": "the same one draws the same text",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the model or a file refused, 2 the request cannot be run."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    flags = {w for w in words if w.startswith("-")}
    check_flags(list(flags), FLAGS, command=COMMAND)
    if flags & {"-h", "--help"}:
        print(usage())
        return 0
    asked = understood([w for w in words if w not in flags], Words, command=COMMAND)
    chat = "--chat" in flags
    folder = folder_of(asked)
    check(asked, chat=chat)
    listed = questions.read(Path(asked.file)) if asked.file else []
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in toolkit.run: waiting threads must not spin
    try:
        _go(asked, folder, listed, chat=chat)
    except BadRecipe:
        raise
    except ValueError as error:
        if os.environ.get("TOOLKIT_TRACE") == "1":
            raise
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def usage() -> str:
    """The text of --help."""
    defaults = {f.name: f.default for f in dataclasses.fields(Words)}
    lines = [f"  {key + '=':<21}{text}{_shown(defaults[key])}" for key, text in HELP.items()]
    return "\n".join([USAGE, *lines])


def _shown(default: object) -> str:
    return "" if default == "" else f" ({default})"


def check(asked: Words, *, chat: bool) -> None:
    """Refuses words that do not go together. Raises BadRecipe."""
    look = bool(asked.save and asked.image and not (asked.prompt or asked.file or chat))
    ways = [n for n, on in (("prompt", asked.prompt), ("file", asked.file), ("--chat", chat)) if on]
    if len(ways) > 1:
        raise fail(COMMAND_LINE, ways[1], f"given beside {ways[0]}", fix="choose one of prompt, file, --chat")
    if not ways and not look:
        raise fail(COMMAND_LINE, "prompt", "not given", fix='prompt="...", file=FILE or --chat')
    for key, other in (
        ("image", "file"), ("state", "file"), ("save", "file"), ("image", "state")
    ):  # fmt: skip
        if getattr(asked, key) and getattr(asked, other):
            raise fail(COMMAND_LINE, key, f"given beside {other}", fix=f"leave out {key} or {other}")
    if asked.out and not asked.file:
        raise fail(COMMAND_LINE, "out", "given without file", fix="file=questions.jsonl, or leave it out")
    for key in ("image", "state"):
        path = getattr(asked, key)
        if path and not Path(path).expanduser().is_file():
            raise fail(COMMAND_LINE, key, f"no file {path!r}", fix="give the path of one that exists")


def _go(asked: Words, folder: Path, listed: Sequence[questions.Question], *, chat: bool) -> None:
    model = opened(asked, folder)
    if listed:
        _answer_file(model, asked, listed)
        return
    conversation = _begun(model, asked, chat=chat)
    if asked.prompt:
        show(conversation.stream(asked.prompt, asked.options))
    elif chat:
        converse(conversation, asked.options, _ask_lines())
    if asked.save:
        conversation.save(asked.save)
        print(f"state: {asked.save}", file=sys.stderr)


def _begun(model: Answerer, asked: Words, *, chat: bool) -> Conversation:
    if asked.state:
        return model.resume(asked.state)
    if not asked.prompt and not chat:
        return model.look(asked.image)
    return model.chat(asked.image or None)


def _answer_file(model: Answerer, asked: Words, listed: Sequence[questions.Question]) -> None:
    out = Path(asked.out) if asked.out else None
    count = 0
    for row in questions.answer_file(model, listed, asked.options, out, batch=asked.batch):
        count += 1
        if out is None:
            print(questions.dumped(row), flush=True)
    if out is not None:
        print(f"{count} of {len(listed)} answered now: {out}", file=sys.stderr)


def show(pieces: Iterable[str]) -> None:
    """Prints text as it comes, then ends the line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _ask_lines() -> Callable[[], str]:
    """Reads the next line; with a mark where a person types."""
    if not sys.stdin.isatty():
        return lambda: input()
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history)
    return lambda: input("> ")


def converse(conversation: Conversation, options: Sampling, ask: Callable[[], str]) -> None:
    """Questions until the end of the input; an interrupt ends the answer, not the conversation."""
    while True:
        try:
            line = ask().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if not line:
            continue
        try:
            conversation = _turn(conversation, line, options)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            print(error, file=sys.stderr)


def _turn(conversation: Conversation, line: str, options: Sampling) -> Conversation:
    command, _, rest = line.partition(" ")
    if command == "/new":
        if conversation.resumed and conversation.model.vision is not None:
            raise ValueError("a saved state holds no picture to begin anew with; start with image=FILE")
        return conversation.model.chat(conversation.image)
    if command == "/save":
        conversation.save(rest or "state.safetensors")
        print(f"state: {rest or 'state.safetensors'}", file=sys.stderr)
    elif command.startswith("/"):
        print("commands: /save FILE, /new, /quit", file=sys.stderr)
    else:
        show(conversation.stream(line, options))
    return conversation


if __name__ == "__main__":
    sys.exit(main())
