"""Strict stops with one message; tolerant leaves out exactly what is damaged, once, and counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data.dataset import Examples
from data.index import parse_index
from data.loader import train_loader
from data.plan import Plan
from data.policy import Counted, Guarded, reported
from data.reader import DamagedSample, ShardReader
from data.shards import write_shards
from toolkit.contracts import NO_IMAGE

from .faulty import BAD, CONTENT, STRUCTURE, N, flip, records
from .helpers import Letters, mean_color, plain_prompt, shard_folder

SHARD = "shard-000000.tar"
CASES = [name for name in STRUCTURE if not name.startswith("cut")] + list(CONTENT)


def damaged(name: str, out: Path) -> tuple[Path, set[int], str, str, int]:
    """(folder, unreadable examples, field, cause, offset of the field)."""
    if name in CONTENT:
        made, field, cause = CONTENT[name]
        folder = write_shards(made, out, about={})
        lost = {BAD}
    else:
        folder = write_shards(records(), out, about={})
        lost, field, cause = set(STRUCTURE[name].bad), STRUCTURE[name].field, "damaged data: CRC-32 is"
    index = parse_index((folder / "shard-000000.index").read_bytes(), "")
    if name in STRUCTURE:
        STRUCTURE[name].do(folder / SHARD, index)
    at = index.text(BAD).offset if field == "json" else index.images(BAD)[0].offset
    return folder, lost, field, cause.replace("the numbers must be equal", ""), at


def guarded(folder: Path, report: Path, policy: str, **options) -> Guarded:
    settings = {"prompt": plain_prompt, "tokenizer": Letters(), "n_image": 4, "ctx_len": 64, **options}
    return Guarded(
        Examples(ShardReader(folder), transform=mean_color, **settings), policy=policy, report=report
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", CASES)
def test_strict_stops_with_one_message_that_says_where(tmp_path, name):
    folder, lost, field, cause, at = damaged(name, tmp_path / "s")
    examples = guarded(folder, tmp_path / "r.jsonl", "strict")
    read = {j for j in range(N) if j not in lost}
    for j in read:
        assert examples[j].weight == 1
    for j in lost:
        with pytest.raises(DamagedSample) as error:
            examples[j]
        assert str(error.value).startswith(
            f"{SHARD}: key {BAD:08d}: member {BAD:08d}.{field} at byte {at:,}: "
        )
        assert cause in str(error.value)
        assert str(error.value).count(f"{BAD:08d}") == 2
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["payload bit flip", "truncated JPEG", "two image tags"])
def test_tolerant_reports_each_sample_once_and_trains_the_rest(tmp_path, name, workers):
    folder, lost, field, cause, at = damaged(name, tmp_path / "s")
    report = tmp_path / "r.jsonl"
    examples = guarded(folder, report, "tolerant")
    plan = Plan(N, 4, 0, "m")
    loader = train_loader(examples, plan, start_step=0, end_step=6, micro=2, workers=workers)
    batches = list(Counted(loader, plan, first_step=0, report=report))
    assert len(batches) == len(loader) == 12
    times = Counter(k for b in batches for k, w in zip(b.keys, b.weight.tolist(), strict=True) if w > 0)
    assert times == {f"{j:08d}": 3 for j in range(N) if j not in lost}
    (row,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert {k: row[k] for k in ("example", "shard", "key", "field", "offset")} == {
        "example": BAD, "shard": SHARD, "key": f"{BAD:08d}", "field": field, "offset": at,
    }  # fmt: skip
    assert cause in row["cause"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_tolerant_gives_the_slot_a_stand_in(tmp_path, name):
    folder, lost, *_ = damaged(name, tmp_path / "s")
    examples = guarded(folder, tmp_path / "r.jsonl", "tolerant")
    weights = [examples[j].weight for j in range(N)]
    assert weights == [float(j not in lost) for j in range(N)]
    assert set(reported(tmp_path / "r.jsonl")) == lost
    for j in lost:
        assert (examples[j].image_start, len(examples[j].ids), examples[j].key) == (NO_IMAGE, 1, f"{j:08d}")


@pytest.mark.parametrize("name", [*(n for n in STRUCTURE if n.startswith("cut")), "missing"])
def test_a_cut_or_missing_shard_stops_at_once_or_loses_only_what_is_gone(tmp_path, name, caplog):
    folder = write_shards(records(), tmp_path / "s", about={})
    index = parse_index((folder / "shard-000000.index").read_bytes(), "")
    if name == "missing":
        (folder / SHARD).unlink()
    else:
        STRUCTURE[name].do(folder / SHARD, index)
    lost = set(range(N)) if name == "missing" else set(STRUCTURE[name].bad)
    with pytest.raises(ValueError, match=rf"^{SHARD} (is missing|in .* has [\d,]+ bytes, the manifest says)"):
        ShardReader(folder)
    reader = ShardReader(folder, whole=False)
    assert SHARD in caplog.text
    settings = {"prompt": plain_prompt, "tokenizer": Letters(), "n_image": 4, "ctx_len": 64}
    report = tmp_path / "r.jsonl"
    examples = Guarded(Examples(reader, transform=mean_color, **settings), policy="tolerant", report=report)
    plan = Plan(N, 4, 0, "m")
    loader = train_loader(examples, plan, start_step=0, end_step=2)
    batches = list(Counted(loader, plan, first_step=0, report=report))
    times = Counter(k for b in batches for k, w in zip(b.keys, b.weight.tolist(), strict=True) if w > 0)
    assert times == {f"{j:08d}": 1 for j in range(N) if j not in lost}
    assert set(reported(report)) == lost


def test_settings_are_no_faults_of_the_data(tmp_path):
    examples = guarded(shard_folder(tmp_path / "s"), tmp_path / "r.jsonl", "tolerant", ctx_len=6)
    with pytest.raises(ValueError, match=r"set model.ctx_len=") as error:
        examples[0]
    assert not isinstance(error.value, DamagedSample)
    with pytest.raises(ValueError, match=r"is 'lax'; use strict or tolerant"):
        guarded(tmp_path / "s", tmp_path / "r", "lax")


def test_overlong_samples_without_an_answer_are_reported(tmp_path, caplog):
    report = tmp_path / "r.jsonl"
    examples = guarded(shard_folder(tmp_path / "s", 3), report, "strict", ctx_len=7, overlong="cut")
    weights = [examples[j].weight for j in range(len(examples))]
    rows = reported(report)
    assert weights.count(0) > 0 and set(rows) == {j for j, w in enumerate(weights) if w == 0}
    assert {row["cause"] for row in rows.values()} == {
        "longer than model.ctx_len, with no answer in what was kept"
    }
    assert examples.left_out == len(rows)
    told = [message for message in caplog.messages if message.startswith("left out: ")]
    assert len(told) == len(rows)
    assert all(one.endswith("; give model.ctx_len more to learn it") for one in told)


def test_two_processes_write_one_row_each_sample(tmp_path):
    """Each has noted one of three; what the other wrote since is read before writing."""
    folder = shard_folder(tmp_path / "s", 3)
    report = tmp_path / "r.jsonl"
    one, two = (guarded(folder, report, "strict", ctx_len=7, overlong="cut") for _ in range(2))
    zero = [j for j in range(len(one)) if one.examples[j].weight == 0]
    assert len(zero) >= 2
    for examples, j in ((one, zero[0]), (two, zero[1]), (one, zero[1]), (two, zero[0]), (one, zero[0])):
        examples[j]
    rows = [json.loads(line)["example"] for line in report.read_text().splitlines()]
    assert rows == zero[:2]


class Forgetful(Guarded):
    """Loses a sample without a word."""

    def _note(self, j, fault):
        pass


def test_a_sample_lost_without_a_word_stops_before_the_last_batch_of_the_epoch(tmp_path):
    folder, *_ = damaged("payload bit flip", tmp_path / "s")
    report = tmp_path / "r.jsonl"
    good = guarded(folder, report, "tolerant")
    examples = Forgetful(good.examples, policy="tolerant", report=report)
    plan = Plan(N, 4, 0, "m")
    loader = train_loader(examples, plan, start_step=0, end_step=6, micro=2)
    seen = []
    with pytest.raises(RuntimeError, match=rf"epoch 1: 1 samples were neither .* first example {BAD}"):
        seen.extend(batch.keys for batch in Counted(loader, plan, first_step=0, report=report))
    assert len(seen) == 3


def test_an_epoch_without_losses_is_silent(tmp_path, caplog):
    examples = guarded(shard_folder(tmp_path / "s"), tmp_path / "r.jsonl", "strict")
    plan = Plan(len(examples), 4, 0, "m")
    loader = train_loader(examples, plan, start_step=0, end_step=plan.steps_per_epoch)
    batches = list(Counted(loader, plan, first_step=0, report=tmp_path / "r.jsonl"))
    assert sum(int((b.weight > 0).sum()) for b in batches) == len(examples)
    assert not caplog.records


def test_the_count_is_told_at_the_end_of_each_epoch(tmp_path, caplog):
    folder, *_ = damaged("truncated JPEG", tmp_path / "s")
    report = tmp_path / "r.jsonl"
    plan = Plan(N, 3, 0, "m")
    loader = train_loader(guarded(folder, report, "tolerant"), plan, start_step=0, end_step=4)
    list(Counted(loader, plan, first_step=0, report=report))
    told = [r.getMessage() for r in caplog.records if "planned" in r.getMessage()]
    assert told == [f"epoch {e}: 6 samples planned = 5 trained + 1 reported in {report}" for e in (1, 2)]


@pytest.mark.parametrize("name", ["a flipped bit in a picture", "a sample that is too long"])
def test_a_fault_in_a_loader_worker_arrives_as_it_was_raised(tmp_path, name):
    folder = shard_folder(tmp_path / "s", N)
    options = {}
    if name.startswith("a flipped"):
        shard, span = ShardReader(folder).place(BAD, image=True)
        flip(folder / shard, span.offset + span.size // 2)
        expected: type[ValueError] = DamagedSample
    else:
        options, expected = {"ctx_len": 5}, ValueError
    told = []
    for workers in (0, 2):
        examples = guarded(folder, tmp_path / f"r{workers}.jsonl", "strict", **options)
        loader = train_loader(
            examples, Plan(len(examples), 2, 0, "x"), start_step=0, end_step=N, workers=workers
        )
        with pytest.raises(expected) as error:
            list(loader)
        told.append((type(error.value), str(error.value)))
    assert told[0] == told[1] and "Traceback" not in told[1][1]
