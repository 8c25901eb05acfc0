"""A checkpoint in safetensors, whole or sharded: names, shapes and dtypes of its tensors, and parts of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from idrm.errors import InputError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is and what it is like, as the file's header says."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one model; none of them is in memory.

    Attributes:
        folder: where they are.
        tensors: {name: entry}, file after file.
        index: the text of the index where there is one.
    """

    folder: Path
    tensors: Mapping[str, TensorEntry]
    index: str | None

    @property
    def files(self) -> dict[str, list[str]]:
        """The names of the tensors in every file."""
        files: dict[str, list[str]] = {}
        for name, entry in self.tensors.items():
            files.setdefault(entry.file, []).append(name)
        return files

    def metadata(self, file: str) -> dict[str, str]:
        """What a file's header says beside its tensors."""
        with safe_open(self.folder / file, framework="pt") as opened:
            return opened.metadata() or {"format": "pt"}

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """A copy of rows start to end of a tensor, all of it where it has no dimension.

        The file is opened for it and closed again: pages of a mapped file count as memory while it is open.
        """
        entry = self.tensors[name]
        with safe_open(self.folder / entry.file, framework="pt") as opened:
            values = opened.get_slice(name)[start:end] if entry.shape else opened.get_tensor(name)
            return values.clone()


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a model's weights.

    Raises:
        InputError: no weights in safetensors, or files that are damaged or are not what the index says.
    """
    index_path = folder / INDEX_FILE
    if not index_path.is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder}: has no weights in safetensors ({WEIGHTS_FILE}, or {INDEX_FILE} and its shards)")
    try:
        index = index_path.read_text(encoding="utf-8") if index_path.is_file() else None
        listed = None if index is None else dict(json.loads(index)["weight_map"])
        tensors: dict[str, TensorEntry] = {}
        if listed is not None and any(Path(file).name != file for file in listed.values()):
            raise InputError(f"{folder}: {INDEX_FILE} names files outside the folder")
        for file in [WEIGHTS_FILE] if listed is None else sorted(set(listed.values())):
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (an opened file is no mapping)
                    part = opened.get_slice(name)
                    tensors[name] = TensorEntry(file, tuple(part.get_shape()), part.get_dtype())
    except InputError:
        raise
    except (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}: its weights are not there or not whole ({' '.join(str(error).split())})"
        ) from error
    if listed is not None and listed != {name: entry.file for name, entry in tensors.items()}:
        raise InputError(f"{folder}: {INDEX_FILE} lists other weights than its shards hold")
    return Checkpoint(folder, tensors, index)
