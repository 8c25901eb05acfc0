"""The frozen encoder whose attention is distilled."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from idrm.capture.bert import BertFamily
from idrm.capture.deberta import DebertaFamily
from idrm.capture.layers import resolve_layers
from idrm.capture.modernbert import ModernBertFamily
from idrm.errors import InputError, refusals, require_folder
from idrm.partitioning import unpartitioned
from idrm_kernels import PackedAttention

if TYPE_CHECKING:
    from idrm.collator import InteractionInputs

logger = logging.getLogger(__name__)

# Of the joint input in tokens, for a teacher that reads inputs of any length.
DEFAULT_TEACHER_MAX_LENGTH = 512


class TeacherFamily(Protocol):
    """What a family of encoders must provide; a new one is a module beside ``bert`` and ``deberta`` and an entry below.

    No forward pass asks for ``output_attentions``: an encoder that keeps maps would keep those of all its layers.

    Attributes:
        model_types: the ``config.model_type`` values that it covers.
        counts_positions: those of them that derive position ids from the padding themselves.
        is_rotary: whether queries and keys are turned by their position (RoPE).
    """

    model_types: tuple[str, ...]
    counts_positions: tuple[str, ...]
    is_rotary: bool

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], attn_implementation: str | None):
        """Watches these layers of the whole model, and has it compute its attention as asked (None: its default).

        Raises InputError for an attention that it cannot represent and for an implementation that cannot run.
        """

    @classmethod
    def supervisable_layers(cls, config: PretrainedConfig) -> list[int]:
        """The layers whose queries see all keys, counted from 0."""

    @classmethod
    def blocks(cls, model: PreTrainedModel) -> nn.ModuleList:
        """The model's own list of its transformer blocks."""

    @classmethod
    def load_arguments(cls, config: PretrainedConfig) -> dict[str, Any]:
        """Arguments of from_pretrained that leave unused parts of the model out."""

    @classmethod
    def max_length(cls, config: PretrainedConfig) -> int | None:
        """Most tokens, special ones included, that the model can read; None where there is no limit."""

    def attention(
        self, model_inputs: dict[str, Tensor], token_index: Tensor, positions: Tensor, span: int
    ) -> dict[int, PackedAttention]:
        """Runs the model and packs the tokens of ``token_index`` (flat into batch * tokens) by layer.

        ``positions`` are those in the joint input, all below ``span``.
        """

    def packed(self, layer: int, q: Tensor, k: Tensor, positions: Tensor, span: int) -> PackedAttention:
        """The attention that queries and keys of ``attention``, kept since, define in one of the layers."""


FAMILIES: tuple[type[TeacherFamily], ...] = (BertFamily, DebertaFamily, ModernBertFamily)


class Teacher:
    """A frozen encoder that yields its attention, never as maps, for the supervised layers.

    Deliberately no nn.Module: it belongs to no optimiser, no ZeRO partition and no checkpoint. The model that it is
    made of becomes its own, and does no longer what it did: blocks are left out, and attention is replaced.

    Attributes:
        tokenizer: its fast tokenizer.
        layers: the supervised layers, counted from 0, in the order asked for.
        num_heads: attention heads of each layer, and ``head_dim`` the size of one.
        max_length: most tokens, special ones included, that it can read; None where there is no limit (DeBERTa).
        reads_windows: whether queries and keys of different inputs can be compared, as reading in windows wants.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Iterable[int] = (-1,),
        attn_implementation: str | None = None,
    ):
        config = model.config
        family = _family_of(config, "teacher")
        blocks = family.blocks(model)
        self.layers = resolve_layers(layers, len(blocks), "teacher")
        self.tokenizer = tokenizer
        self.num_heads: int = config.num_attention_heads
        self.head_dim: int = config.hidden_size // config.num_attention_heads
        self.max_length = family.max_length(config)
        self.reads_windows = not family.is_rotary
        _keep_no_maps(config)
        self._model = model.eval().requires_grad_(False)
        self._family = family(model, self.layers, attn_implementation)
        # Nothing above the highest supervised layer reaches the loss.
        del blocks[max(self.layers) + 1 :]
        self._counts_positions = config.model_type in family.counts_positions
        self._reads_token_types = (
            getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in tokenizer.model_input_names
        )

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        layers: Iterable[int] = (-1,),
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Teacher:
        """Loads a teacher from a sequence classification or base checkpoint, whole even where ZeRO-3 is configured.

        Args:
            name_or_path: hub name or folder, with safetensors weights and a fast tokenizer.
            layers: supervised layers, negative ones from the end.
            attn_implementation: "eager" everywhere, with the maps of one block held; "sdpa" everywhere, for DeBERTa in
                row chunks with its position bias; "flash_attention_2" of BERT-like teachers and ModernBERT;
                "flashdeberta", that package's kernel, of DeBERTa in half precision on a GPU. None takes the last where
                it can run, else "sdpa".
            dtype: None keeps the checkpoint's.

        Raises InputError for a checkpoint that cannot be read, a family without support, a slow tokenizer, a layer
        beyond the depth or without a whole map, and an attention implementation that cannot run; warns if the
        checkpoint is no NLI classifier.
        """
        config, family = load_teacher_config(name_or_path)
        with refusals(f"teacher {name_or_path!r}: cannot load a fast tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, use_fast=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise InputError(
                f"teacher {name_or_path!r}: {type(tokenizer).__name__} is a slow tokenizer; expected a fast one "
                "(tokenizer.json), whose character offsets align the two tokenisations"
            )
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise InputError(f"teacher {name_or_path!r}: no vocabulary found; expected a tokenizer beside the weights")

        _keep_no_maps(config)
        with (
            refusals(f"teacher {name_or_path!r}: cannot load the model from safetensors weights"),
            unpartitioned(),
            _without_load_report(),
        ):
            model, loading = AutoModel.from_pretrained(
                name_or_path,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **family.load_arguments(config),
            )
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise InputError(
                f"teacher {name_or_path!r}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, "
                f"among them {missing[0]}"
            )
        if not is_nli_classifier(config):
            logger.warning(
                "teacher %r is no NLI classifier (architectures %s, labels %s); Id-RM distils from an encoder "
                "fine-tuned on NLI, and an untuned teacher is much worse",
                name_or_path,
                config.architectures,
                list(config.id2label.values()),
            )
        return cls(model, tokenizer, layers, attn_implementation)

    def to(self, device: torch.device | str) -> Teacher:
        """Moves the teacher, in place."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def attention(self, inputs: InteractionInputs) -> list[PackedAttention]:
        """The attention of the supervised layers over a batch's content tokens, one entry per layer of ``layers``.

        Args:
            inputs: on the teacher's device. Read are teacher_input_ids, teacher_attention_mask and
                teacher_token_type_ids (batch, tokens) int64; teacher_index (teacher_total_tokens,) int64, flat into
                batch * tokens; teacher_positions (teacher_total_tokens,) int32, position in the joint input, and
                teacher_span, which they are below.

        Returns PackedAttention with q and k (teacher_total_tokens, num_heads, head_dim) in the model's dtype
        (autocast or not) and, for DeBERTa, its DisentangledBias. Padding on either side changes nothing.

        Raises ValueError for inputs beyond max_length.
        """
        length = inputs.teacher_input_ids.shape[1]
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"teacher_input_ids: expected at most {self.max_length} tokens, got {length}")
        model_inputs = {"input_ids": inputs.teacher_input_ids, "attention_mask": inputs.teacher_attention_mask}
        if self._reads_token_types:
            model_inputs["token_type_ids"] = inputs.teacher_token_type_ids
        if not self._counts_positions:
            model_inputs["position_ids"] = (inputs.teacher_attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        # DeBERTa v1 fails under autocast, and a teacher's dtype is chosen where it is loaded.
        with torch.autocast(inputs.teacher_input_ids.device.type, enabled=False):
            packed = self._family.attention(
                model_inputs, inputs.teacher_index, inputs.teacher_positions, inputs.teacher_span
            )
        return [packed[layer] for layer in self.layers]

    @torch.no_grad()
    def restored(self, q: Tensor, k: Tensor, inputs: InteractionInputs) -> list[PackedAttention]:
        """What ``attention`` gives for these inputs, without running the model, from the q and k it gave before.

        Args:
            q, k: (layers, teacher_total_tokens, num_heads, head_dim), of any floating dtype, which the result has.
            inputs: read are teacher_positions and teacher_span.
        """
        with torch.autocast(q.device.type, enabled=False):
            return [
                self._family.packed(layer, *tensors, inputs.teacher_positions, inputs.teacher_span)
                for layer, *tensors in zip(self.layers, q, k, strict=True)
            ]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of what decides its attention beyond rounding: weights in their dtype, configuration, layers."""
        digest = blake2b(digest_size=16)
        configuration = self._model.config.to_dict()
        for name in ("transformers_version", "_name_or_path", "architectures", "id2label", "label2id"):
            configuration.pop(name, None)
        digest.update(json.dumps([configuration, self.layers], sort_keys=True, default=str).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()))
        return digest.hexdigest()


def load_teacher_config(name_or_path: str) -> tuple[PretrainedConfig, type[TeacherFamily]]:
    """The configuration of a checkpoint and its family; InputError where there is none, or none that is supported."""
    require_folder(f"teacher {name_or_path!r}", name_or_path)
    with refusals(f"teacher {name_or_path!r}: cannot load the configuration"):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    return config, _family_of(config, f"teacher {name_or_path!r}")


def _family_of(config: PretrainedConfig, whose: str) -> type[TeacherFamily]:
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    supported = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    raise InputError(f"{whose}: model type {config.model_type!r} is not supported; expected one of {supported}")


def _keep_no_maps(config: PretrainedConfig) -> None:
    """Against a checkpoint whose configuration asks for the maps or hidden states of all layers."""
    config.output_attentions = config.output_hidden_states = False


def is_nli_classifier(config: PretrainedConfig) -> bool:
    """Whether a checkpoint says that it has a head for NLI's labels."""
    classifies = any("ForSequenceClassification" in name for name in config.architectures or ())
    return classifies and any("entail" in str(label).lower() for label in config.id2label.values())


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Silences the report of weights left out on purpose (heads, poolers); missing ones are checked by the caller."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
