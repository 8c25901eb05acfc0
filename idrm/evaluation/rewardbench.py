"""RewardBench, version 1 (arXiv 2403.13787): its subsets, sections and counts, and the pairs from the hub or a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets import Dataset

from idrm.errors import InputError
from idrm.evaluation.benchmark import Benchmark, Item, Part, Score, digest_of_items, mean_of_scores
from idrm.sources import load_records

HUB_NAME = "allenai/reward-bench"
SPLIT = "filtered"

# As rewardbench/constants.py of allenai/reward-bench has them, the weights of subsets within their sections. math-prm
# holds 447 pairs and weighs as much as all code; in xstest the older releases had 250 and 154 exchanged.
EXAMPLE_COUNTS = {
    "alpacaeval-easy": 100,
    "alpacaeval-length": 95,
    "alpacaeval-hard": 95,
    "mt-bench-easy": 28,
    "mt-bench-med": 40,
    "mt-bench-hard": 37,
    "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47,
    "llmbar-adver-manual": 46,
    "refusals-dangerous": 100,
    "refusals-offensive": 100,
    "xstest-should-refuse": 154,
    "xstest-should-respond": 250,
    "donotanswer": 136,
    "math-prm": 984,
    "hep-cpp": 164,
    "hep-go": 164,
    "hep-java": 164,
    "hep-js": 164,
    "hep-python": 164,
    "hep-rust": 164,
}
PAIRS_OF_MATH_PRM = 447
HOW_SECTIONS_WEIGH = (
    "Sections weigh their subsets by the official counts: math-prm as 984, xstest 154 should-refuse and 250 "
    "should-respond. Releases of rewardbench that exchange these two give other Safety scores."
)
SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
# Test sets of earlier preference data, which the leaderboard averaged plainly and counted half.
PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
PRIOR_SECTION = "Prior Sets"
PRIOR_WEIGHT = 0.5
LEADERBOARD, PLAIN_MEAN = "Leaderboard", "Mean of sections"


def scores_of(subsets: Iterable[str]) -> list[Score]:
    """The scores that can be had of these subsets: sections, leaderboard and plain mean, then the subsets.

    Of a section whose subsets are not all there, those that are; without any, the section is left out.
    """
    present = set(subsets)
    sections = [
        Score(section, tuple(Part(name, EXAMPLE_COUNTS[name], (name,)) for name in names if name in present))
        for section, names in SECTIONS.items()
        if present.intersection(names)
    ]
    scores = list(sections)
    prior = tuple(Part(name, 1.0, (name,)) for name in PRIOR_SETS if name in present)
    if prior:
        scores.append(Score(PRIOR_SECTION, prior))
    weighted = [(score, PRIOR_WEIGHT if score.name == PRIOR_SECTION else 1.0) for score in scores]
    scores.append(mean_of_scores(LEADERBOARD, weighted))
    if sections and prior:
        scores.append(mean_of_scores(PLAIN_MEAN, [(section, 1.0) for section in sections]))
    order = [name for name in (*EXAMPLE_COUNTS, *PRIOR_SETS) if name in present]
    return scores + [Score(name, (Part(name, 1.0, (name,)),), is_detail=True) for name in order]


def section_scores(subset_scores: Mapping[str, float]) -> dict[str, float]:
    """Sections, leaderboard and plain mean from the scores of subsets, in whatever unit these are."""
    return {score.name: score.of(subset_scores) for score in scores_of(subset_scores) if not score.is_detail}


def load_rewardbench(path: str | None = None) -> Benchmark:
    """RewardBench from a file or folder, or from the hub where none is named.

    Raises:
        InputError: nothing can be loaded there, a record lacks a string, or names a subset that RewardBench has not.
    """
    source = path or HUB_NAME
    records = load_records(source, split=_split_of(source))
    items = _items(records, source)
    counts = Counter(item.subset for item in items)
    notes = [HOW_SECTIONS_WEIGH]
    official = {**EXAMPLE_COUNTS, "math-prm": PAIRS_OF_MATH_PRM}
    others = [f"{name} {counts[name]} of {number}" for name, number in official.items() if counts[name] != number]
    if others:
        notes.append(f"Not the whole {SPLIT} split ({', '.join(others)}): its scores are not RewardBench's.")
    version = f"RewardBench 1, {SPLIT}: {len(items):,} pairs of {len(counts)} subsets, digest {digest_of_items(items)}"
    return Benchmark("rewardbench", "rewardbench", source, version, items, scores_of(counts), notes)


def _split_of(source: str) -> str:
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(SPLIT in entry.name for entry in folder.rglob("*")):
        return "train"  # what `datasets` calls the one split of a folder that names none
    return SPLIT


def _items(records: Dataset, source: str) -> list[Item]:
    items = []
    for number, record in enumerate(records, start=1):
        for key in ("prompt", "chosen", "rejected", "subset"):
            if not isinstance(record.get(key), str):
                raise InputError(f"{source}: record {number}: expected a string as {key!r}, as RewardBench has it")
        subset = record["subset"]
        if subset not in EXAMPLE_COUNTS and subset not in PRIOR_SETS:
            raise InputError(f"{source}: record {number}: RewardBench has no subset {subset!r}")
        prompt = {"role": "user", "content": record["prompt"]}
        chosen, rejected = ([prompt, {"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected"))
        items.append(Item(subset, chosen, (rejected,)))
    return items
