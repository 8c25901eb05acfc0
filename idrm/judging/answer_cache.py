"""Answers of a chat completions endpoint on disk, one file each: what was answered once is not asked again."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import uuid
from hashlib import blake2b
from pathlib import Path
from typing import Any

from idrm.errors import InputError
from idrm.judging.endpoint import Answer

logger = logging.getLogger(__name__)

# Part of every key: another layout or meaning of an entry takes another number.
_ENTRY_FORMAT = 1
_TEMPORARY_PREFIX = ".writing-"
# What a killed process left under a temporary name is removed once it is this old; no write takes as long.
_SECONDS_FOR_A_WRITE = 3600


class AnswerCache:
    """A folder of answers, made where it is not there; threads and processes may share it.

    The key of an entry is a digest of the endpoint's URL and of the whole request, the model's name in it; an entry
    holds the request and the answer, and a digest of both. One that is not what was written is as good as none.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder).expanduser()
        with _refused(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob(f"{_TEMPORARY_PREFIX}*"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _SECONDS_FOR_A_WRITE:
                        path.unlink()

    def find(self, url: str, request: dict[str, Any]) -> Answer | None:
        """The answer to a request, None where there is none or it is damaged."""
        path = self._path(url, request)
        try:
            entry = json.loads(path.read_bytes())
            if entry["request"] == request and entry["digest"] == _digest([entry["request"], entry["answer"]]):
                return Answer(**entry["answer"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass  # told below, with the entries that were altered
        logger.warning("%s is damaged: its request is asked again.", path)
        return None

    def store(self, url: str, request: dict[str, Any], answer: Answer) -> None:
        """Keeps an answer: whole, or not at all.

        Raises:
            InputError: the disk refuses.
        """
        entry = {"request": request, "answer": answer._asdict()}
        entry["digest"] = _digest([entry["request"], entry["answer"]])
        temporary = self._folder / f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        with _refused(self._folder):
            try:
                temporary.write_text(json.dumps(entry, ensure_ascii=False, indent=1), encoding="utf-8")
                os.replace(temporary, self._path(url, request))
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise

    def _path(self, url: str, request: dict[str, Any]) -> Path:
        return self._folder / f"{_digest([_ENTRY_FORMAT, url, request])}.json"


@contextlib.contextmanager
def _refused(folder: Path):
    try:
        yield
    except OSError as error:
        raise InputError(f"--cache_dir {folder}: cannot be written to ({error.strerror})") from error


def _digest(content: Any) -> str:
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
