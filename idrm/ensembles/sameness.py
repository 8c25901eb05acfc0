"""What has to be the same of runs whose weights are averaged: architecture, tokenizer, and where they began."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import cached_file

from idrm.command_line import RUN_FILE
from idrm.ensembles.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint, read_checkpoint
from idrm.errors import InputError, refusals
from idrm.evaluation.reading import load_tokenizer
from idrm.evaluation.reward_model import require_reward_model
from idrm.models import DROPOUT_FIELDS

logger = logging.getLogger("idrm.ensembles")

# Of a config.json, what no reward hangs on. The dtype is compared weight by weight.
_FREE_TO_DIFFER = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", *DROPOUT_FIELDS}


@dataclass(frozen=True)
class AveragedRun:
    """One run of those that are averaged.

    Attributes:
        folder: of its model.
        checkpoint: its weights, unread.
        base: what its run.yaml says it was trained from; None where there is no run.yaml.
        seed: of the run, by its run.yaml; None where there is none.
        latent_size: of the bottleneck that it had in the place of its reward head, by its run.yaml; None for none.
    """

    folder: Path
    checkpoint: Checkpoint
    base: str | None
    seed: int | None
    latent_size: int | None = None


def require_averageable(folders: Sequence[str]) -> tuple[list[AveragedRun], PreTrainedTokenizerBase]:
    """Holds runs against the first of them; headers, configurations and tokenizers are read, and no weight.

    Returns:
        (runs, tokenizer), the tokenizer being that of all.

    Raises:
        InputError: a folder that is given twice or holds no reward model in safetensors; names, shapes or dtypes of
            weights, configurations, tokenizers or bases that differ; heads that every run initialised for itself.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise InputError(f"{path}: is given twice")
        if not path.is_dir():
            raise InputError(f"{path}: no such folder")
    runs: list[AveragedRun] = []
    tokenizers: list[PreTrainedTokenizerBase] = []
    for path in paths:
        require_reward_model(_as_path(path))
        checkpoint = read_checkpoint(path)
        tokenizers.append(load_tokenizer(_as_path(path), False))
        recorded = _recorded(path)
        # run.yaml leaves out what is at its default.
        seed = recorded.get("seed", TrainingArguments.seed) if recorded else None
        base, latent_size = (recorded.get(name) for name in ("model_name_or_path", "inform_latent_size"))
        runs.append(AveragedRun(path, checkpoint, base, seed, latent_size))
    for run, tokenizer in zip(runs[1:], tokenizers[1:], strict=True):
        _require_same_config(runs[0].folder, run.folder)
        _require_same_tensors(runs[0].checkpoint, run.checkpoint)
        _require_same_tokenizer(runs[0].folder, tokenizers[0], run.folder, tokenizer)
    _require_same_base(runs)
    return runs, tokenizers[0]


def _as_path(path: Path) -> str:
    """What transformers takes for a folder and never for a hub name."""
    return str(path.absolute())


def _recorded(folder: Path) -> dict[str, Any]:
    """What run.yaml says; empty where there is none."""
    path = folder / RUN_FILE
    if not path.exists():
        return {}
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error
    if not isinstance(recorded, dict):
        raise InputError(f"{path}: expected a mapping of flags to values, found {type(recorded).__name__}")
    return recorded


def _require_same_config(first: Path, other: Path) -> None:
    ours, theirs = (
        _without_free_fields(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        for folder in (first, other)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{other}: its config.json has {name} {theirs.get(name)!r}, and that of {first} {ours.get(name)!r}"
            )


def _without_free_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those nested in it, without what may differ."""
    return {
        name: _without_free_fields(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _FREE_TO_DIFFER
    }


def _require_same_tensors(first: Checkpoint, other: Checkpoint) -> None:
    unpaired = sorted(first.tensors.keys() ^ other.tensors.keys())
    if unpaired:
        has, lacks = (first, other) if unpaired[0] in first.tensors else (other, first)
        raise InputError(f"{lacks.folder}: has no weight {unpaired[0]}, which {has.folder} has")
    for name, ours in first.tensors.items():
        theirs = other.tensors[name]
        for what, here, there in (("shape", theirs.shape, ours.shape), ("dtype", theirs.dtype, ours.dtype)):
            if here != there:
                raise InputError(f"{other.folder}: {name} has the {what} {here}, and in {first.folder} {there}")


def _require_same_tokenizer(
    first: Path, ours: PreTrainedTokenizerBase, other: Path, theirs: PreTrainedTokenizerBase
) -> None:
    for what, ours_is, theirs_is in zip(
        ("vocabulary", "special tokens", "chat template", "rules of tokenisation"),
        _described(ours),
        _described(theirs),
        strict=True,
    ):
        if ours_is != theirs_is:
            raise InputError(f"{other}: its tokenizer has another {what} than that of {first}")


def _described(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """What of a tokenizer decides which ids a text gets: vocabulary, special tokens, chat template, all else."""
    rules: Mapping[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by whoever used the tokenizer last, and for each call anew.
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return tokenizer.get_vocab(), special, tokenizer.chat_template, rules


def _require_same_base(runs: Sequence[AveragedRun]) -> None:
    unknown = [run for run in runs if run.base is None]
    known = [run for run in runs if run.base is not None]
    if unknown and len(runs) > 1:
        logger.warning(
            "%s: no %s says what was trained there. That all began from the same weights is not known; the distance of "
            "the runs from their mean, printed at the end, would show it if not.",
            ", ".join(str(run.folder) for run in unknown),
            RUN_FILE,
        )
    for run in known[1:]:
        if run.base != known[0].base and not _is_same_folder(run.base, known[0].base):
            raise InputError(
                f"{run.folder}: was trained from {run.base}, and {known[0].folder} from {known[0].base}; only runs "
                "from the same weights can be averaged"
            )
    for run in known[1:]:
        if (run.latent_size or known[0].latent_size) and (run.latent_size, run.seed) != (
            known[0].latent_size,
            known[0].seed,
        ):
            first, other = (f"--inform_latent_size {one.latent_size}, seed {one.seed}" for one in (known[0], run))
            raise InputError(
                f"{run.folder}: its reward head comes from another bottleneck ({other}) than that of {known[0].folder} "
                f"({first}), which each run initialises by its seed: their mean means nothing"
            )
    if len(known) > 1 and len({run.seed for run in known}) > 1:
        _require_shared_head(known)


def _is_same_folder(first: str, second: str) -> bool:
    paths = [Path(name).expanduser() for name in (first, second)]
    return all(path.is_dir() for path in paths) and paths[0].resolve() == paths[1].resolve()


def _require_shared_head(runs: Sequence[AveragedRun]) -> None:
    """Refuses runs of different seeds from a base without a reward head: each seed has initialised another one."""
    base = runs[0].base
    names = _names_of_weights(base)
    if names is None:
        logger.warning(
            "%s, which the runs were trained from, is not on this machine: whether it had the reward head that they "
            "share is not known.",
            base,
        )
        return
    prefix = _prefix_of_the_rest(runs[0].folder)
    new = [name for name in runs[0].checkpoint.tensors if not name.startswith(prefix) and name not in names]
    if new:
        raise InputError(
            f"{base}, which the runs were trained from, has no {new[0]}: each seed initialised another one, and their "
            "mean means nothing; train all from one model that has it (idrm train --linear_probing true makes it)"
        )


def _prefix_of_the_rest(folder: Path) -> str:
    """What the names of all weights but the reward head's begin with."""
    with refusals(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(_as_path(folder))
        return AutoModelForSequenceClassification.from_config(config).base_model_prefix + "."


def _names_of_weights(name_or_path: str) -> set[str] | None:
    """The names of a model's weights, None where it is not on this machine; nothing is downloaded."""
    for file in (INDEX_FILE, WEIGHTS_FILE):
        try:
            found = cached_file(name_or_path, file, local_files_only=True)
            if found is None:
                continue
            if file == INDEX_FILE:
                return set(json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"])
            with safe_open(found, framework="pt") as opened:
                return set(opened.keys())
        except (KeyError, OSError, SafetensorError, ValueError):
            continue
    return None
