"""`python -m toolkit.demo run=DIR`: a web page that asks a trained model. torch comes last."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from toolkit.asked import MODEL_HELP, ModelWords, check_flags, folder_of, opened, understood
from toolkit.explain import BadRecipe, guarded
from toolkit.register import Range

COMMAND = "toolkit.demo"
FLAGS = ("--help", "-h")


@dataclass(frozen=True)
class Words(ModelWords):
    """What the command line may say; HELP tells of each."""

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 7860


HELP = {
    **MODEL_HELP,
    "host": "address to listen on; any but 127.0.0.1 lets other machines ask",
    "port": "port to listen on, 0 for a free one",
}

USAGE = """\
usage: python -m toolkit.demo run=DIR [key=value ...]
       python -m toolkit.demo weights=FOLDER [key=value ...]

A page to ask about a picture: chat, tokens as they come, the scan and the prompt layout. Ctrl-C ends it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 ended, 1 the model was refused, 2 the request cannot be run."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    flags = [word for word in words if word.startswith("-")]
    check_flags(flags, FLAGS, command=COMMAND)
    if flags:
        print(usage())
        return 0
    asked = understood(words, Words, command=COMMAND)
    folder = folder_of(asked)
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in toolkit.run: waiting threads must not spin
    try:
        return _serve(asked, folder)
    except BadRecipe:
        raise
    except (OSError, ValueError) as error:
        if os.environ.get("TOOLKIT_TRACE") == "1":
            raise
        print(error, file=sys.stderr)
        return 1


def usage() -> str:
    """The text of --help."""
    defaults = {f.name: f.default for f in dataclasses.fields(Words)}
    lines = [f"  {key + '=':<14}{text}{_shown(defaults[key])}" for key, text in HELP.items()]
    return "\n".join([USAGE, *lines])


def _shown(default: object) -> str:
    return "" if default == "" else f" ({default})"


def _serve(asked: Words, folder: Path) -> int:
    from toolkit.demo_server import Server
    from toolkit.demo_state import Desk

    desk = Desk(opened(asked, folder))
    try:
        server = Server(desk, asked.host, asked.port)
    except OSError as error:
        raise ValueError(
            f"host={asked.host} port={asked.port}: {error.strerror or error}; port=0 takes a free port"
        ) from error
    with server:
        print(f"{desk.model.name}: {server.url}", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            desk.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
