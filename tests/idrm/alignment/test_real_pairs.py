"""The figures that the design rests on: real HH pairs, a BPE of Llama's kind, MiniLM's WordPiece."""

import gzip
import json

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from idrm.alignment import PairEncoder, encode_preferences
from idrm.preference import load_preferences

LLAMA_3_WORDS = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@pytest.fixture(scope="module")
def path(real_data):
    return real_data / "hh_rlhf_harmless_base_test.jsonl.gz"


@pytest.fixture(scope="module")
def records(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def encoder(records, minilm_path):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    backend.train_from_iterator((text for record in records for text in record.values()), trainer)
    student = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    teacher = AutoTokenizer.from_pretrained(minilm_path)
    return PairEncoder(student, teacher, max_length=4096, teacher_max_length=512)


def test_whole_texts_of_hh_pairs(records, encoder):
    """Role headers included, as the design's figures were taken."""
    pairs = Dataset.from_list(
        [
            {
                **{side: [{"role": "assistant", "content": text}] for side, text in record.items()},
                "conversational": False,
                "margin": None,
            }
            for record in records
        ]
    )
    encoded, report = encode_preferences(pairs, encoder)
    assert report.kept == 2312
    assert report.one_to_one_units / report.units == pytest.approx(0.946, abs=0.002)
    assert report.dropped_student_tokens / report.student_tokens == pytest.approx(0.030, abs=0.002)
    assert report.dropped_teacher_tokens == 0
    assert report.longest_teacher_unit == 23
    assert 1 < report.longest_student_unit <= 16
    assert report.cut_teacher == 382  # 16.5%

    dropped = set()
    for side, column in enumerate(("chosen_input_ids", "rejected_input_ids")):
        for pair in encoded.filter(lambda cut: not cut, input_columns="cut_teacher"):
            kept = set(pair["student_positions"][side])
            dropped.update(token for position, token in enumerate(pair[column][:-1]) if position not in kept)
    texts = [encoder.student_tokenizer.decode([token]) for token in dropped]
    assert len(texts) > 10
    # All of them white space, but for one token of private-use characters, which BERT's normaliser removes.
    assert [text for text in texts if not text.isspace()] == [" \uf04a\uf04a\uf04a"]


def test_message_contents_of_hh_pairs(path, encoder):
    """As the models are trained: role headers outside the maps."""
    pairs, _ = load_preferences(str(path))
    _, report = encode_preferences(pairs, encoder)
    assert (report.pairs, report.kept, report.unaligned, report.cut_student) == (2308, 2308, 0, 0)
    assert report.one_to_one_units / report.units == pytest.approx(0.942, abs=0.002)
    assert report.dropped_student_tokens / report.student_tokens == pytest.approx(0.021, abs=0.002)
    assert report.dropped_teacher_tokens == 0
    assert report.longest_teacher_unit == 23
    assert report.cut_teacher == 338  # 14.6%
