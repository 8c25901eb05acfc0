"""Pairs of the tiny data as the trainer has them."""

import pytest
from datasets import Dataset

from idrm.alignment import PairEncoder, encode_preferences
from idrm.preference import load_preferences


@pytest.fixture
def encoded_pairs(student_tokenizer, pairs_path) -> Dataset:
    """The forty-eight training pairs, for the student alone."""
    encoder = PairEncoder(student_tokenizer, None, max_length=128, teacher_max_length=128)
    return encode_preferences(load_preferences(str(pairs_path))[0], encoder)[0]
