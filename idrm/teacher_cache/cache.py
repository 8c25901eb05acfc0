"""What of the teacher's attention is stored, under which key, where, and how much of it the disk may hold.

For a pair with U units and T teacher content tokens, L supervised layers, G head groups, H heads of size D, an entry is
in bfloat16 either

    maps                 (L, G, U, U): the unit-level maps, heads averaged, as ``StoredMaps`` holds them, or
    queries_and_keys     q and k, each (L, T, H, D); DeBERTa's position tables are made again from them and from the
                         teacher's position embeddings, which every pair shares,

whichever leaves less to be written for the run's pairs. Its key is a digest of the teacher (weights, configuration,
layers), of these settings, and of the pair as the teacher reads it: token ids, segment order, cutting or windows,
positions and units. So whatever changes an entry's values beyond rounding changes its name, and runs with different
teachers or settings may share a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from datasets import Dataset
from torch import Tensor

from idrm.errors import InputError
from idrm.teacher_cache.entry import TEMPORARY_PREFIX, DamagedEntry, load_entry, save_entry

if TYPE_CHECKING:
    from idrm.capture.teacher import Teacher
    from idrm.collator import InteractionInputs

logger = logging.getLogger(__name__)

EntryForm: TypeAlias = Literal["maps", "queries_and_keys"]
ENTRY_DTYPE = torch.bfloat16
GIGABYTE = 10**9
# Part of every key: another layout or meaning of an entry takes another number.
ENTRY_FORMAT = 1
ENTRY_SUFFIX = ".safetensors"
HEADER_BYTES = 256  # of an entry's file, about
# What the disk may say that it will go on saying.
LASTING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# What a killed process left under a temporary name is removed once it is this old; no write takes as long.
SECONDS_FOR_A_WRITE = 3600


class MissingPair(NamedTuple):
    """A pair of a batch whose entry is not there.

    Attributes:
        key: of the entry, under which it is to be stored.
        place: where in the batch's stored tensors it belongs.
        inputs: what the teacher is to read for it.
    """

    key: str
    place: tuple[int | slice, ...]
    inputs: InteractionInputs


@dataclasses.dataclass(frozen=True)
class CachedAttention:
    """The cache's part of a batch of B pairs.

    Attributes:
        stored: what was found, by name, with zeros where something is missing: maps (L, B, G, max_units, max_units),
            zero padded; or q and k, each (L, teacher_total_tokens, H, D). Bfloat16.
        found: number of pairs that were found.
        missing: the others that have units.
    """

    stored: dict[str, Tensor]
    found: int
    missing: list[MissingPair]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CachedAttention:
        """The same on another device."""
        return self._moved(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CachedAttention:
        """The same in page-locked memory."""
        return self._moved(lambda value: value.pin_memory())

    def _moved(self, move: Callable[[Any], Any]) -> CachedAttention:
        return CachedAttention(
            {name: move(tensor) for name, tensor in self.stored.items()},
            self.found,
            [pair._replace(inputs=move(pair.inputs)) for pair in self.missing],
        )


class TeacherCache:
    """A folder of entries for one teacher and one set of settings; holds no teacher, so that workers may have a copy.

    Attributes:
        folder: where the entries lie.
        form: what an entry holds.
        normalization, num_head_groups: of the maps.
    """

    def __init__(
        self, folder: Path, teacher: Teacher, form: EntryForm, *, normalization: str = "block", num_head_groups: int = 1
    ):
        self.folder = folder
        self.form: EntryForm = form
        self.normalization = normalization
        self.num_head_groups = num_head_groups
        self._num_layers = len(teacher.layers)
        self._heads = (teacher.num_heads, teacher.head_dim)
        settings = (ENTRY_FORMAT, form, *((normalization, num_head_groups) if form == "maps" else ()))
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
        """Opens a folder for the encoded pairs of a run, chooses the form, and says in the log what they take.

        Args:
            folder: made if it is not there; one that can only be read serves what it has.
            teacher: whose attention is stored.
            data_sets: all encoded pairs, with the columns num_units, teacher_tokens and teacher_reading.
            normalization, num_head_groups: those of the loss.
            max_gigabytes: what all entries in the folder may take (10^9 bytes), those of other teachers and settings
                too, as counted now: runs that write at the same time do not see one another. Pairs beyond it are left
                to the teacher in every epoch. None: as much as the pairs take.

        Raises:
            InputError: the folder cannot be made, or the disk has no room for what is missing.
        """
        folder = Path(folder).expanduser()
        prepare_cache_folder(folder)
        _remove_left_overs(folder)
        options = {"normalization": normalization, "num_head_groups": num_head_groups}
        caches = [cls(folder, teacher, form, **options) for form in ("maps", "queries_and_keys")]
        pairs = _pairs_with_units(data_sets)
        plans = [cache._sizes(pairs) for cache in caches]
        cache, plan, other = caches[0], *plans
        if plans[1].missing_bytes < plans[0].missing_bytes:
            cache, plan, other = caches[1], plans[1], plans[0]
        logger.info(
            "Teacher cache %s: %s pairs as %s take %s (as %s %s); %s of them are there.",
            folder,
            f"{len(plan.sizes):,}",
            _name(cache.form),
            _gigabytes(sum(plan.sizes.values())),
            _name("maps" if cache.form == "queries_and_keys" else "queries_and_keys"),
            _gigabytes(sum(other.sizes.values())),
            f"{len(plan.sizes) - len(plan.missing):,}",
        )
        cache._admit(plan, max_gigabytes)
        return cache

    def batch(
        self,
        pairs: Sequence[Mapping[str, Any]],
        max_units: int,
        inputs_of: Callable[[Mapping[str, Any]], InteractionInputs],
    ) -> CachedAttention:
        """What is stored of these pairs.

        Args:
            pairs: encoded pairs, the examples of a batch.
            max_units: of the batch's MapLayout.
            inputs_of: makes the inputs of one of them that is missing.
        """
        if self.form == "maps":
            shape = (self._num_layers, len(pairs), self.num_head_groups, max_units, max_units)
            stored = {"maps": torch.zeros(shape, dtype=ENTRY_DTYPE)}
        else:
            total = sum(pair["teacher_tokens"] for pair in pairs)
            stored = {
                name: torch.zeros(self._num_layers, total, *self._heads, dtype=ENTRY_DTYPE) for name in ("q", "k")
            }
        found, missing, first_token = 0, [], 0
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
                missing.append(MissingPair(key, place, inputs_of(pair)))
                continue
            found += 1
            for name, tensor in entry.items():
                stored[name][place] = tensor
        return CachedAttention(stored, found, missing)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores an entry, CPU tensors of the names and shapes above, unless the cap leaves it out.

        What the disk refuses is reported, and training goes on with the teacher; nothing more is stored once it is full
        or read-only.
        """
        if self._admitted is not None and key not in self._admitted:
            return
        try:
            save_entry(self._path(key), key, {name: tensor.contiguous() for name, tensor in tensors.items()})
        except OSError as error:
            path = self._path(key)
            if error.errno in LASTING_ERRORS:
                logger.error("Teacher cache: %s cannot be written (%s); nothing more is stored", path, error.strerror)
                self._admitted = frozenset()
            else:
                logger.error("Teacher cache: %s cannot be written (%s)", path, error.strerror)

    def _read(self, key: str, units: int, tokens: int) -> dict[str, Tensor] | None:
        """An entry, or None if it is not there; a file that is none is reported and counts as not there."""
        path = self._path(key)
        try:
            return load_entry(path, key, self._shapes(units, tokens), ENTRY_DTYPE)
        except FileNotFoundError:
            return None
        except DamagedEntry as error:
            logger.error("Teacher cache: %s is no entry (%s); it is computed again", path, error)
            return None

    def _key(self, reading: str) -> str:
        return blake2b(f"{self._settings} {reading}".encode(), digest_size=20).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{ENTRY_SUFFIX}"

    def _shapes(self, units: int, tokens: int) -> dict[str, tuple[int, ...]]:
        if self.form == "maps":
            return {"maps": (self._num_layers, self.num_head_groups, units, units)}
        return dict.fromkeys(("q", "k"), (self._num_layers, tokens, *self._heads))

    def _sizes(self, pairs: Mapping[str, tuple[int, int]]) -> _Plan:
        """What the entries of these pairs take, and which of them are missing."""
        sizes = {}
        for reading, (units, tokens) in pairs.items():
            values = sum(math.prod(shape) for shape in self._shapes(units, tokens).values())
            sizes[self._key(reading)] = values * ENTRY_DTYPE.itemsize + HEADER_BYTES
        return _Plan(sizes, [key for key in sizes if not self._path(key).is_file()])

    def _admit(self, plan: _Plan, max_gigabytes: float | None) -> None:
        """Decides which entries are stored, under a cap or where the folder can only be read."""
        stored = plan.missing
        if not os.access(self.folder, os.W_OK):
            stored = []
            logger.warning("Teacher cache: %s can only be read; nothing is stored.", self.folder)
        elif max_gigabytes is not None:
            # By their size in the directory: another run may be renaming or removing.
            used = sum(file.stat().st_size for file in _entries(self.folder))
            own = sum(plan.sizes.values()) - plan.missing_bytes
            stored = list(_that_fit(plan.missing, plan.sizes, max_gigabytes * GIGABYTE - used))
            logger.info(
                "Teacher cache: of at most %s in all, %s are taken, %s of them by other entries; %s of the %s missing "
                "pairs are stored, and the teacher reads the others in every epoch.",
                _gigabytes(max_gigabytes * GIGABYTE),
                _gigabytes(used),
                _gigabytes(max(0, used - own)),
                f"{len(stored):,}",
                f"{len(plan.missing):,}",
            )
        free = shutil.disk_usage(self.folder).free
        needed = sum(plan.sizes[key] for key in stored)
        if needed > free:
            raise InputError(
                f"--teacher_cache {self.folder}: needs {_gigabytes(needed)} more, and the disk has {_gigabytes(free)} "
                "free; give another folder, or a cap with --teacher_cache_max_gb"
            )
        if len(stored) < len(plan.missing):
            # Those that are there may turn out damaged.
            self._admitted = frozenset(plan.sizes.keys() - set(plan.missing)) | frozenset(stored)


class _Plan(NamedTuple):
    """The bytes of the entries of a run's pairs, and which of them are missing, in the order of the pairs."""

    sizes: dict[str, int]
    missing: list[str]

    @property
    def missing_bytes(self) -> int:
        return sum(self.sizes[key] for key in self.missing)


def prepare_cache_folder(folder: Path) -> None:
    """Makes the folder. Raises InputError if it can neither be made nor read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        readable = os.access(folder, os.R_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"--teacher_cache {folder}: cannot be made ({error.strerror})") from error
    if not readable:
        raise InputError(f"--teacher_cache {folder}: cannot be read")


def _remove_left_overs(folder: Path) -> None:
    """What killed processes left under temporary names."""
    for left_over in folder.glob(f"*/{TEMPORARY_PREFIX}*"):
        # Another process may rename or remove it meanwhile, and another user's may stay.
        with contextlib.suppress(OSError):
            if time.time() - left_over.stat().st_mtime > SECONDS_FOR_A_WRITE:
                left_over.unlink()


def _pairs_with_units(data_sets: Iterable[Dataset]) -> dict[str, tuple[int, int]]:
    """For each different reading its units and teacher tokens."""
    pairs = {}
    for data_set in data_sets:
        columns = (data_set[name][:] for name in ("teacher_reading", "num_units", "teacher_tokens"))
        for reading, units, tokens in zip(*columns, strict=True):
            if sum(units):
                pairs[reading] = (sum(units), tokens)
    return pairs


def _that_fit(keys: Iterable[str], sizes: Mapping[str, int], room: float) -> Iterator[str]:
    """The first keys whose entries fit into so many bytes."""
    for key in keys:
        room -= sizes[key]
        if room < 0:
            return
        yield key


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    for part in os.scandir(folder):
        if part.is_dir():
            yield from (file for file in os.scandir(part) if file.name.endswith(ENTRY_SUFFIX))


def _name(form: EntryForm) -> str:
    return form.replace("_", " ")


def _gigabytes(size: float) -> str:
    return f"{size / GIGABYTE:,.1f} GB" if size >= 100 * GIGABYTE else f"{size / GIGABYTE:.3g} GB"
