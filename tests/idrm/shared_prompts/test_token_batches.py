"""Micro-batches by a budget of tokens: what is in them, their order, and a run that is trained on them.

At two ranks under ZeRO-3 it is one of tests/idrm/test_train.py; what is refused is in tests/idrm/test_refusals.py.
"""

import copy
import itertools
import random

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from idrm.errors import InputError
from idrm.shared_prompts import TokenBatches, TokenBatchSampler

LENGTHS = [random.Random(index).randint(20, 90) for index in range(100)]
# Of the 48 pairs of make_trainer: 12 micro-batches of 3 to 5 pairs, a number that varies.
BUDGET = 234


def test_every_pair_is_in_one_batch_within_the_budget():
    formed = TokenBatches.form(LENGTHS, 200, seed=1)
    assert sorted(itertools.chain(*formed.batches)) == list(range(100))
    sums = [sum(LENGTHS[index] for index in batch) for batch in formed.batches]
    assert max(sums) <= 200
    for full, after in itertools.pairwise(zip(sums, formed.batches, strict=True)):
        assert full[0] + LENGTHS[after[1][0]] > 200
    assert formed == TokenBatches.form(LENGTHS, 200, seed=1) != TokenBatches.form(LENGTHS, 200, seed=2)
    sizes = [len(batch) for batch in formed.batches]
    assert formed.mean_pairs == pytest.approx(100 / len(sizes))
    assert formed.summary() == (
        f"micro-batches of up to 200 tokens: {len(sizes)} an epoch, of {min(sizes)} to {max(sizes)} pairs, "
        f"{100 / len(sizes):.1f} in the mean, {sum(LENGTHS) / len(sizes) / 200:.0%} full"
    )


def test_a_pair_that_fits_in_no_batch_is_named():
    with pytest.raises(
        InputError, match=r"training pair 3, .* takes 70 tokens, the most of 2 that do not fit; give at"
    ):
        TokenBatches.form([50, 65, 70, 10], 60, seed=0)


@pytest.mark.parametrize("even_batches", [True, False])
@pytest.mark.parametrize(("count", "ranks"), [(12, 2), (13, 2), (13, 5), (2, 5)])
def test_ranks_have_as_many_whole_batches(count, ranks, even_batches):
    batches = [tuple(range(10 * index, 10 * index + 1 + index % 4)) for index in range(count)]
    sampler = TokenBatchSampler(batches, ranks)
    shards = []
    for rank in range(ranks):
        torch.manual_seed(3)  # accelerate's seedable sampler in its place does so
        shard = BatchSamplerShard(sampler, ranks, rank, even_batches=even_batches)
        shards.append(list(shard))
        assert len(shards[rank]) == len(shard) == -(-count // ranks)
    dealt = list(itertools.chain(*zip(*shards, strict=True)))
    assert len(dealt) == len(sampler)
    assert set(dealt) == set(batches)
    assert dealt[count:] == [dealt[index % count] for index in range(len(dealt) - count)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_order_is_that_of_the_epoch_on_every_rank_and_after_a_resumption(ranks):
    """Through accelerate's own loaders, as the Trainer has them of its ordinary sampler."""
    batches = TokenBatches.form(LENGTHS, 200, seed=1).batches

    def loader(rank):
        plain = DataLoader(LENGTHS, batch_sampler=TokenBatchSampler(batches, ranks))
        return prepare_data_loader(
            plain, num_processes=ranks, process_index=rank, use_seedable_sampler=True, data_seed=5
        )

    def epoch(loader, number):
        loader.set_epoch(number)
        iter(loader.batch_sampler)  # which a loader with workers begins once in vain
        return list(loader.batch_sampler)

    epochs = [[epoch(loader(rank), number) for rank in range(ranks)] for number in range(3)]
    for shards in epochs:
        assert set(itertools.chain(*shards)) == set(batches)
    assert epochs[0] != epochs[1] != epochs[2]
    for rank in range(ranks):
        assert epoch(skip_first_batches(loader(rank), 4), 2) == epochs[2][rank][4:]


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([parameter.grad.clone() for parameter in model.parameters()])


def run(trainer, **resume):
    """The gradients of every step and the training records."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(**resume)
    return gradients.steps, [record for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("steps", [1, 2])
def test_accumulated_batches_weigh_pairs_as_one_batch_of_all(make_trainer, steps):
    """An epoch in one step, with a teacher, or in two whose gradients in the mean are those of the epoch, without."""
    settings = {"alpha": 2.0 - steps, "center_rewards_coefficient": 0.01, "share_prompt": True, "num_train_epochs": 1}
    settings |= {"learning_rate": 0.0, "max_grad_norm": 0.0}
    ((whole,), (expected,)) = run(make_trainer(per_device_train_batch_size=48, **settings))
    accumulated = {"gradient_accumulation_steps": 12 // steps, "logging_steps": steps}
    trainer = make_trainer(tokens_per_batch=BUDGET, **accumulated, **settings)
    assert {len(batch) for batch in trainer.token_batches.batches} == {3, 4, 5}
    parts, (record,) = run(trainer)
    assert len(parts) == steps
    for ours, theirs in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(ours) / steps, theirs, rtol=1e-4, atol=1e-6)
    assert record.keys() == expected.keys()
    for name in expected.keys() - {"epoch", "step", "grad_norm"}:
        assert record[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_run_resumed_within_its_second_epoch_is_the_unbroken_one_bit_for_bit(make_trainer, tmp_path):
    """Seven batches an epoch by two a step make four steps an epoch, of which the last is a short one."""
    values = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 6}
    values |= {"tokens_per_batch": 394, "share_prompt": True, "alpha": 0.0, "bottleneck": (8, "paper")}
    unbroken = make_trainer(**values)
    gradients, records = run(unbroken)
    weights = copy.deepcopy(unbroken.model.state_dict())
    resumed = make_trainer(**values)
    after, again = run(resumed, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert len(gradients) == len(records) == len(again) == 8
    assert again == records
    assert all(
        torch.equal(ours, theirs)
        for step, other in zip(after, gradients[6:], strict=True)
        for ours, theirs in zip(step, other, strict=True)
    )
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_evaluation_keeps_its_batches(make_trainer):
    """And the speed that is reported counts pairs."""
    trainer = make_trainer(alpha=0.0, share_prompt=True, tokens_per_batch=BUDGET, per_device_eval_batch_size=3)
    assert [len(batch["lengths"][0]) for batch in trainer.get_eval_dataloader()] == [3, 3, 3, 2]
    assert {len(batch["lengths"][0]) for batch in trainer.get_train_dataloader()} == {3, 4, 5}
    assert trainer.get_total_train_batch_size(trainer.args) == 4
