"""The error for everything that the person who started a run can put right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class InputError(ValueError):
    """Bad input from the user: one clear line that names what was wrong, where, and what was expected."""


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turns what transformers raises about a folder or hub name into one line that begins with ``what``."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{what}: a file there lacks the key {error}") from error
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error


def require_folder(what: str, name_or_path: str | Path) -> None:
    """Raises InputError for a path that leads nowhere, which transformers would call a malformed hub name."""
    if str(name_or_path).startswith((".", "/", "~")) and not Path(name_or_path).is_dir():
        raise InputError(f"{what}: no such folder")
