"""The demonstration's teacher: a tiny BERT that learns NLI from the generated sample alone, as a process of its own.

    python -m idrm.embedded.teacher --data_folder DATA --output_dir TEACHER --seed 0

A small encoder trained from scratch rarely finds out that NLI is a matter of matching tokens. Three things let it:
queries and keys start equal and orthogonal, so that equal tokens attend to each other from the first step; weights
start at the scale of their fan-in, not at BERT's 0.02, which is made for a width of 768; and each input starts at a
random position, so that matching does not depend on where things stand (the pairs read later are twice as long as NLI
inputs, too). Training stops once its own loss says that it has learnt; the dev set only measures.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

from idrm.embedded.generator import NLI_LABELS, read_data
from idrm.embedded.stages import TEACHER_METRICS_FILE

logger = logging.getLogger("idrm.embedded.teacher")


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedule of the teacher; batch_size is that of all ranks together."""

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    max_length: int = 192
    vocab_size: int = 1024
    batch_size: int = 64
    learning_rate: float = 2e-3
    max_steps: int = 1200
    # Mean training loss of the last `report_every` steps that ends the training.
    loss_to_stop: float = 0.02
    report_every: int = 100


def train_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer learnt from `texts`, with BERT's special tokens and pair template."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=recipe.vocab_size, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=recipe.max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_model(vocab_size: int, recipe: Recipe) -> BertForSequenceClassification:
    """The untrained classifier over NLI_LABELS, initialised as the module's docstring says."""
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            intermediate_size=2 * recipe.hidden_size,
            max_position_embeddings=recipe.max_length,
            initializer_range=recipe.hidden_size**-0.5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(NLI_LABELS)),
            label2id={label: index for index, label in enumerate(NLI_LABELS)},
        )
    )
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            torch.nn.init.orthogonal_(attention.query.weight)
            attention.key.weight.copy_(attention.query.weight)
        # What a token is has to outweigh where it stands.
        torch.nn.init.normal_(model.bert.embeddings.position_embeddings.weight, std=0.02)
        torch.nn.init.normal_(model.bert.embeddings.token_type_embeddings.weight, std=0.05)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, records: list[dict[str, str]]) -> tuple[BatchEncoding, Tensor]:
    """Padded inputs (records, length) int64 and labels (records,) int64."""
    premises, hypotheses = ([record[side] for record in records] for side in ("premise", "hypothesis"))
    labels = torch.tensor([NLI_LABELS.index(record["label"]) for record in records])
    return tokenizer(premises, hypotheses, padding=True, return_tensors="pt"), labels


@torch.no_grad()
def accuracy(model: BertForSequenceClassification, inputs: BatchEncoding, labels: Tensor) -> float:
    model.eval()
    parts = [
        model(**{name: value[rows] for name, value in inputs.items()}).logits.argmax(-1)
        for rows in torch.arange(len(labels)).split(256)
    ]
    return (torch.cat(parts) == labels).float().mean().item()


def train(
    model: BertForSequenceClassification, inputs: BatchEncoding, labels: Tensor, recipe: Recipe, seed: int
) -> tuple[int, float]:
    """Trains on all ranks' shares of each batch; returns the steps taken and the mean loss of the last of them."""
    rank, world_size = _rank(), _world_size()
    parallel = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, recipe.max_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / recipe.max_steps)
    )
    # Drawn for the whole batch on every rank, of which each takes every world_size-th record.
    generator = torch.Generator().manual_seed(seed)
    parallel.train()
    loss_sum, mean_loss, started = torch.zeros(()), float("inf"), time.monotonic()
    for step in range(1, recipe.max_steps + 1):
        rows = torch.randint(len(labels), (recipe.batch_size,), generator=generator)
        length = int(inputs["attention_mask"][rows].sum(1).max())
        shift = torch.randint(recipe.max_length - length + 1, (len(rows), 1), generator=generator)
        rows, shift = rows[rank::world_size], shift[rank::world_size]
        batch = {name: value[rows, :length] for name, value in inputs.items()}
        loss = cross_entropy(parallel(**batch, position_ids=torch.arange(length) + shift).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach()
        if step % recipe.report_every == 0 or step == recipe.max_steps:
            steps = (step - 1) % recipe.report_every + 1
            mean_loss = _mean_over_ranks(loss_sum / steps)
            loss_sum.zero_()
            seconds = time.monotonic() - started
            logger.info("teacher: step %d of at most %d, loss %.3f, %.0f s", step, recipe.max_steps, mean_loss, seconds)
            if mean_loss < recipe.loss_to_stop:
                break
    return step, mean_loss


def train_and_save(data_folder: Path, output_dir: Path, seed: int, recipe: Recipe) -> dict[str, float]:
    """Trains on nli_train.jsonl, measures on nli_dev.jsonl, and saves the model into `output_dir`, whole or not at all.

    Returns:
        What TEACHER_METRICS_FILE in `output_dir` says too: dev_accuracy, train_loss, steps, parameters.
    """
    records = read_data(data_folder / "nli_train.jsonl")
    set_seed(seed)
    tokenizer = train_tokenizer([f"{record['premise']} {record['hypothesis']}" for record in records], recipe)
    model = make_model(len(tokenizer), recipe)
    steps, train_loss = train(model, *encode(tokenizer, records), recipe, seed)
    dev_accuracy = accuracy(model, *encode(tokenizer, read_data(data_folder / "nli_dev.jsonl")))
    metrics = {
        "dev_accuracy": dev_accuracy,
        "train_loss": train_loss,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if _rank() == 0:
        unfinished = output_dir.with_name(f".{output_dir.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / TEACHER_METRICS_FILE).write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        os.replace(unfinished, output_dir)
        logger.info("teacher: NLI dev accuracy %.3f, saved to %s", dev_accuracy, output_dir)
    return metrics


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _mean_over_ranks(value: Tensor) -> float:
    if _world_size() > 1:
        torch.distributed.all_reduce(value)
    return value.item() / _world_size()


def main() -> None:
    """The process: one rank of as many as the environment says, on the CPU whatever the machine has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_folder", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=Recipe.max_steps)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO if _rank() == 0 else logging.ERROR)
    if _world_size() > 1:
        torch.distributed.init_process_group("gloo")
    recipe = Recipe(max_steps=arguments.max_steps)
    train_and_save(arguments.data_folder, arguments.output_dir, arguments.seed, recipe)
    if _world_size() > 1:
        # Only then is the teacher there for every rank.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
