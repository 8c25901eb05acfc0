"""Folds: all pairs once, about one size, no conversation in two."""

import random

import pytest

from idrm.errors import InputError
from idrm.study.folds import divide_by_prompt


def pair(chosen: str, rejected: str | None = None) -> dict:
    return {
        side: [{"role": "user", "content": text}, {"role": "assistant", "content": side}]
        for side, text in (("chosen", chosen), ("rejected", rejected or chosen))
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_pair_is_in_one_fold_and_every_conversation_too(seed):
    source = random.Random(seed)
    pairs = [pair(f"prompt {source.randrange(60)}") for _ in range(200)]
    folds = divide_by_prompt(pairs, 5, seed)
    assert sorted(index for fold in folds for index in fold) == list(range(200))
    assert all(fold == sorted(fold) for fold in folds)
    assert max(map(len, folds)) - min(map(len, folds)) <= 10
    prompts = [{pairs[index]["chosen"][0]["content"] for index in fold} for fold in folds]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert folds == divide_by_prompt(pairs, 5, seed)
    assert folds != divide_by_prompt(pairs, 5, seed + 1)


def test_a_pair_of_two_prompts_joins_the_conversations_of_both():
    pairs = [pair("a"), pair("b"), pair("a", "c"), pair("c", "b "), pair("d")]
    assert sorted(divide_by_prompt(pairs, 2, 0)) == [[0, 1, 2, 3], [4]]


def test_white_space_and_a_shared_system_message_make_no_difference():
    pairs = [pair("a  b"), pair("a\nb "), pair("c")]
    for each in pairs:
        for side in ("chosen", "rejected"):
            each[side].insert(0, {"role": "system", "content": "Be brief."})
    assert sorted(divide_by_prompt(pairs, 2, 0)) == [[0, 1], [2]]


def test_too_few_prompts_are_refused():
    with pytest.raises(InputError, match="expected 3 different prompts at least for so many folds, found 2"):
        divide_by_prompt([pair("a"), pair("b"), pair("a")], 3, 0)
