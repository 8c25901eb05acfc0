"""One reward-model step over some pairs as trainers do it, two rows a pair or each prompt once, with and without maps.

Trainers are whole: a call collates, runs the trainer's own `compute_loss`, and its gradients. No optimizer is run.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.contest import DTYPES, FUSED
from benchmarks.teacher import encoder
from benchmarks.training_step import STUDENTS
from idrm.alignment import PairEncoder, encode_preferences
from idrm.arguments import InteractionArguments, RewardTrainingArguments
from idrm.capture import Teacher
from idrm.collator import PairCollator
from idrm.interaction import InteractionLoss
from idrm.preference import convert_record, load_preferences
from idrm.shared_prompts import read_packed_pairs
from idrm.teacher_cache import CachedTeacher, TeacherCache
from idrm.trainer import RewardTrainer
from idrm_kernels import available_implementations

VARIANTS = ("trl", "two-rows", "shared", "shared-cached", "shared-live")
REAL_PAIRS = "hh_rlhf_harmless_base_test.jsonl.gz"
# That made-up pairs are written with; each is a token of both models.
WORDS = [f"{chr(97 + index % 26)}{chr(97 + index // 26 % 26)}{chr(97 + index % 7)}" for index in range(500)]


@dataclasses.dataclass(frozen=True)
class PreferenceStepContest:
    """A step over ``batches`` batches of pairs, by a student and a teacher with random weights.

    Variants: "trl", TRL's RewardTrainer, Bradley-Terry in rows padded as it pads them; ours by Bradley-Terry in two
    rows a pair ("two-rows") and with each common beginning once ("shared"); and that with interaction distillation of
    the last block, the teacher read from a cache ("shared-cached") or running ("shared-live").

    Attributes:
        shared: share of a pair's tokens that stand in the common beginnings of both sequences, of made-up pairs of
            ``length`` words a sequence; None for real pairs, those of HH-RLHF in IDRM_TEST_DATA, of which the first are
            taken, longer ones cut to ``length`` tokens.
        batch: pairs of one batch.
    """

    device: str
    dtype: str
    student: str
    layers: int
    teacher: str
    shared: float | None
    length: int
    batch: int
    batches: int

    @property
    def suite(self) -> str:
        return "preference_step"

    @property
    def name(self) -> str:
        pairs = "hh" if self.shared is None else f"{self.shared:.0%}-shared".replace("%", "")
        size = f"{self.batches}x{self.batch}-pairs-2x{self.length}"
        return f"{self.device}-{self.dtype}-{self.student}-{self.layers}-layers-{self.teacher}-{pairs}-{size}"

    def variants(self, names: tuple[str, ...]) -> Mapping[str, Callable[[], object]]:
        step = _step(self)
        return {name: functools.partial(step, name) for name in names}

    def check(self, variant: str) -> str | None:
        if variant in ("shared-cached", "shared-live") and FUSED[self.device] not in available_implementations():
            return f"{FUSED[self.device]} is not available here"
        return None

    def check_result(self, variant: str, result: Tensor) -> str | None:
        """The rewards of all pairs are TRL's, to half the digits of the dtype."""
        if variant == "trl":
            return None
        expected = _step(self)("trl")
        error = ((result - expected).norm() / expected.norm()).item()
        tolerance = torch.finfo(DTYPES[self.dtype]).eps ** 0.5
        return None if error <= tolerance else f"rewards differ by {error:.2g} from TRL's, expected {tolerance:.2g}"

    def needed_bytes(self, variant: str) -> int | None:
        return None

    def roof_seconds(self, variant: str) -> float | None:
        return None


class _Step:
    def __init__(self, contest: PreferenceStepContest):
        records = _real_records(contest) if contest.shared is None else _made_up_records(contest)
        tokenizer, teacher_tokenizer = _tokenizers(records)
        teacher = _teacher(contest, teacher_tokenizer)
        encoder = PairEncoder(
            tokenizer, teacher_tokenizer, max_length=contest.length, teacher_max_length=2 * contest.length + 3
        )
        self._folder = tempfile.TemporaryDirectory(prefix="idrm-preference-step-")
        pairs = Path(self._folder.name, "pairs.jsonl")
        Dataset.from_list(records).to_json(pairs)
        encoded, _ = encode_preferences(load_preferences(str(pairs))[0], encoder)
        encoded = encoded.select(range(contest.batches * contest.batch))
        self.batches = [
            [encoded[first + index] for index in range(contest.batch)]
            for first in range(0, len(encoded), contest.batch)
        ]
        self.model = _student(contest, tokenizer)
        read_packed_pairs(self.model)
        cache = TeacherCache.open(Path(self._folder.name, "cache"), teacher, [encoded])
        arguments = InteractionArguments(kernel_impl=FUSED[contest.device])
        top = (contest.layers - 1,)
        cached = InteractionLoss(CachedTeacher(teacher, cache), top, arguments)
        live = InteractionLoss(teacher, top, arguments)

        def ours(share: bool, interaction: InteractionLoss | None = None, cache: TeacherCache | None = None):
            return RewardTrainer(
                self.model,
                RewardTrainingArguments(**self._arguments(contest)),
                PairCollator(tokenizer, interaction and teacher_tokenizer, cache=cache, share_prompt=share),
                encoded,
                processing_class=tokenizer,
                interaction=interaction,
                alpha=1.0 if interaction else 0.0,
            )

        self.trainers = {
            "two-rows": ours(False),
            "shared": ours(True),
            "shared-cached": ours(True, cached, cache),
            "shared-live": ours(True, live),
        }
        # TRL takes seconds to import, which listing the contests should not.
        from trl import RewardConfig
        from trl import RewardTrainer as TrlTrainer

        ids = [{f"{side}_ids": pair[f"{side}_input_ids"] for side in ("chosen", "rejected")} for pair in encoded]
        config = RewardConfig(**self._arguments(contest), gradient_checkpointing=False, bf16=False)
        self.trainers["trl"] = TrlTrainer(
            self.model, args=config, train_dataset=Dataset.from_list(ids), processing_class=tokenizer
        )
        for pairs in self.batches:  # stored from now on
            cached.teacher_attention(self.trainers["shared-cached"].data_collator(pairs)["interaction"])

    def _arguments(self, contest: PreferenceStepContest) -> dict[str, Any]:
        quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
        folder = str(Path(self._folder.name, "out"))
        return {"output_dir": folder, "use_cpu": contest.device == "cpu", "remove_unused_columns": False, **quiet}

    def __call__(self, variant: str) -> Tensor:
        """Loss and gradients of all batches; the rewards (2, pairs)."""
        trainer = self.trainers[variant]
        self.model.train()
        rewards = []
        for pairs in self.batches:
            if variant == "trl":
                pairs = [
                    {f"{side}_ids": pair[f"{side}_input_ids"] for side in ("chosen", "rejected")} for pair in pairs
                ]
            inputs = trainer._prepare_inputs(trainer.data_collator(pairs))
            loss, outputs = trainer.compute_loss(self.model, inputs, return_outputs=True)
            loss.backward()
            rewards.append((outputs.logits if variant == "trl" else outputs["rewards"]).detach().float().view(2, -1))
        self.model.zero_grad(set_to_none=True)
        return torch.cat(rewards, dim=1)


# One contest's at a time, with its models.
@functools.lru_cache(maxsize=1)
def _step(contest: PreferenceStepContest) -> _Step:
    return _Step(contest)


def _made_up_records(contest: PreferenceStepContest) -> list[dict[str, str]]:
    """Pairs of random words."""
    source = random.Random(0)

    def text(count: int) -> str:
        return "".join(" " + source.choice(WORDS) for _ in range(count))

    records = []
    shared = round(contest.shared * contest.length)
    for _ in range(contest.batches * contest.batch):
        prompt = text(shared)
        # A first word of their own each, and EOS at the end.
        chosen, rejected = (f" {first}{text(contest.length - shared - 2)}" for first in WORDS[:2])
        records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return records


def _real_records(contest: PreferenceStepContest) -> list[dict[str, Any]]:
    pairs, _ = load_preferences(str(Path(os.environ["IDRM_TEST_DATA"], REAL_PAIRS)))
    count = contest.batches * contest.batch
    # Some more, for those that are cut to nothing are dropped.
    return [{side: pair[side] for side in ("chosen", "rejected")} for pair in pairs.select(range(2 * count))]


def _tokenizers(records: Sequence[Mapping[str, Any]]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """A byte-level BPE for the student and a WordPiece for the teacher, learnt from the pairs."""
    pairs = [convert_record(record) for record in records]
    texts = [message["content"] for pair in pairs for side in ("chosen", "rejected") for message in pair[side]]
    texts += [f" {word}" for word in WORDS for _ in range(20)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "</s>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=8000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    wordpiece.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=8000, special_tokens=specials, show_progress=False)
    )
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return (
        PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>"),
        PreTrainedTokenizerFast(
            tokenizer_object=wordpiece,
            **{f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP")},
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        ),
    )


def _student(contest: PreferenceStepContest, tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        **STUDENTS[contest.student],
        num_hidden_layers=contest.layers,
        max_position_embeddings=2 * contest.length,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).to(contest.device, DTYPES[contest.dtype])


def _teacher(contest: PreferenceStepContest, tokenizer: PreTrainedTokenizerFast) -> Teacher:
    torch.manual_seed(1)
    model = encoder(contest.teacher, 2 * contest.length + 3).to(contest.device, DTYPES[contest.dtype])
    return Teacher(model, tokenizer)
