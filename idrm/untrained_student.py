"""An untrained student or policy: a tiny Llama with a byte-level BPE of its own, saved for from_pretrained."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaPreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

PAD_TOKEN, END_TOKEN = "<|pad|>", "<|end|>"


@dataclass(frozen=True)
class Size:
    """The student's shape."""

    hidden_size: int = 64
    num_layers: int = 3
    num_heads: int = 2
    max_length: int = 256
    vocab_size: int = 1024


def train_tokenizer(texts: list[str], size: Size) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from `texts`, whose pad token is not its end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=END_TOKEN, model_max_length=size.max_length
    )


def save_untrained(
    folder: Path,
    texts: list[str],
    seed: int,
    size: Size,
    kind: type[LlamaPreTrainedModel] = LlamaForSequenceClassification,
) -> None:
    """Saves an untrained model, a reward model unless told otherwise, and its tokenizer, whole or not at all."""
    tokenizer = train_tokenizer(texts, size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=size.max_length,
        # Llama's 0.02 is made for widths of thousands. Learning is sensitive to it here (docs/embedded.md).
        initializer_range=0.08,
        num_labels=1,
        problem_type="regression",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    kind(config).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, folder)
