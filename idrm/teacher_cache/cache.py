"""What of the teacher's attention is stored, under which key, where, and how much of it the disk may hold.

For a pair with U units and T teacher content tokens, L supervised layers, G head groups, H heads of size D, an entry is
in bfloat16 either

    maps                 (L, G, U, U): the unit-level maps, heads averaged, as ``StoredMaps`` holds them, or
    queries_and_keys     q and k, each (L, T, H, D); DeBERTa's position tables are made again from them and from the
                         teacher's position embeddings, which every pair shares,

whichever is smaller over all pairs of the run. Its key is a digest of the teacher (weights, configuration, layers,
attention implementation), of these settings, and of the pair as the teacher reads it: token ids, segment order, cutting
or windows, positions and units. So anything that changes an entry's values changes its name, and runs with different
teachers or settings may share a folder.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from idrm.errors import InputError
from idrm.teacher_cache.entry import TEMPORARY_PREFIX, DamagedEntry, load_entry, save_entry

if TYPE_CHECKING:
    from idrm.capture.teacher import Teacher
    from idrm.collator import InteractionInputs

logger = logging.getLogger(__name__)

Form = Literal["maps", "queries_and_keys"]
DTYPE = torch.bfloat16
GIGABYTE = 10**9
# Part of every key: another layout or meaning of an entry takes another number.
FORMAT = 1
# What a killed process left under a temporary name is removed once it is this old; no write takes as long.
SECONDS_FOR_A_WRITE = 3600


class MissingPair(NamedTuple):
    """A pair of a batch whose entry is not there.

    Attributes:
        key: of the entry, under which it is to be stored.
        place: where in the batch's stored tensors it belongs.
        units, tokens: of the pair, the tokens the teacher's.
    """

    key: str
    place: tuple[int | slice, ...]
    units: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class CachedAttention:
    """The cache's part of a batch of B pairs.

    Attributes:
        stored: what was found, by name, with zeros where something is missing: maps (L, B, G, max_units, max_units),
            zero padded; or q and k, each (L, teacher_total_tokens, H, D). Bfloat16.
        found: number of pairs that were found.
        missing: the others that have units, and ``missing_inputs`` what the teacher is to read for them; None for none.
    """

    stored: dict[str, Tensor]
    found: int
    missing: list[MissingPair]
    missing_inputs: InteractionInputs | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CachedAttention:
        """The same on another device."""
        return dataclasses.replace(
            self,
            stored={name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.stored.items()},
            missing_inputs=self.missing_inputs and self.missing_inputs.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> CachedAttention:
        """The same in page-locked memory."""
        return dataclasses.replace(
            self,
            stored={name: tensor.pin_memory() for name, tensor in self.stored.items()},
            missing_inputs=self.missing_inputs and self.missing_inputs.pin_memory(),
        )


class TeacherCache:
    """A folder of entries for one teacher and one set of settings; holds no teacher, so that workers may have a copy.

    Attributes:
        folder: where the entries lie.
        form: what an entry holds.
        normalization, num_head_groups: of the maps.
    """

    def __init__(
        self, folder: Path, teacher: Teacher, form: Form, *, normalization: str = "block", num_head_groups: int = 1
    ):
        self.folder = folder
        self.form: Form = form
        self.normalization = normalization
        self.num_head_groups = num_head_groups
        self._num_layers = len(teacher.layers)
        self._heads = (teacher.num_heads, teacher.head_dim)
        settings = (FORMAT, form, *((normalization, num_head_groups) if form == "maps" else ()))
        self._settings = f"{teacher.fingerprint} {settings!r}"
        self._admitted: frozenset[str] | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        teacher: Teacher,
        data_sets: Sequence[Dataset],
        *,
        normalization: str = "block",
        num_head_groups: int = 1,
        max_gigabytes: float | None = None,
    ) -> TeacherCache:
        """Opens a folder for the encoded pairs of a run, chooses the smaller form, and says in the log what it takes.

        Args:
            folder: made if it is not there.
            teacher: whose attention is stored.
            data_sets: all encoded pairs, with the columns num_units, teacher_tokens and teacher_reading.
            normalization, num_head_groups: those of the loss.
            max_gigabytes: what all entries in the folder may take (10^9 bytes); pairs beyond it are left to the teacher
                in every epoch. None: as much as the pairs take.

        Raises:
            InputError: the folder cannot be written to, or the disk has no room for what is missing.
        """
        folder = Path(folder).expanduser()
        _prepare_folder(folder)
        options = {"normalization": normalization, "num_head_groups": num_head_groups}
        caches = [cls(folder, teacher, form, **options) for form in ("maps", "queries_and_keys")]
        pairs = _pairs_with_units(data_sets)
        needed = [sum(cache._bytes(units, tokens) for units, tokens in pairs.values()) for cache in caches]
        cache, total = min(zip(caches, needed, strict=True), key=lambda choice: choice[1])
        cache._plan(pairs, total, max(needed), max_gigabytes)
        return cache

    def batch(
        self,
        pairs: Sequence[Mapping[str, Any]],
        max_units: int,
        inputs_of: Callable[[Sequence[Mapping[str, Any]]], InteractionInputs],
    ) -> CachedAttention:
        """What is stored of these pairs.

        Args:
            pairs: encoded pairs, the examples of a batch.
            max_units: of the batch's MapLayout.
            inputs_of: makes the inputs of those of them that are missing.
        """
        if self.form == "maps":
            shape = (self._num_layers, len(pairs), self.num_head_groups, max_units, max_units)
            stored = {"maps": torch.zeros(shape, dtype=DTYPE)}
        else:
            total = sum(pair["teacher_tokens"] for pair in pairs)
            stored = {name: torch.zeros(self._num_layers, total, *self._heads, dtype=DTYPE) for name in ("q", "k")}
        found, missing, missing_pairs, first_token = 0, [], [], 0
        for example, pair in enumerate(pairs):
            units, tokens = sum(pair["num_units"]), pair["teacher_tokens"]
            if not units:
                continue
            if self.form == "maps":
                place = (slice(None), example, slice(None), slice(units), slice(units))
            else:
                place = (slice(None), slice(first_token, first_token + tokens))
            first_token += tokens
            key = self._key(pair["teacher_reading"])
            entry = self._read(key, units, tokens)
            if entry is None:
                missing.append(MissingPair(key, place, units, tokens))
                missing_pairs.append(pair)
                continue
            found += 1
            for name, tensor in entry.items():
                stored[name][place] = tensor
        return CachedAttention(stored, found, missing, inputs_of(missing_pairs) if missing else None)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores an entry, CPU tensors of the names and shapes above, unless the cap leaves it out.

        A disk that refuses is reported once, and nothing more is stored: training goes on with the teacher.
        """
        if self._admitted is not None and key not in self._admitted:
            return
        try:
            save_entry(self._path(key), key, {name: tensor.contiguous() for name, tensor in tensors.items()})
        except OSError as error:
            logger.warning("Teacher cache: %s cannot be written to (%s); nothing more is stored", self.folder, error)
            self._admitted = frozenset()

    def _read(self, key: str, units: int, tokens: int) -> dict[str, Tensor] | None:
        """An entry, or None if it is not there; a damaged one is reported and counts as not there."""
        path = self._path(key)
        try:
            return load_entry(path, key, self._shapes(units, tokens), DTYPE)
        except FileNotFoundError:
            return None
        except DamagedEntry as error:
            logger.warning("Teacher cache: %s is damaged (%s); it is computed again", path, error)
            return None

    def _key(self, reading: str) -> str:
        return blake2b(f"{self._settings} {reading}".encode(), digest_size=20).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _shapes(self, units: int, tokens: int) -> dict[str, tuple[int, ...]]:
        if self.form == "maps":
            return {"maps": (self._num_layers, self.num_head_groups, units, units)}
        return dict.fromkeys(("q", "k"), (self._num_layers, tokens, *self._heads))

    def _bytes(self, units: int, tokens: int) -> int:
        values = (torch.Size(shape).numel() for shape in self._shapes(units, tokens).values())
        return sum(values) * DTYPE.itemsize

    def _plan(self, pairs: dict[str, tuple[int, int]], total: int, other: int, max_gigabytes: float | None) -> None:
        """Says what the pairs' entries take, and which are stored where a cap does not let all be."""
        sizes = {self._key(reading): self._bytes(units, tokens) for reading, (units, tokens) in pairs.items()}
        absent = {key: size for key, size in sizes.items() if not self._path(key).is_file()}
        logger.info(
            "Teacher cache %s: %s pairs as %s take %s (the other form %s); %s of them are there.",
            self.folder,
            f"{len(sizes):,}",
            self.form.replace("_", " "),
            _gigabytes(total),
            _gigabytes(other),
            f"{len(sizes) - len(absent):,}",
        )
        if max_gigabytes is not None:
            room = max_gigabytes * GIGABYTE - sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))
            absent = dict(_that_fit(absent, room))
            self._admitted = frozenset(absent)
            logger.info(
                "Teacher cache: %g GB hold %s of the missing pairs; the teacher reads the others in every epoch.",
                max_gigabytes,
                f"{len(absent):,}",
            )
        free = shutil.disk_usage(self.folder).free
        if sum(absent.values()) > free:
            raise InputError(
                f"--teacher_cache {self.folder}: needs {_gigabytes(sum(absent.values()))} more, and the disk has "
                f"{_gigabytes(free)} free; give another folder, or a cap with --teacher_cache_max_gb"
            )


def _pairs_with_units(data_sets: Iterable[Dataset]) -> dict[str, tuple[int, int]]:
    """For each different reading its units and teacher tokens."""
    pairs = {}
    for data_set in data_sets:
        columns = (data_set[name][:] for name in ("teacher_reading", "num_units", "teacher_tokens"))
        for reading, units, tokens in zip(*columns, strict=True):
            if sum(units):
                pairs[reading] = (sum(units), tokens)
    return pairs


def _that_fit(sizes: Mapping[str, int], room: float) -> Iterable[tuple[str, int]]:
    """The first entries that fit into so many bytes."""
    for key, size in sizes.items():
        room -= size
        if room < 0:
            return
        yield key, size


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for left_over in folder.glob(f"*/{TEMPORARY_PREFIX}*"):
            if time.time() - left_over.stat().st_mtime > SECONDS_FOR_A_WRITE:
                left_over.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--teacher_cache {folder}: cannot be written to ({error.strerror})") from error


def _gigabytes(size: float) -> str:
    return f"{size / GIGABYTE:.3g} GB"
