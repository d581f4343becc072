"""key=value words of the commands that ask a model, and the model they name. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from toolkit import runs
from toolkit.explain import COMMAND_LINE, BadRecipe, closest, fail
from toolkit.register import Choices

if TYPE_CHECKING:
    from toolkit.session import Answerer

MODEL_HELP = {
    "run": "a finished run: its folder, or its name below `runs`",
    "weights": "instead of run: a checkpoint that toolkit.convert wrote",
    "device": "auto, cpu or cuda",
    "precision": "fp32 or bf16; empty is the run's own",
    "plugins": "modules, by commas, with the run's components that are not ours",
    "scan": "with weights of a VisualRWKV: the scan it was trained with; v6.0: bi",
    "layout": "with weights of a VisualRWKV: prefix, suffix or sandwich; v6.0: sandwich",
    "class_token": "with weights of a VisualRWKV v5 and scan=uni: first (v5.0) or last (v5.1)",
}
"""What the words of ModelWords mean."""


@dataclass(frozen=True)
class ModelWords:
    """Which model, and how it is loaded."""

    run: str = ""
    weights: str = ""
    device: Annotated[str, Choices("auto", "cpu", "cuda")] = "auto"
    precision: Annotated[str, Choices("", "fp32", "bf16")] = ""
    plugins: str = ""
    scan: str = ""
    layout: str = ""
    class_token: Annotated[str, Choices("", "first", "last")] = ""


Kind = TypeVar("Kind")


def understood(words: Sequence[str], kind: type[Kind], *, command: str) -> Kind:
    """key=value words as a dataclass of settings, checked by its types. Raises BadRecipe.

    command: the module's name, for the message that says where the words are listed.
    """
    from toolkit.specs import group_of
    from toolkit.values import check as check_value
    from toolkit.values import convert

    known = group_of(kind).fields
    values: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise fail(COMMAND_LINE, "", f"{word!r} is no key=value", fix=_example(word, known))
        if key not in known:
            matches = closest(key, known)
            raise fail(COMMAND_LINE, key, "no such key", matches=matches, fix=see_help(command))
        if key in values:
            raise fail(COMMAND_LINE, key, "given twice", fix="remove one of the two")
        problems = list(check_value(text, known[key], key, COMMAND_LINE))  # type: ignore[arg-type]
        if problems:
            raise BadRecipe(problems)
        values[key] = convert(known[key].type, text)[0]  # type: ignore[union-attr]
    try:
        return kind(**values)
    except ValueError as error:
        what, _, fix = str(error).partition("; ")
        raise fail(COMMAND_LINE, "", what, fix=fix) from error


def _example(word: str, known: object) -> str:
    key = "prompt" if isinstance(known, dict) and "prompt" in known else "run"
    return f'{key}="{word}", for example'


def see_help(command: str) -> str:
    return f"`python -m {command} --help` lists what there is"


def check_flags(flags: Sequence[str], known: Sequence[str], *, command: str) -> None:
    """Refuses options that there are not. Raises BadRecipe."""
    for flag in sorted(set(flags) - set(known)):
        raise fail(COMMAND_LINE, "", f"no option {flag}", matches=closest(flag, known), fix=see_help(command))


def folder_of(asked: ModelWords) -> Path:
    """Where the model lies. Raises BadRecipe for words that do not go together, or a run that is none."""
    if asked.run and asked.weights:
        raise fail(COMMAND_LINE, "weights", "given beside run", fix="leave out weights or run")
    for key in ("scan", "layout", "class_token"):
        if getattr(asked, key) and not asked.weights:
            raise fail(
                COMMAND_LINE, key, "given without weights", fix=f"a run says it itself; leave out {key}"
            )
    return Path(asked.weights).expanduser() if asked.weights else runs.find(asked.run)


def opened(asked: ModelWords, folder: Path) -> Answerer:
    """The model, loaded. Raises ValueError. Imports torch."""
    from toolkit.loading import load

    return load(
        folder,
        device=asked.device,
        precision=asked.precision,
        plugins=[name for name in asked.plugins.split(",") if name],
        scan=asked.scan,
        layout=asked.layout,
        class_token=asked.class_token,
    )
