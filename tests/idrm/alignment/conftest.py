"""Tokenizers of every kind in use, small and made on the spot."""

from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the answer is that we don't know what the users want",
    "don't you think the café's naïve menu costs 25 dollars?",
    "an answer to the question: yes, it isn't that hard",
    "Zoë said hello and thanked everyone for the fine work",
] * 20


def _byte_level_bpe(trim_offsets: bool, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    words = "the answer that don café fine hello what yes no is it hat kettle 25".replace("é", "e").split()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, *letters, *(f"##{letter}" for letter in letters), *".,:?'!"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def _metaspace_bpe() -> Tokenizer:
    """As Llama 2 has it: a marker before the text and for every space, unknown characters in bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace_unigram() -> Tokenizer:
    """As T5 and DeBERTa-v3 have it: NFKC, a marker before every word."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?'"
    pieces = ["<unk>", "[CLS]", "[SEP]", "[PAD]", "▁", "▁the", "▁answer", "▁is", "▁f", "in", *letters]
    scores = [-1.0 - 0.01 * index if len(piece) > 1 else -5.0 for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer


def _reads_one_text() -> Tokenizer:
    tokenizer = _byte_level_bpe(trim_offsets=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$B $A", special_tokens=[])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of():
    """tokenizer_of(kind, chat_template=None): a fast tokenizer of one of the kinds below."""
    decoder_specials = {"bos_token": "<s>", "eos_token": "</s>"}
    encoder_specials = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    with_types = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    built = {
        "byte-level": (_byte_level_bpe(trim_offsets=False), decoder_specials),
        "byte-level trimmed": (_byte_level_bpe(trim_offsets=True), decoder_specials),
        "byte-level NFC": (_byte_level_bpe(trim_offsets=False, normalizer=normalizers.NFC()), decoder_specials),
        "metaspace": (_metaspace_bpe(), decoder_specials),
        "wordpiece": (_wordpiece(), {**encoder_specials, "unk_token": "[UNK]", **with_types}),
        "one text": (_reads_one_text(), decoder_specials),
        "unigram NFKC": (_metaspace_unigram(), {**encoder_specials, "unk_token": "<unk>"}),
    }

    @cache
    def tokenizer(kind: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
        backend, specials = built[kind]
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **specials)

    return tokenizer
