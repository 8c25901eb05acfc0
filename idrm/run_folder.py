"""The output folder of a run: whose it is, where its last whole checkpoint lies, and the run.yaml that describes it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME

from idrm.command_line import RUN_FILE, TrainingRun
from idrm.errors import InputError

logger = logging.getLogger(__name__)


def resume_checkpoint(config: TrainingRun) -> Path | None:
    """The checkpoint to go on from, or None to start at the first step.

    A checkpoint counts once its trainer state is there and whole, which is written last: one that a killed run left
    half-written is passed over.

    Raises:
        InputError: the folder cannot be written to, or holds another run, or a run that --resume_from_checkpoint was
            not given for, or the checkpoint named is none.
    """
    folder = config.output_dir
    wanted = config.training["resume_from_checkpoint"]
    resumes = wanted is not None and wanted.lower() != "false"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: is a file; expected a folder")
    require_writable("--output_dir", folder)
    if (folder / RUN_FILE).exists():
        if not resumes:
            raise InputError(
                f"--output_dir {folder}: holds another run ({RUN_FILE}); give another folder, or "
                "--resume_from_checkpoint to go on with that run"
            )
        _require_same_run(folder / RUN_FILE, config)
    elif any(folder.glob("checkpoint-*")) or (folder / "config.json").exists():
        raise InputError(f"--output_dir {folder}: holds a model or checkpoints of another run; give another folder")
    if not resumes:
        return None
    if wanted.lower() != "true":
        checkpoint = Path(wanted).expanduser()
        if not _is_complete(checkpoint):
            raise InputError(f"--resume_from_checkpoint {wanted}: expected a folder with {TRAINER_STATE_NAME}")
        return checkpoint
    complete = [path for path in folder.glob("checkpoint-*") if _is_complete(path)]
    if not complete:
        logger.info("No complete checkpoint in %s: starting at the first step.", folder)
        return None
    return max(complete, key=lambda path: int(re.search(r"\d+$", path.name)[0]))


def write_run_file(config: TrainingRun) -> None:
    """Writes run.yaml, which `--config` reads back."""
    write_whole(config.output_dir / RUN_FILE, yaml.safe_dump(config.recorded, sort_keys=True, allow_unicode=True))


def read_run_file(path: Path, config: TrainingRun) -> dict[str, Any]:
    """What a run.yaml says, for a comparison with `config.recorded`.

    One that an earlier version wrote lacks the arguments that came later, which stand at their defaults then.

    Raises:
        InputError: it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return {**config.own_defaults(), **content}
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file through a temporary name, so that it is whole or not there; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_all_whole(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Writes files that belong together, all of them whole before the first one gets its name; makes the folder.

    Raises InputError where it cannot.
    """
    temporary = {name: folder / f".{name}-{os.getpid()}" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except OSError as error:
        raise InputError(f"output_dir {folder}: {error.strerror} while writing {error.filename}") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()
    return [folder / name for name in contents]


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def require_writable(flag: str, folder: Path) -> None:
    """Writes a file without a name where the folder is or would be made, rather than fail once all is loaded.

    Raises InputError that names the flag.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be written to ({error.strerror})") from error


@contextlib.contextmanager
def sole_use(flag: str, folder: Path) -> Iterator[int]:
    """Holds a folder, which is made, against other commands that would hold it.

    Yields a file descriptor: the folder is held until this process, and every one that has inherited it, has ended.

    Raises:
        InputError: another command holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{flag} {folder}: another command is at work there, or a run that it started") from error
        except OSError as error:
            logger.warning("%s %s: cannot be locked (%s).", flag, folder, error.strerror)
        yield descriptor
    finally:
        os.close(descriptor)


def _require_same_run(path: Path, config: TrainingRun) -> None:
    before = read_run_file(path, config)
    kept = config.kept_on_resume
    for name in kept:
        moved = name in config.free_to_move and None not in (before.get(name), config.recorded.get(name))
        if name not in config.free_to_change and not moved and before.get(name) != config.recorded.get(name):
            # Of transformers' arguments, those at their default are not recorded.
            default = "None" if name in config.own_argument_names() else "its default"
            was, now = (repr(values[name]) if name in values else default for values in (before, config.recorded))
            raise InputError(
                f"--output_dir {config.output_dir}: holds another run, with {name} {was} and not {now}; give another "
                "folder"
            )
    changed = sorted(
        name
        for name in (before.keys() | config.recorded.keys()) - set(kept)
        if before.get(name) != config.recorded.get(name)
    )
    if changed:
        logger.warning("Resumed with other values than the run began with: %s.", ", ".join(changed))
