"""The benchmarks that a command line names: RewardBench, RMB, and preference pairs of any source."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from idrm.errors import InputError
from idrm.evaluation import rewardbench, rmb
from idrm.evaluation.benchmark import Benchmark, Item, Part, Score, digest_of_items
from idrm.preference import WITHOUT_MARGINS, load_preferences

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = "test"
KNOWN = {"rewardbench": rewardbench.HUB_NAME, "rmb": rmb.ARCHIVE}


@dataclass(frozen=True)
class BenchmarkSource:
    """One entry of --benchmark: a name, and where its items are from, None for where the benchmark itself is kept."""

    name: str
    source: str | None

    @property
    def download(self) -> str | None:
        """What will be downloaded, unless it was before; None for local files."""
        if self.source is None:
            return KNOWN[self.name]
        is_local = self.source.startswith((".", "/", "~")) or Path(self.source).expanduser().exists()
        is_file = self.source.endswith((".json", ".jsonl", ".parquet", ".gz"))
        return None if is_local or is_file or self.name == "rmb" else self.source


def benchmark_sources(entries: Sequence[str]) -> list[BenchmarkSource]:
    """Reads entries of the forms rewardbench, rmb, rewardbench=PATH, rmb=PATH, name=PAIRS and PAIRS.

    A name is letters, digits, "_", "." and "-"; pairs without one are called after their file, folder or hub name.

    Raises:
        InputError: no entry, or two of one name.
    """
    if not entries:
        raise InputError("--benchmark: expected at least one, such as rewardbench or held-out=pairs.jsonl")
    sources: dict[str, BenchmarkSource] = {}
    for entry in entries:
        name, separator, source = entry.partition("=")
        if entry in KNOWN:
            found = BenchmarkSource(entry, None)
        elif separator and source and re.fullmatch(r"[\w.-]+", name) and not Path(entry).exists():
            found = BenchmarkSource(name, source)
        else:
            found = BenchmarkSource(_name_of(entry), entry)
        if found.name in sources:
            raise InputError(f"--benchmark {entry}: there is another one named {found.name}; give name=source")
        sources[found.name] = found
    return list(sources.values())


def load_benchmark(source: BenchmarkSource, *, split: str = DEFAULT_SPLIT) -> Benchmark:
    """Loads the items of one benchmark, and says before what it downloads.

    Args:
        split: of preference pairs from a hub name or a folder.

    Raises:
        InputError: what cannot be loaded or is no item of such a benchmark.
    """
    if source.download is not None:
        logger.info("%s: downloads %s, unless it is on this machine already.", source.name, source.download)
    if source.name == "rewardbench":
        return rewardbench.load_rewardbench(source.source)
    if source.name == "rmb":
        return rmb.load_rmb(source.source)
    return load_pairs(source.source, name=source.name, split=split)


def load_pairs(source: str, *, name: str, split: str = DEFAULT_SPLIT) -> Benchmark:
    """Preference pairs of any source and format that training takes (`idrm.preference.load_preferences`).

    All pairs count, also those that training drops: an empty response is one, and identical ones are a tie.
    """
    pairs, _ = load_preferences(source, split=split, keep_all=True, columns=WITHOUT_MARGINS)
    items = [Item(name, pair["chosen"], (pair["rejected"],), pair["conversational"]) for pair in pairs]
    version = f"{len(items):,} pairs, digest {digest_of_items(items)}"
    scores = scores_of("pairs", Counter({name: len(items)}))
    return Benchmark(name, "pairs", source, version, items, scores)


def scores_of(kind: str, counts: Mapping[str, int]) -> list[Score]:
    """The scores of a benchmark of a kind, from its subsets and their numbers of items; the main ones first."""
    if kind == "rewardbench":
        return rewardbench.scores_of(counts)
    if kind == "rmb":
        return rmb.scores_of(counts)
    return [Score("Accuracy", (Part("Accuracy", 1.0, tuple(counts)),))]


def _name_of(entry: str) -> str:
    name = Path(entry.partition(":")[0] if not Path(entry).exists() else entry).name
    while (stem := re.sub(r"\.(jsonl?|parquet|gz|bz2|xz)$", "", name)) != name:
        name = stem
    return re.sub(r"[^\w.-]+", "-", name) or "pairs"
