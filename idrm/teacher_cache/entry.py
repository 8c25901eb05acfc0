"""One pair's entry as a safetensors file: written whole or not at all, and read only if it is what was written."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

TEMPORARY_PREFIX = ".writing-"
METADATA = "entry"
# A safetensors file begins with the length of its header, which is JSON.
LENGTH_BYTES = 8


class DamagedEntry(ValueError):
    """A file that is not the entry it should be; says why."""


def save_entry(path: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes contiguous CPU tensors under a temporary name in the entry's folder, and renames it.

    Any number of processes may write the same entry at once. Raises OSError if the disk refuses.
    """
    # One value: safetensors would write several in any order, and equal entries are to be equal files.
    content = save(dict(tensors), metadata={METADATA: f"{key} {_digest(tensors)}"})
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the permissions that the user's files have: a folder may be shared, and tempfile's would be the user's alone.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load_entry(path: Path, key: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an entry.

    Raises:
        FileNotFoundError: there is none.
        DamagedEntry: the file is truncated or altered, is the entry of another key, or holds other tensors.
    """
    # Read at once: safetensors' own readers open a file twice, and another process may replace it in between.
    try:
        content = path.read_bytes()
        tensors = load(content)
        header_length = int.from_bytes(content[:LENGTH_BYTES], "little")
        metadata = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + header_length]).get("__metadata__") or {}
        own_key, digest = metadata[METADATA].split(" ")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedEntry(f"it cannot be read: {error.strerror}") from error
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise DamagedEntry(f"it is damaged: {' '.join(str(error).split()) or type(error).__name__}") from error
    if own_key != key:
        raise DamagedEntry("it is the entry of another key")
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dict(shapes) or any(
        tensor.dtype != dtype for tensor in tensors.values()
    ):
        raise DamagedEntry("it holds tensors of other names, shapes or dtypes")
    if digest != _digest(tensors):
        raise DamagedEntry("it is damaged: its values are not those that were written")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
