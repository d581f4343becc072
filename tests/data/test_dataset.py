"""Examples, collating and loaders."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
import torch

from data.batch import collate, stack
from data.dataset import Examples
from data.loader import StepSampler, eval_loader, train_loader
from data.plan import Plan
from data.reader import ShardReader
from data.shards import write_shards
from toolkit.contracts import IGNORE, NO_IMAGE, PAD_ID

from .helpers import Letters, conversation, mean_color, picture, plain_prompt, shard_folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return ShardReader(shard_folder(tmp_path_factory.mktemp("shards") / "s", 24))


def examples_of(reader, **options):
    settings = {"prompt": plain_prompt, "tokenizer": Letters(), "n_image": 4, "ctx_len": 64, **options}
    return Examples(reader, **settings)


def made(tmp_path, meta, image=None):
    return ShardReader(write_shards([(meta, image)], tmp_path / "s", about={}))


def test_a_sample_is_image_then_text_with_labels_on_the_answer(reader):
    sample = examples_of(reader, transform=mean_color)[0]
    assert sample.ids.tolist() == [PAD_ID] * 4 + [ord(c) for c in "q0\na0\n"]
    assert sample.labels.tolist() == [IGNORE] * 7 + [ord(c) for c in "a0\n"]
    assert (sample.image_start, sample.key, sample.weight, sample.gold) == (0, "00000000", 1.0, "")
    assert sample.pixels.shape == (3, 2, 2)


def test_evaluation_drops_the_answer_and_keeps_it_as_gold(reader):
    sample = examples_of(reader, answer=False)[0]
    assert sample.ids.tolist() == [PAD_ID] * 4 + [ord(c) for c in "q0\n"]
    assert (sample.labels == IGNORE).all()
    assert sample.gold == "a0"


def test_text_only_samples_have_no_image(reader):
    examples = examples_of(reader, transform=mean_color)
    text_only = next(j for j in range(len(examples)) if not examples.example(j).has_image)
    sample = examples[text_only]
    assert (sample.image_start, sample.pixels) == (NO_IMAGE, None)


def test_overlong_samples_are_refused_by_name(reader):
    message = r"^00000000: the sequence has 10 positions, model.ctx_len=9; set model.ctx_len=10 or more"
    with pytest.raises(ValueError, match=message):
        examples_of(reader, ctx_len=9)[0]
    assert len(examples_of(reader, ctx_len=10)[0].ids) == 10
    with pytest.raises(ValueError, match=r"model.ctx_len=6; set model.ctx_len=7"):
        examples_of(reader, ctx_len=6, overlong="cut", answer=False)[0]


def test_cutting_keeps_labels_or_the_slot_but_never_half_an_image(reader):
    with_label = examples_of(reader, ctx_len=8, overlong="cut")[0]
    assert (len(with_label.ids), with_label.weight) == (8, 1.0)
    assert with_label.labels.tolist() == [IGNORE] * 7 + [ord("a")]
    without = examples_of(reader, ctx_len=7, overlong="cut")
    assert (without[0].weight, len(without[0].ids)) == (0.0, 7)
    assert without.left_out == 2
    with pytest.raises(ValueError, match=r"model.ctx_len=3 would cut its image, which ends at 4"):
        examples_of(reader, ctx_len=3, overlong="cut")[0]


def test_workers_count_what_they_leave_out(reader):
    examples = examples_of(reader, ctx_len=7, overlong="cut")
    weights = torch.cat([b.weight for b in eval_loader(examples, batch=4, workers=2)])
    assert examples.left_out == int((weights == 0).sum()) > 0


@pytest.mark.parametrize(
    ("turns", "image", "message"),
    [
        (
            conversation("q", "a", image=False),
            picture(0),
            "00000000: 0 <image> tags in the turns, but one picture",
        ),
        (conversation("<image>q", "a"), picture(0), "00000000: 2 <image> tags in the turns, but one picture"),
        (conversation("q", "a"), None, "00000000: 1 <image> tags in the turns, but no picture"),
        (conversation("q", "a")[:1], picture(0), "00000000: no position carries a label"),
    ],
)
def test_wrong_turns_are_errors_that_name_the_key(tmp_path, turns, image, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        examples_of(made(tmp_path, {"conversations": turns}, image))[0]


def test_the_same_text_with_and_without_a_picture(tmp_path):
    """The kept tokens of one record must not hide the wrong tag count of the next."""
    meta = {"conversations": conversation("q", "a")}
    reader = ShardReader(write_shards([(meta, picture(0)), (meta, None)], tmp_path / "s", about={}))
    examples = examples_of(reader)
    assert examples[0].image_start == 0
    with pytest.raises(ValueError, match=r"^00000001: 1 <image> tags in the turns, but no picture"):
        examples[1]


def test_a_conversation_without_answer_cannot_be_scored(tmp_path):
    reader = made(tmp_path, {"conversations": conversation("q", "a")[:1]}, picture(0))
    with pytest.raises(ValueError, match=r"^00000000: the last turn is not from gpt"):
        examples_of(reader, answer=False)[0]


def test_wrong_options_are_refused(reader):
    with pytest.raises(ValueError, match=r"overlong='drop' is unknown; use 'refuse' or 'cut'"):
        examples_of(reader, overlong="drop")
    with pytest.raises(ValueError, match=r"not both"):
        examples_of(reader, transform=mean_color, features=object())


def test_pictures_are_transformed_once_within_the_limit(reader):
    calls = []

    def counted(image):
        calls.append(1)
        return mean_color(image)

    examples = examples_of(reader, transform=counted)
    first = [examples[j].pixels for j in range(len(examples))]
    assert len(calls) == sum(reader.has_image(i) for i in range(len(reader)))
    again = [examples[j].pixels for j in range(len(examples))]
    assert all(a is b for a, b in zip(first, again, strict=True))
    calls.clear()
    unkept = examples_of(reader, transform=counted, keep_mb=0)
    assert torch.equal(unkept[0].pixels, first[0]) and torch.equal(unkept[0].pixels, first[0])
    assert len(calls) == 2


def test_collate_pads_on_the_right(reader):
    examples = examples_of(reader, transform=mean_color)
    samples = [examples[j] for j in range(8)]
    batch = collate(samples, multiple=16)
    assert batch.ids.shape == batch.labels.shape == (8, 16)
    for row, sample in enumerate(samples):
        n = len(sample.ids)
        assert batch.lengths[row] == n
        assert torch.equal(batch.ids[row, :n], sample.ids) and (batch.ids[row, n:] == PAD_ID).all()
        assert torch.equal(batch.labels[row, :n], sample.labels) and (batch.labels[row, n:] == IGNORE).all()
    pictured = [s for s in samples if s.image_start != NO_IMAGE]
    assert 0 < len(pictured) < 8
    assert torch.equal(batch.pixels, torch.stack([s.pixels for s in pictured]))
    assert batch.image_start.tolist() == [s.image_start for s in samples]
    assert list(batch.keys) == [s.key for s in samples]
    assert collate(samples).ids.shape[1] == max(len(s.ids) for s in samples)


def test_nested_pixels_are_stacked_part_by_part():
    one, two = torch.zeros(2), torch.ones(3)
    stacked = stack([(one, (two, two)), (one + 1, (two, two + 1))])
    assert stacked[0].tolist() == [[0, 0], [1, 1]]
    assert stacked[1][1].tolist() == [[1, 1, 1], [2, 2, 2]]


def keys_of(loader):
    return [key for batch in loader for key, w in zip(batch.keys, batch.weight.tolist(), strict=True) if w]


@pytest.mark.parametrize(("world", "micro", "workers"), [(1, 0, 0), (1, 3, 2), (2, 2, 0), (3, 1, 2)])
def test_an_epoch_over_ranks_and_workers_has_each_key_once(reader, world, micro, workers):
    examples = examples_of(reader)
    plan = Plan(len(examples), 12 if micro != 2 else 8, 1, reader.manifest_hash)
    options = {
        "start_step": 0,
        "end_step": plan.steps_per_epoch,
        "world": world,
        "micro": micro,
        "workers": workers,
    }
    loaders = [train_loader(examples, plan, rank=rank, **options) for rank in range(world)]
    assert Counter(key for loader in loaders for key in keys_of(loader)) == Counter(
        e.key for e in reader.all_examples()
    )
    assert len({len(loader) for loader in loaders}) == 1


def test_a_loader_continues_at_a_step_with_the_same_batches(reader):
    examples = examples_of(reader)
    plan = Plan(len(examples), 8, 1, reader.manifest_hash)
    whole = list(train_loader(examples, plan, start_step=0, end_step=12))
    rest = list(train_loader(examples, plan, start_step=7, end_step=12, workers=2))
    assert [b.keys for b in rest] == [b.keys for b in whole[7:]]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(rest, whole[7:], strict=True))


def test_loaders_leave_the_global_random_state_alone(reader):
    examples = examples_of(reader)
    plan = Plan(len(examples), 8, 1, reader.manifest_hash)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(train_loader(examples, plan, start_step=0, end_step=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_reads_each_example_once_in_order(reader):
    examples = examples_of(reader, answer=False)
    everything = [e.key for e in reader.all_examples()]
    assert keys_of(eval_loader(examples, batch=5)) == everything
    assert keys_of(eval_loader(examples, batch=5, limit=7)) == everything[:7]
    for world in (2, 3, 7):
        parts = [keys_of(eval_loader(examples, batch=4, rank=rank, world=world)) for rank in range(world)]
        assert [key for part in parts for key in part] == everything
    sizes = [len(batch.keys) for batch in eval_loader(examples, batch=10)]
    assert sizes == [9, 9, 9, 9]  # even, so that a decoder of one size serves them all
    assert [len(batch.keys) for batch in eval_loader(examples, batch=5, limit=7)] == [4, 3]
    assert not list(eval_loader(examples, batch=5, rank=0, world=40))


def test_what_does_not_divide_is_refused(reader):
    examples = examples_of(reader)
    plan = Plan(len(examples), 8, 1, reader.manifest_hash)
    with pytest.raises(
        ValueError, match=r"global_batch=8 cannot be shared equally over 3 ranks: use 2 or 4 ranks"
    ):
        StepSampler(plan, start_step=0, end_step=1, world=3)
    with pytest.raises(
        ValueError, match=r"hardware.micro_batch=3 does not divide the 8 samples of a rank and step"
    ):
        StepSampler(plan, start_step=0, end_step=1, micro=3)
    with pytest.raises(ValueError, match=r"the plan is for 9 examples, the data set has \d+"):
        train_loader(examples, Plan(9, 3, 0, "m"), start_step=0, end_step=1)


def test_examples_can_be_pickled(reader):
    examples = examples_of(reader, transform=mean_color)
    copy = pickle.loads(pickle.dumps(examples))
    assert torch.equal(copy[3].ids, examples[3].ids)
