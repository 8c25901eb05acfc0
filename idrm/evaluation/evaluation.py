"""Models on benchmarks: each model is loaded once, by itself, and decides every item."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from idrm.alignment.rendering import TemplateRefusal
from idrm.errors import InputError, require_folder
from idrm.evaluation.batching import DEFAULT_BATCH_SIZE, progress_bar
from idrm.evaluation.benchmark import Benchmark
from idrm.evaluation.implicit_reward import (
    DEFAULT_BETA,
    ImplicitRewardModel,
    PolicyInput,
    load_implicit_reward_model,
    require_policy,
)
from idrm.evaluation.outcomes import Outcome, Outcomes
from idrm.evaluation.reading import load_config, load_tokenizer, readable_length, torch_dtype_of
from idrm.evaluation.reward_model import RewardModel, load_reward_model, require_reward_model
from idrm.shared_prompts import packed_attention_refusal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scoring:
    """How models are loaded and scored.

    Attributes:
        dtype: "float32", "bfloat16", "float16", "float64" or "auto", as saved.
        device: None for the accelerator, or the CPU where there is none.
        max_length: most tokens of a sequence; None for 2,048, or a model's limit where that is lower.
        batch_size: most sequences in a batch.
        tokens_per_batch: most tokens in a batch, padding included; None for any.
        is_implicit: the models are DPO policies, whose reward is implicit.
        reference: what they were trained from; None, with `is_implicit`, for a reward without a reference.
        beta: the factor of an implicit reward.
        attn_implementation: None leaves the choice to transformers.
        share_prompt: whether what sequences begin with in common is read once: "auto", wherever a model can, "on" or
            "off"; policies always read it again.
        trust_remote_code: let a model's repository run its own code.
    """

    dtype: str = "float32"
    device: str | None = None
    max_length: int | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    tokens_per_batch: int | None = None
    is_implicit: bool = False
    reference: str | None = None
    beta: float = DEFAULT_BETA
    attn_implementation: str | None = None
    share_prompt: Literal["auto", "on", "off"] = "auto"
    trust_remote_code: bool = False


def evaluate_models(
    models: Mapping[str, str],
    benchmarks: Sequence[Benchmark],
    scoring: Scoring | None = None,
    *,
    on_outcomes: Callable[[Outcomes], None] | None = None,
    show_progress: bool = True,
) -> list[Outcomes]:
    """Every model on every benchmark, one model in memory at a time.

    Args:
        models: {label: folder or hub name}.
        benchmarks: from `idrm.evaluation.catalogue`.
        scoring: how; None for the defaults.
        on_outcomes: called with each result as soon as it is there, so that nothing is lost with a later model.

    Returns:
        Outcomes, benchmark after benchmark of the first model, then of the next.

    Raises:
        InputError: a model that cannot be scored; all are looked at before the first is loaded
            (`require_scorable`).
    """
    scoring = scoring or Scoring()
    for name in models.values():
        require_scorable(name, scoring)
    device = device_of(scoring)
    results = []
    for label, name in models.items():
        model = _load(name, scoring, device)
        for benchmark in benchmarks:
            outcomes = _outcomes(model, label, name, benchmark, scoring, show_progress)
            if on_outcomes is not None:
                on_outcomes(outcomes)
            results.append(outcomes)
        # Its memory is the next one's.
        del model
        gc.collect()
        if device.type != "cpu":
            torch.accelerator.empty_cache()
    return results


def require_scorable(name: str, scoring: Scoring) -> None:
    """Looks at a model as far as that goes without loading it: its kind, its tokenizer, lengths, local weights.

    Raises:
        InputError: it cannot be scored.
    """
    torch_dtype_of(scoring.dtype)
    device_of(scoring)
    trust = scoring.trust_remote_code
    names = [name]
    if scoring.is_implicit and scoring.reference is not None:
        names.append(scoring.reference)
    for checked in names:
        require_folder(checked, checked)
        if not Path(checked).is_dir():
            logger.info("%s: downloads from the Hugging Face hub, unless it is on this machine already.", checked)
        if scoring.is_implicit:
            require_policy(checked, trust_remote_code=trust)
        else:
            require_reward_model(checked, trust_remote_code=trust)
        length = readable_length(load_config(checked, trust), scoring.max_length)
        if scoring.share_prompt == "on":
            refusal = packed_attention_refusal(load_config(checked, trust), scoring.attn_implementation, length)
            if refusal is not None:
                raise InputError(f"--share_prompt on: {checked}: {refusal}")
        load_tokenizer(checked, trust)
        _require_weights(checked)


def device_of(scoring: Scoring) -> torch.device:
    """The device that is asked for, or the accelerator; InputError for one that is not there."""
    if scoring.device is None:
        has_accelerator = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if has_accelerator else torch.device("cpu")
    try:
        device = torch.device(scoring.device)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {scoring.device}: is not there ({reason})") from error
    return device


def _load(name: str, scoring: Scoring, device: torch.device) -> RewardModel | ImplicitRewardModel:
    options = {
        "dtype": scoring.dtype,
        "device": device,
        "max_length": scoring.max_length,
        "attn_implementation": scoring.attn_implementation,
        "trust_remote_code": scoring.trust_remote_code,
    }
    if scoring.is_implicit:
        return load_implicit_reward_model(name, scoring.reference, beta=scoring.beta, **options)
    return load_reward_model(name, share_prompt=scoring.share_prompt, **options)


def _outcomes(
    model: RewardModel | ImplicitRewardModel,
    label: str,
    name: str,
    benchmark: Benchmark,
    scoring: Scoring,
    show_progress: bool,
) -> Outcomes:
    described = f"{label} on {benchmark.name}"
    read: list[Sequence[list[int] | PolicyInput] | None] = []
    refusals: dict[str, int] = {}
    with progress_bar(show_progress) as progress:
        for item in progress.track(benchmark.items, description=f"{described}: reading"):
            try:
                if len(item.rejected) == 1:
                    read.append(model.encode_pair(item.chosen, item.rejected[0], item.conversational))
                else:
                    read.append([model.encode(each, item.conversational) for each in (item.chosen, *item.rejected)])
            except TemplateRefusal as refusal:
                refusals[str(refusal)] = refusals.get(str(refusal), 0) + 1
                read.append(None)
    for reason, count in refusals.items():
        logger.warning("%s: %d items cannot be read, and count as lost: %s", described, count, reason)
    rewards = iter(
        model.rewards(
            [sequence for sequences in read if sequences is not None for sequence in sequences],
            scoring.batch_size,
            tokens_per_batch=scoring.tokens_per_batch,
            description=described,
            show_progress=show_progress,
        )
    )
    items = []
    for item, sequences in zip(benchmark.items, read, strict=True):
        responses = 1 + len(item.rejected)
        values = [math.nan] * responses if sequences is None else [next(rewards) for _ in range(responses)]
        lengths = [0] * responses if sequences is None else [len(sequence) for sequence in sequences]
        items.append(
            Outcome(
                item.key, item.subset, item.prompt_key, values[0], tuple(values[1:]), lengths[0], tuple(lengths[1:])
            )
        )
    origin = {
        "model": name,
        "kind": benchmark.kind,
        "source": benchmark.source,
        "version": benchmark.version,
        **asdict(scoring),
        "max_length": model.max_length,
    }
    return Outcomes(label, benchmark.name, items, origin)


def _require_weights(name: str) -> None:
    """Refuses a local folder whose weights are not there, or not whole, before hours are spent on others."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = [path.name for path in folder.glob("*.safetensors")] or ["model.safetensors"]
        for file in files:
            with safe_open(folder / file, framework="pt"):
                pass
    except (AttributeError, KeyError, OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{name}: its weights are not there or not whole ({' '.join(str(error).split())})") from error
