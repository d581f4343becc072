"""A conversation on disk: its state as safetensors, and whose state it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit.contracts import Turn
from toolkit.trunk import State

if TYPE_CHECKING:
    from toolkit.conversation import Conversation
    from toolkit.session import Answerer

FORMAT = "visualrwkv-state-1"


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Writes the file whole or not at all. ValueError if that cannot be, or the conversation read nothing."""
    if conversation.state is None:
        raise ValueError(f"{path}: the conversation has read nothing yet; ask a question first")
    facts = {
        "model": conversation.model.name,
        "weights": conversation.model.weights_id,
        "turns": [[turn.role, turn.text] for turn in conversation.turns],
        "unread": conversation.unread,
        "looked": conversation.looked,
    }
    kept = {name: t.detach().cpu().clone() for name, t in _named(conversation.state).items()}
    try:
        _write(path.expanduser(), kept, {"format": FORMAT, "facts": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: the state cannot be written there: {error}") from error


def _write(path: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, draft, metadata=notes)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load_conversation(model: Answerer, path: Path) -> Conversation:
    """Reads what `save_conversation` wrote. ValueError, naming the file, for another model's, or none."""
    from toolkit.conversation import Conversation

    try:
        with safe_open(path.expanduser(), framework="pt") as file:
            notes = file.metadata() or {}
            if notes.get("format") != FORMAT:
                raise ValueError(f"{path}: no saved state of a conversation; `save` writes one")
            facts: dict[str, Any] = json.loads(notes["facts"])
            _check_owner(model, facts, path)
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        made = Conversation(model)
        made.turns = [_turn(*turn) for turn in facts["turns"]]
        made.unread, made.looked = _ids(facts["unread"]), bool(facts["looked"])
    except (OSError, SafetensorError, json.JSONDecodeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: no saved state can be read from it: {error}") from error
    if not all(0 <= i < model.rwkv.emb.num_embeddings for i in made.unread):
        raise ValueError(f"{path}: holds ids that {model.name} does not have; save it again")
    made.state, made.resumed = _fitted(model, kept, path), True
    return made


def _turn(role: Any, text: Any) -> Turn:
    if role not in ("human", "gpt") or not isinstance(text, str):
        raise TypeError("its turns are none")
    return Turn(role, text)


def _ids(listed: Any) -> list[int]:
    if not isinstance(listed, list) or not all(isinstance(i, int) for i in listed):
        raise TypeError("its ids are no whole numbers")
    return listed


def _check_owner(model: Answerer, facts: dict[str, Any], path: Path) -> None:
    if facts["model"] != model.name:
        raise ValueError(
            f"{path}: is a state of {facts['model']}, this is {model.name}; load that model, or read the "
            "image again with this one"
        )
    if facts["weights"] != model.weights_id:
        raise ValueError(
            f"{path}: is a state of {model.name} with other weights, trained anew since; read the image again"
        )


def _fitted(model: Answerer, kept: dict[str, Tensor], path: Path) -> State:
    """The state on the model's device, in the types and shapes that the model makes itself."""
    with torch.inference_mode(), model.cast():
        like = model.rwkv(model.rwkv.emb(torch.zeros(1, 1, dtype=torch.long, device=model.device)))[1]
    wanted = {name: tensor.shape for name, tensor in _named(like).items()}
    if {name: tensor.shape for name, tensor in kept.items()} != wanted:
        raise ValueError(f"{path}: its tensors are not those of a state of {model.name}; save it again")
    return [
        (
            tuple(kept[f"{layer}.time.{i}"].to(t.device, t.dtype) for i, t in enumerate(time)),
            kept[f"{layer}.channel"].to(channel.device, channel.dtype),
        )
        for layer, (time, channel) in enumerate(like)
    ]


def _named(state: State) -> dict[str, Tensor]:
    named = {f"{layer}.channel": channel for layer, (_, channel) in enumerate(state)}
    return named | {f"{n}.time.{i}": t for n, (time, _) in enumerate(state) for i, t in enumerate(time)}
