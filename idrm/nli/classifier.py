"""Encoders as NLI classifiers: transformers' own classes, with a head for the labels at hand and a choice of pooling.

transformers' classifiers pool what stands at position 0, except ModernBERT's, which knows `classifier_pooling`. That
name is taken for all: "mean" puts the mean of the last hidden states over the attention mask at position 0.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from idrm.capture.teacher import FAMILIES
from idrm.errors import InputError, refusals, require_folder

logger = logging.getLogger(__name__)

POOLINGS = ("cls", "mean")

# Where the classifier of a model type reads position 0 of the last hidden states: in a module that they enter, or, in
# DistilBERT, at once from what its encoder returns.
_POOLER = {
    "bert": "bert.pooler",
    "camembert": "classifier",
    "deberta": "pooler",
    "deberta-v2": "pooler",
    "electra": "classifier",
    "roberta": "classifier",
    "xlm-roberta": "classifier",
}
_ENCODER = {"distilbert": "distilbert"}
_OWN_POOLING = ("modernbert",)


def load_classifier_config(name_or_path: str, *, whose: str | None = None) -> PreTrainedConfig:
    """The configuration of an encoder of a supported family, base checkpoint or classifier.

    Args:
        name_or_path: folder or hub name.
        whose: what an error names; None for "--model_name_or_path" and the name.

    Raises:
        InputError: nothing loadable there, a decoder, or an encoder of another family.
    """
    whose = whose or _whose(name_or_path)
    require_folder(whose, name_or_path)
    with refusals(whose):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    supported = {**_POOLER, **_ENCODER, **dict.fromkeys(_OWN_POOLING)}
    if config.model_type not in supported or getattr(config, "is_decoder", False):
        raise InputError(
            f"{whose}: is no encoder that can teach ({config.model_type}); expected one of "
            + ", ".join(sorted(supported))
        )
    return config


def load_classifier_tokenizer(name_or_path: str, *, whose: str | None = None) -> PreTrainedTokenizerBase:
    """The encoder's fast tokenizer, padding on the right: position 0 is pooled, and BERT counts positions from it.

    Args:
        name_or_path, whose: as `load_classifier_config` has them.

    Raises:
        InputError: nothing loadable there, a slow tokenizer, or one without a pad token.
    """
    whose = whose or _whose(name_or_path)
    with refusals(whose):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, use_fast=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise InputError(f"{whose}: has no fast tokenizer (tokenizer.json), which a teacher needs for its offsets")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{whose}: no vocabulary found; expected a tokenizer beside the weights")
    if tokenizer.pad_token is None:
        raise InputError(f"{whose}: its tokenizer has no pad token")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def classifier_labels(config: PreTrainedConfig) -> tuple[str, ...] | None:
    """The labels of a checkpoint that is an NLI classifier, lower-cased and in its order; None for any other."""
    labels = tuple(str(config.id2label[index]).lower() for index in sorted(config.id2label))
    return labels if _is_classifier(config) and "entailment" in labels and len(labels) in (2, 3) else None


def load_classifier(
    name_or_path: str,
    config: PreTrainedConfig,
    labels: Sequence[str],
    *,
    pooling: str | None = None,
    attn_implementation: str | None = None,
    new_head: bool = True,
    whose: str | None = None,
) -> PreTrainedModel:
    """The encoder as a classifier of these labels, float32, from safetensors only; partitioned where ZeRO-3 is set up.

    A head of the checkpoint is kept if it is one of the same labels in the same order (`classifier_labels`); any other
    is replaced by a fresh one, and where there is none, one is made; the log says so.

    Args:
        name_or_path, whose: as `load_classifier_config` has them.
        config: from `load_classifier_config`; the model's says what came of it, `classifier_pooling` included.
        labels: names in the order of the logits.
        pooling: "cls" or "mean"; None for what the checkpoint's config says, else "cls".
        attn_implementation: None leaves the choice to transformers.
        new_head: whether what the checkpoint lacks of a head, the pooler included, is made; otherwise it is refused.

    Raises:
        InputError: weights that cannot be loaded or that the encoder lacks, an attention implementation that
            transformers or the encoder does not know, or a pooling of the checkpoint's that is neither.
    """
    whose = whose or _whose(name_or_path)
    pooling = pooling or getattr(config, "classifier_pooling", "cls")
    if pooling not in POOLINGS:
        raise InputError(f"{whose}: its config has classifier_pooling {pooling!r}; expected one of {POOLINGS}")
    config = copy.deepcopy(config)
    config.classifier_pooling = pooling
    config.problem_type = "single_label_classification"
    known = classifier_labels(config)
    replaces = _is_classifier(config) and known != tuple(labels)
    names = dict(config.id2label) if known == tuple(labels) else dict(enumerate(labels))
    if not _is_classifier(config):
        config.num_labels = len(labels)
    if attn_implementation is not None:
        _require_attention(config, attn_implementation)
    with refusals(whose):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    new = sorted(loading["missing_keys"])
    lacking = _encoder_weights(model, new)
    if lacking:
        raise InputError(
            f"{whose}: the checkpoint lacks {len(lacking)} weights of {type(model).__name__}, among them {lacking[0]}"
        )
    if not new_head and (new or replaces):
        lacks = f"the checkpoint lacks {', '.join(new)}" if new else f"it has one for {_said(config)}"
        raise InputError(f"{whose}: has no whole head for {', '.join(labels)}: {lacks}")
    if replaces:
        new = sorted({*new, *_replace_output(model, len(labels))})
        logger.info("The head of the checkpoint, for %s, makes room for one for %s.", _said(config), ", ".join(labels))
    model.config.id2label, model.config.label2id = names, {name: index for index, name in names.items()}
    if new:
        logger.info("Newly initialised, to be learnt in this run: %s.", ", ".join(new))
    else:
        logger.info("The checkpoint is a classifier of %s: its head is kept.", _said(config))
    if pooling == "mean" and config.model_type not in _OWN_POOLING:
        _pool_by_mean(model)
    return model


def longest_input(config: PreTrainedConfig) -> int | None:
    """Tokens, special ones included, that the encoder reads at most; None where there is no limit."""
    family = next(family for family in FAMILIES if config.model_type in family.model_types)
    return family.max_length(config)


def reads_token_types(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether token types tell the encoder which sequence a token is of, as `idrm.capture.Teacher` decides it too."""
    return getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in tokenizer.model_input_names


def _whose(name_or_path: str) -> str:
    return f"--model_name_or_path {name_or_path}"


def _require_attention(config: PreTrainedConfig, attn_implementation: str) -> None:
    """Asks for the attention by a model without weights, whose refusal can have no other reason."""
    if is_deepspeed_zero3_enabled():
        return  # which would partition weights that are not there
    with refusals(f"--attn_implementation {attn_implementation}"), torch.device("meta"):
        AutoModelForSequenceClassification.from_config(
            config, attn_implementation=attn_implementation, trust_remote_code=False
        )


def _encoder_weights(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Those of the names of weights that are the encoder's and not its pooler's."""
    pooler = _POOLER.get(model.config.model_type)
    return [
        name
        for name in names
        if name.startswith(f"{model.base_model_prefix}.") and not (pooler and name.startswith(f"{pooler}."))
    ]


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def _said(config: PreTrainedConfig) -> str:
    return ", ".join(str(config.id2label[index]) for index in sorted(config.id2label))


def _replace_output(model: PreTrainedModel, num_labels: int) -> list[str]:
    """Puts a fresh output projection into the head; returns the names of its parameters."""
    head, name = (model.classifier, "out_proj") if hasattr(model.classifier, "out_proj") else (model, "classifier")
    old = getattr(head, name)
    partition = gather = contextlib.nullcontext
    if is_deepspeed_zero3_enabled():
        import deepspeed

        def partition():
            return deepspeed.zero.Init(config_dict_or_path=deepspeed_config())

        def gather():
            return deepspeed.zero.GatheredParameters(list(output.parameters()), modifier_rank=0)

    with partition():
        output = nn.Linear(old.in_features, num_labels, device=old.weight.device, dtype=old.weight.dtype)
    with gather():
        if output.weight.numel():
            nn.init.normal_(output.weight, std=model.config.initializer_range)
            nn.init.zeros_(output.bias)
    setattr(head, name, output)
    model.num_labels = num_labels
    return [
        name for name, parameter in model.named_parameters() if parameter is output.weight or parameter is output.bias
    ]


def _pool_by_mean(model: PreTrainedModel) -> None:
    """What reads position 0 of the last hidden states, (batch, tokens, size), gets their mean, (batch, 1, size)."""
    mask: dict[str, Tensor | None] = {}

    def keep_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask["attention"] = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def mean(states: Tensor) -> Tensor:
        weights = states.new_ones(states.shape[:2]) if mask["attention"] is None else mask["attention"].to(states.dtype)
        return (states * weights.unsqueeze(-1)).sum(1, keepdim=True) / weights.sum(1)[:, None, None]

    def pool_input(module: nn.Module, args: tuple) -> tuple:
        return (mean(args[0]), *args[1:])

    def pool_output(module: nn.Module, args: tuple, output: Any) -> Any:
        output["last_hidden_state"] = mean(output["last_hidden_state"])
        return output

    model.register_forward_pre_hook(keep_mask, with_kwargs=True)
    model_type = model.config.model_type
    if model_type in _ENCODER:
        model.get_submodule(_ENCODER[model_type]).register_forward_hook(pool_output)
    else:
        model.get_submodule(_POOLER[model_type]).register_forward_pre_hook(pool_input)
