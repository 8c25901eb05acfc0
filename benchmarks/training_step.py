"""One reward-model step, forward and backward without the optimizer, up a ladder from Bradley-Terry to Id-RM."""

from __future__ import annotations

import dataclasses
import functools
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from benchmarks.contest import DTYPES, FUSED
from benchmarks.teacher import encoder
from idrm.arguments import InteractionArguments
from idrm.capture import QueryKeyCapture, Teacher
from idrm.collator import InteractionInputs, PairCollator
from idrm.interaction import InteractionLoss
from idrm.teacher_cache import CachedTeacher, TeacherCache
from idrm.teacher_cache.cache import ENTRY_DTYPE
from idrm_kernels import available_implementations
from idrm_kernels.testing.comparison import naive_loss

LADDER = ("bradley-terry", "capture", "teacher", "fused", "naive", "cached")
CHECKED_LENGTH = 128
# Of a sequence, special ones and the teacher's shorter pieces included.
MOST_TOKENS = 2304
STUDENTS = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    # Llama-3-8B's shape, from its published configuration.
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
}
LAYERS = {"small": 8, "llama-3-8b": 32}
# One unit in so many holds two tokens of the student's, another two of the teacher's: as in HH pairs, 95% hold one.
MERGED_EVERY = 40


@dataclasses.dataclass(frozen=True)
class StepContest:
    """A training step on one pair of ``length`` tokens a sequence, with random weights.

    Variants, each the one before and something more: "bradley-terry" (alpha 0), "capture" (the last block's queries and
    keys recorded and packed, and back), "teacher" (its forward pass, queries and keys packed), "fused" (alpha 1 with
    the fused kernel of the device), and instead of it "naive" (alpha 1 with every map held) or "cached" (as "fused",
    but what the teacher would give is read from a teacher cache, from disk to device, in the step itself).

    Attributes:
        layers, all_layers: decoder blocks of the student, and how many its shape has. Where not all fit, shares of the
            step are those of a step all_layers / layers as long.
    """

    device: str
    dtype: str
    student: str
    teacher: str
    length: int
    layers: int
    all_layers: int

    @property
    def suite(self) -> str:
        return "training_step"

    @property
    def name(self) -> str:
        return f"{self.device}-{self.dtype}-{self.student}-{self.layers}-layers-{self.teacher}-2x{self.length}"

    def variants(self, names: tuple[str, ...]) -> Mapping[str, Callable[[], object]]:
        step = _Step(self)
        return {name: functools.partial(step, name) for name in names}

    def check(self, variant: str) -> str | None:
        if variant in ("fused", "cached") and FUSED[self.device] not in available_implementations():
            return f"{FUSED[self.device]} is not available here"
        return None

    def check_result(self, variant: str, result: Tensor) -> str | None:
        """A fused step's interaction loss and its gradients are the naive one's, to half the digits of the dtype."""
        if variant not in ("fused", "cached"):
            return None
        step = _Step(dataclasses.replace(self, length=min(self.length, CHECKED_LENGTH)))
        own, naive = step.interaction_gradients(variant), step.interaction_gradients("naive")
        dtypes = (DTYPES[self.dtype], ENTRY_DTYPE) if variant == "cached" else (DTYPES[self.dtype],)
        tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
        for name, value in naive.items():
            error = ((own[name] - value).norm() / value.norm()).item()
            if not error <= tolerance:
                return f"{name} of {self.name} differs by {error:.2g} of the naive step's, expected {tolerance:.2g}"
        return None

    def needed_bytes(self, variant: str) -> int | None:
        return None

    def roof_seconds(self, variant: str) -> float | None:
        return None


class _Step:
    def __init__(self, contest: StepContest):
        self.model, self.teacher, self.collate = _models(
            contest.device, contest.dtype, contest.student, contest.teacher, contest.layers
        )
        self.pair, self.device = _pair(contest), contest.device
        self.batch = {name: value.to(self.device) for name, value in self.collate([self.pair]).items()}
        self.capture = QueryKeyCapture(self.model, (-1,))
        arguments = InteractionArguments(kernel_impl=FUSED[contest.device])
        self.interaction = InteractionLoss(self.teacher, self.capture.layers, arguments)
        self._cache_folder = tempfile.TemporaryDirectory(prefix="idrm-teacher-cache-")
        self.cache = TeacherCache(Path(self._cache_folder.name), self.teacher, "maps")
        self.cached = InteractionLoss(CachedTeacher(self.teacher, self.cache), self.capture.layers, arguments)
        self.cached.teacher_attention(self.cached_inputs())  # stored from now on
        if self.cached_inputs().cached.missing:
            raise OSError(f"{self._cache_folder.name}: the teacher's attention could not be stored")

    def cached_inputs(self) -> InteractionInputs:
        """The batch's, with what the cache holds read from its file."""
        inputs = self.batch["interaction"]
        cached = self.cache.batch(
            [self.pair], inputs.layout.max_units, lambda pair: self.collate([pair])["interaction"]
        )
        return dataclasses.replace(inputs, cached=cached.to(self.device))

    def __call__(self, variant: str) -> Tensor:
        """Forward and backward; the loss. The gradients are freed, so that the next call's memory holds them anew."""
        loss = sum(self._losses(variant))
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def interaction_gradients(self, variant: str) -> dict[str, Tensor]:
        """The interaction loss, and its gradients of the last block's query and key projections."""
        _, loss = self._losses(variant)
        attention = self.model.model.layers[-1].self_attn
        weights = {"q_proj": attention.q_proj.weight, "k_proj": attention.k_proj.weight}
        gradients = torch.autograd.grad(loss, list(weights.values()))
        return {"loss": loss.detach().float(), **dict(zip(weights, (g.float() for g in gradients), strict=True))}

    def _losses(self, variant: str) -> tuple[Tensor, Tensor | float]:
        """The preference loss, and what the variant adds to it."""
        inputs = {"input_ids": self.batch["input_ids"], "attention_mask": self.batch["attention_mask"]}
        if variant == "bradley-terry":
            return self._preference(self.model(**inputs).logits), 0.0
        batch = self.batch["interaction"]
        teacher = None
        if variant == "cached":
            teacher = self.cached.begin_teacher(self.cached_inputs())
        elif variant != "capture":
            teacher = self.interaction.begin_teacher(batch)  # before the student, as in training
        with self.capture.recording():
            logits = self.model(**inputs).logits
        student = self.interaction.student_attention(self.capture.take(), batch)
        blocks = teacher() if teacher is not None else []
        if variant in ("capture", "teacher"):
            return self._preference(logits), 0.0 * (student[0].q.sum() + student[0].k.sum())
        if variant == "naive":
            return self._preference(logits), naive_loss(student[0], blocks[0], batch.layout)
        return self._preference(logits), self.interaction.batch_loss(student, blocks, batch).loss

    @staticmethod
    def _preference(logits: Tensor) -> Tensor:
        chosen, rejected = logits.float().view(2, -1)
        return -logsigmoid(chosen - rejected).mean()


@functools.lru_cache(maxsize=1)
def _models(
    device: str, dtype: str, student: str, teacher: str, layers: int
) -> tuple[LlamaForSequenceClassification, Teacher, PairCollator]:
    """The student in training mode and the teacher, with random weights, and the collator of their batches."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "word": 2}, unk_token="word")),
        pad_token="<pad>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.device(device):
            student_model = LlamaForSequenceClassification(
                LlamaConfig(
                    **STUDENTS[student],
                    num_hidden_layers=layers,
                    max_position_embeddings=MOST_TOKENS,
                    num_labels=1,
                    pad_token_id=0,
                    use_cache=False,  # as the Trainer has it
                )
            )
            teacher_model = encoder(teacher, 2 * MOST_TOKENS)
    finally:
        torch.set_default_dtype(default)
    return student_model.train(), Teacher(teacher_model, tokenizer), PairCollator(tokenizer, tokenizer)


def _pair(contest: StepContest) -> dict[str, Any]:
    """An encoded pair of random tokens: a first special one, then units of which most hold one token of both models."""
    source = random.Random(0)
    pair: dict[str, Any] = {"teacher_input_ids": [1], "teacher_token_type_ids": [0]}
    for whose in ("student", "teacher"):
        pair |= {f"{whose}_positions": [], f"{whose}_units": []}
    pair |= {"num_units": [], "response_units": []}
    for segment, side in enumerate(("chosen", "rejected")):
        pair[f"{side}_input_ids"] = [1] + [source.randrange(2, 1000) for _ in range(contest.length - 1)]
        units, teacher_units, unit = [], [], 0
        while len(units) < contest.length - 1:
            units += [unit] * min(1 + (unit % MERGED_EVERY == 1), contest.length - 1 - len(units))
            teacher_units += [unit] * (1 + (unit % MERGED_EVERY == 2))
            unit += 1
        first = len(pair["teacher_input_ids"])
        pair["teacher_input_ids"] += [source.randrange(2, 1000) for _ in teacher_units] + [1]
        pair["teacher_token_type_ids"] += [segment] * (len(teacher_units) + 1)
        pair["student_positions"].append(list(range(1, contest.length)))
        pair["teacher_positions"].append(list(range(first, first + len(teacher_units))))
        pair["student_units"].append(units)
        pair["teacher_units"].append(teacher_units)
        pair["num_units"].append(unit)
        pair["response_units"].append(unit)
    pair["teacher_places"] = pair["teacher_positions"]
    pair["teacher_window_lengths"] = [len(pair["teacher_input_ids"])]
    pair["teacher_tokens"] = sum(map(len, pair["teacher_places"]))
    pair["teacher_reading"] = contest.name
    return pair
