"""The processes of a run: how a command ends, and how its ranks and devices are made to agree."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import torch
from huggingface_hub import whoami
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations

from idrm.command_line import Arguments, TrainingRun
from idrm.errors import InputError, refusals

SECONDS_FOR_FIRST_RANK = 60


@contextlib.contextmanager
def command() -> Iterator[None]:
    """What a command does runs in here: bad input and an interruption are one line on stderr, status 2 and 130."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("idrm").setLevel(logging.INFO if is_local_main() else logging.ERROR)
    # It prints its retries itself: each would be there twice.
    logging.getLogger("huggingface_hub").propagate = False
    try:
        yield
    except InputError as error:
        if not is_local_main():
            # The launcher ends all processes with the first that fails. Mostly all find the same fault, and the first
            # rank, which may be behind, is to say it, once; this one does where the first has found none.
            time.sleep(SECONDS_FOR_FIRST_RANK)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_local_main():
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _end_rank()


def _end_rank() -> NoReturn:
    """Ends a rank that has finished, without taking the interpreter down under its threads.

    DeepSpeed keeps process groups alive whose threads hold Python objects. One that wakes once the interpreter is gone
    aborts the process, seldom and on busy machines, and the launcher reports a run as failed that has saved everything.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def termination_as_exit() -> Iterator[None]:
    """SIGTERM, which a scheduler sends, raises SystemExit in here, so that what was begun is put away; status 143."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def prepare_training(run: TrainingRun[Arguments], script: str) -> Arguments:
    """Builds a run's TrainingArguments in processes that are ready for them, and seeds the random generators.

    Args:
        run: the run; its `use_cpu` is set where there is no accelerator.
        script: the entry point, for the command in an error.

    Raises:
        InputError: arguments that transformers or DeepSpeed refuses, one process with several devices, a tracker that
            is not there, or a hub to push to that cannot be reached.
    """
    _prepare_processes(run)
    args = run.training_arguments()
    _require_one_device(args, script)
    missing = sorted(set(args.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise InputError(f"--report_to {missing[0]}: is not installed here, or no tracker that transformers knows")
    if args.push_to_hub and args.process_index == 0:
        _require_hub(args)
    set_seed(args.seed)
    return args


def require_trainable_setup(trainer: Trainer) -> None:
    """Builds what a training begins with, so that what cannot be built fails before anything has been written.

    The optimizer is kept, for layer-wise ones put hooks on the model; DeepSpeed builds its own.

    Raises:
        InputError: what an optimizer or a schedule refuses. Others are for `refused_arguments`, in which this runs.
    """
    args = trainer.args
    batches = len(trainer.get_train_dataloader())
    with refusals(f"--optim {args.optim.value}" + (f", --optim_args {args.optim_args}" if args.optim_args else "")):
        if args.deepspeed is None:
            trainer.create_optimizer()
        elif not trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("optimizer"):
            trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    steps = math.ceil(args.num_train_epochs * batches / args.gradient_accumulation_steps)
    # A schedule sets the learning rate of its optimizer as it is built: this one is not the trainer's.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    with refusals(f"--lr_scheduler_type {args.lr_scheduler_type.value}"):
        trainer.create_scheduler(args.max_steps if args.max_steps > 0 else steps, optimizer)
    trainer.lr_scheduler = None


def is_local_main() -> bool:
    """Whether this is its machine's first process."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _prepare_processes(run: TrainingRun) -> None:
    """Makes accelerate and DeepSpeed agree on processes and devices before TrainingArguments asks either.

    Without an accelerator the run is on the CPU; its ranks then talk over gloo, which DeepSpeed has to be told. A
    DeepSpeed run that no launcher started is one rank of one.
    """
    if not torch.accelerator.is_available():
        run.training["use_cpu"] = True
    if run.training["deepspeed"] is None:
        return
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        # Without it, DeepSpeed asks numactl in a process of its own at every reduction on a CPU.
        os.environ["LOCAL_SIZE"] = "1"
    if run.training["use_cpu"]:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")


def _require_hub(args: TrainingArguments) -> None:
    try:
        whoami(token=args.hub_token)
    except Exception as error:
        # What is raised where there is no network is the error of whichever client huggingface_hub is built on.
        raise InputError(f"--push_to_hub: the hub cannot be asked: {' '.join(str(error).split())}") from error


def _require_one_device(args: TrainingArguments, script: str) -> None:
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} devices: start one for each (deepspeed {script} --deepspeed "
            "ds_zero3.json ...), or show it one with CUDA_VISIBLE_DEVICES"
        )
