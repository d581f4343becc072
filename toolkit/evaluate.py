"""Evaluation: greedy answers from the recurrent state, exact match, floors beside every score."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from data.records import Example
from data.tokens import Tokenizer, trim_answer
from toolkit import ranks
from toolkit.continuation import greedy
from toolkit.contracts import Batch
from toolkit.lit import to_device
from toolkit.metrics import Prediction
from toolkit.model import VisualRWKV
from toolkit.progress import Ticker


def answer_all(
    model: VisualRWKV,
    batches: Iterable[Batch],
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    device: torch.device,
    bf16: bool,
) -> list[Prediction]:
    """One prediction per example, joined by key; a missing or repeated key is an error, never a number.

    batches: of the examples that this rank answers. Every rank gets the predictions of all.
    """
    model.eval()
    tick = Ticker("answers", len(examples) // ranks.world())
    texts: dict[str, str] = {}
    cast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    for batch in batches:
        with cast:
            ids = greedy(
                model, to_device(batch, device), max_new_tokens=max_new_tokens, end_id=tokenizer.end_id
            )
        for key, row in zip(batch.keys, ids, strict=True):
            if key in texts:
                raise ValueError(f"two predictions for {key}; keys of an evaluation split must be unique")
            texts[key] = trim_answer(tokenizer.decode(row))
        tick(len(texts))
    texts = _joined(ranks.gathered(texts))
    missing = [e.key for e in examples if e.key not in texts]
    if missing or len(texts) != len(examples):
        raise ValueError(f"{len(missing)} examples without a prediction, the first {missing[:3]}")
    return [Prediction(e.key, e.question, e.kind, e.gold, texts[e.key], e.record) for e in examples]


def _joined(parts: Sequence[dict[str, str]]) -> dict[str, str]:
    """The answers of all ranks; ValueError for a key that two of them have."""
    texts = {key: text for part in parts for key, text in part.items()}
    if len(texts) < sum(map(len, parts)):
        raise ValueError("two predictions for a key; keys of an evaluation split must be unique")
    return texts


def as_jsonl(predictions: Sequence[Prediction]) -> str:
    """One line per prediction."""
    rows: list[dict[str, Any]] = [
        {
            "key": p.key,
            "kind": p.kind,
            "question": p.question,
            "gold": p.gold,
            "text": p.text,
            "correct": p.correct,
        }
        for p in predictions
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
