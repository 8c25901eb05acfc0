"""Flags of a command that trains: a YAML file merged with the command line, and what a run is that they describe."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_liger_kernel_available

from idrm.errors import InputError

RUN_FILE = "run.yaml"
# Facts of one launch, and secrets: not part of the run that run.yaml describes.
_NOT_RECORDED = ("config", "local_rank", "resume_from_checkpoint", "hub_token")

Arguments = TypeVar("Arguments", bound=TrainingArguments)


@dataclass(frozen=True)
class TrainingRun(Generic[Arguments]):
    """One training run as its user described it, before anything was loaded; every command has a subclass.

    Attributes:
        training: the values of `training_kind`, which initialises devices and processes when it is built.
        given: the arguments that the command line or the YAML file names, with their values.
        recorded: what run.yaml says: all our own arguments and every other one that differs from its default.
        training_kind: the command's TrainingArguments.
        own_arguments: its other argument classes, which are this project's and not transformers'.
        free_to_change: own arguments that a resumed run may change: none of them changes the weights that come out.
        free_to_move: folders that may have moved, where only whether there is one changes them.
    """

    training: dict[str, Any]
    given: dict[str, Any]
    recorded: dict[str, Any]

    training_kind: ClassVar[type[TrainingArguments]]
    own_arguments: ClassVar[tuple[type, ...]]
    free_to_change: ClassVar[tuple[str, ...]] = ()
    free_to_move: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def own_argument_names(cls) -> list[str]:
        """Names of the arguments that are this project's and not transformers'."""
        return [entry.name for kind in cls.own_arguments for entry in fields(kind)]

    @classmethod
    def own_defaults(cls) -> dict[str, Any]:
        """What these arguments are where nobody gives them."""
        own = (entry for kind in cls.own_arguments for entry in fields(kind))
        return {
            entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory() for entry in own
        }

    @property
    def kept_on_resume(self) -> list[str]:
        """Names of the arguments that a resumed run may not change, `free_to_change` and `free_to_move` apart."""
        return self.own_argument_names()

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"]).expanduser()

    def training_arguments(self) -> Arguments:
        """Builds TrainingArguments, and with them the process group and DeepSpeed's configuration."""
        _require_compiler(self.training)
        with refused_arguments():
            args = self.training_kind(**self.training)
        if args.deepspeed and args.hf_deepspeed_config.mismatches:
            # transformers would say so too, but only once it trains.
            mismatches = "; ".join(mismatch.removeprefix("- ") for mismatch in args.hf_deepspeed_config.mismatches)
            raise InputError(f'--deepspeed: contradicts the flags ({mismatches}); write "auto" there')
        return args


class FlagParser(HfArgumentParser):
    """Raises InputError where argparse prints its usage, which is 700 lines long here.

    Args:
        kinds: the dataclasses whose fields are the flags.
        prog: the command, as the user starts it.
        named: flags that a YAML file may give as a mapping, which stands for a list of name=value.
    """

    def __init__(self, kinds: Iterable[type], prog: str, named: Iterable[str] = ()):
        super().__init__(tuple(kinds), prog=prog, allow_abbrev=False)
        self.add_argument("--config", metavar="RUN.YAML", help="YAML file with values for any of these flags.")
        self._named = frozenset(named)

    def error(self, message: str):
        raise InputError(message)

    def values(self, argv: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """All values by flag, and those that the command line or the YAML file names; the command line wins.

        Raises:
            InputError: an unknown flag or YAML key, or a value of the wrong kind.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
        config_parser.add_argument("--config")
        path = config_parser.parse_known_args(argv)[0].config
        # argparse leaves alone what the namespace has already: what is still unset then was not given.
        unset = object()
        names = [action.dest for action in self._actions]
        tokens = [*(self._yaml_tokens(path) if path else []), *argv]
        given = vars(self.parse_args(tokens, Namespace(**dict.fromkeys(names, unset))))
        given = {name: value for name, value in given.items() if value is not unset}
        return vars(self.parse_args(tokens)), given

    def defaults(self) -> dict[str, Any]:
        """The value of every flag where none is given."""
        return vars(self.parse_args([]))

    def _yaml_tokens(self, path: str) -> list[str]:
        """The YAML file as command-line tokens, so that argparse checks both alike and the later one wins."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--config {path}: cannot be read ({error.__class__.__name__})") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            raise InputError(f"{path}{f':{mark.line + 1}' if mark else ''}: is not valid YAML") from error
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected a mapping of flags to values, found {type(content).__name__}")
        known = {action.dest for action in self._actions} - {"help", "config"}
        tokens: list[str] = []
        for key, value in content.items():
            if key not in known:
                raise InputError(
                    f"{path}: unknown key {key!r}; keys are the flags of `{self.prog} --help` without dashes"
                )
            if value is None:
                continue
            if key in self._named and isinstance(value, dict):
                value = [f"{name}={source}" for name, source in value.items()]
            tokens += flag_tokens({key: value})
        try:
            self.parse_args(tokens)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return tokens


def flag_tokens(flags: Mapping[str, Any]) -> list[str]:
    """Values by flag as the tokens of a command line: a list gives several, a mapping is one in JSON."""
    tokens: list[str] = []
    for flag, value in flags.items():
        if isinstance(value, (list, tuple)):
            tokens += [f"--{flag}", *map(str, value)]
        else:
            tokens.append(f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return tokens


def fields_of(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that are fields of a dataclass."""
    return {entry.name: values[entry.name] for entry in fields(kind) if entry.init}


def recorded_values(
    values: dict[str, Any], defaults: dict[str, Any], own: Iterable[str], not_recorded: Iterable[str] = ()
) -> dict[str, Any]:
    """What run.yaml says of a run (`TrainingRun.recorded`)."""
    left_out, own = {*_NOT_RECORDED, *not_recorded}, set(own)
    return {
        name: value
        for name, value in values.items()
        if name not in left_out and (name in own or value != defaults[name])
    }


def named_sets(flag: str, entries: Sequence[str] | None) -> dict[str, str]:
    """Splits name=path entries of a flag into {name: path}; one entry without a name has the name ''.

    A name is what can stand in that of a metric and of a file: letters, digits, "_", "." and "-".

    Raises:
        InputError: several sets of which one has no name or the same name as another.
    """
    named = {}
    for entry in entries or ():
        name, separator, path = entry.partition("=")
        if not separator or not re.fullmatch(r"[\w.-]+", name) or os.path.exists(entry):
            name, path = "", entry
        if name in named or (not name and len(entries) > 1):
            raise InputError(f"--{flag} {entry}: expected name=path with a name of its own for each of several")
        named[name] = path
    return named


def split_at_dashes(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """What stands before a -- on the command line, the process's own unless given, and what stands behind it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    position = argv.index("--") if "--" in argv else len(argv)
    return argv[:position], argv[position + 1 :]


def named_values(entries: Sequence[str] | None) -> dict[str, str]:
    """Splits the name=value entries of --values; InputError for one that is none, or a name that is there twice."""
    named: dict[str, str] = {}
    for entry in entries or ():
        name, separator, value = entry.partition("=")
        if not separator or not re.fullmatch(r"[\w.-]+", name) or name in named:
            raise InputError(f"--values {entry}: expected name=value with a name of its own")
        named[name] = value
    return named


def require_at_least(values: dict[str, Any], lowest: dict[str, float]) -> None:
    """Refuses, of the flags named, one whose value lies below the lowest or is no finite number; None is legal."""
    for flag, bound in lowest.items():
        if values[flag] is not None and not bound <= values[flag] < math.inf:
            raise InputError(f"--{flag}: expected at least {bound}, got {values[flag]}")


def require_trainable(values: dict[str, Any]) -> None:
    """Refuses values of transformers' flags that it takes, and with which no training can be set up or get anywhere."""
    require_at_least(
        values,
        {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.0,
            "weight_decay": 0.0,
            "adam_beta1": 0.0,
            "adam_beta2": 0.0,
            "adam_epsilon": 0.0,
            "max_grad_norm": 0.0,
            "warmup_steps": 0,
            "dataloader_num_workers": 0,
        },
    )
    for flag in ("adam_beta1", "adam_beta2"):
        if values[flag] >= 1:
            raise InputError(f"--{flag}: expected less than 1, got {values[flag]}")
    for flag in ("seed", "data_seed"):
        if values[flag] is not None and not 0 <= values[flag] < 2**32:
            raise InputError(f"--{flag}: expected an integer from 0 to {2**32 - 1}, got {values[flag]}")
    if values["max_steps"] <= 0 and not 0 < values["num_train_epochs"] < math.inf:
        raise InputError(f"--num_train_epochs: expected more than 0, got {values['num_train_epochs']:g}")
    if values["use_liger_kernel"] and not is_liger_kernel_available():
        raise InputError("--use_liger_kernel: liger-kernel is not installed here")


@contextlib.contextmanager
def refused_arguments() -> Iterator[None]:
    """Turns what transformers, accelerate or torch raises about arguments, as a run is set up, into one line."""
    try:
        yield
    except InputError:
        raise
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"training arguments: {' '.join(str(error).split()) or type(error).__name__}") from error


def _require_compiler(training: dict[str, Any]) -> None:
    """Refuses a torch.compile that does not exist: transformers hands it to accelerate through the environment."""
    backend, mode = training["torch_compile_backend"], training["torch_compile_mode"]
    if backend is None and mode is None:
        return
    flags = {"torch_compile_backend": backend, "torch_compile_mode": mode}
    given = ", ".join(f"--{flag} {value}" for flag, value in flags.items() if value is not None)
    try:
        torch.compile(torch.nn.Identity(), backend=backend or "inductor", mode=mode)
    except RuntimeError as error:
        raise InputError(f"{given}: {' '.join(str(error).split())}") from error


def length_within(flag: str, asked: int | None, limit: int | None, default: int) -> int:
    """The length that a flag asks of a model, or the default, or the model's limit where that is lower.

    Raises:
        InputError: more was asked than the model reads.
    """
    if asked is None:
        return default if limit is None else min(default, limit)
    if limit is not None and asked > limit:
        raise InputError(f"--{flag} {asked}: the model reads {limit} tokens at most")
    return asked


def require_defaults(values: dict[str, Any], defaults: dict[str, Any], flags: Iterable[str], what: str) -> None:
    """Refuses, of these flags of transformers', one that was given although it would do nothing for `what`."""
    for flag in flags:
        if values[flag] != defaults[flag]:
            raise InputError(f"--{flag}: is not for {what}; leave it out")
    if values["fsdp"]:
        raise InputError("--fsdp: is not there yet; give --deepspeed ds_zero3.json")


def require_saving_deepspeed(config: str | None) -> None:
    """Refuses, before hours of training, a DeepSpeed configuration that cannot save a model."""
    if config is None:
        return
    where = "--deepspeed" if config.startswith("{") else config
    try:
        content = json.loads(config if config.startswith("{") else Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--deepspeed {config}: cannot be read ({error.__class__.__name__})") from error
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{where}{line}: is not valid JSON") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(content).__name__}")
    zero = content.get("zero_optimization") or {}
    gather = "stage3_gather_16bit_weights_on_model_save"
    if zero.get("stage") == 3 and zero.get(gather) is not True:
        raise InputError(f"{where}: zero_optimization needs {gather}: true, else ZeRO-3 saves shards and no model")
