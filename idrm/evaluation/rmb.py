"""RMB (arXiv 2410.09893): helpfulness and harmlessness, by pairs and by the best of several, from its own files."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch.hub import download_url_to_file

from idrm.alignment.rendering import Message
from idrm.errors import InputError
from idrm.evaluation.benchmark import Benchmark, Item, Part, Score, digest_of_items, mean_of_scores

REPOSITORY = "https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark"
ARCHIVE = f"{REPOSITORY}/archive/HEAD.zip"
# Folders of its RMB_dataset, as its items' category_path begins too.
SETS = {"Pairwise_set": "pairs", "BoN_set": "BoN"}
GOALS = ("Helpfulness", "Harmlessness")


def scores_of(counts: Mapping[str, int]) -> list[Score]:
    """The scores of these subsets (set/goal/category/..., with their numbers of items).

    micro: over the items of a set and goal alike; macro: over the means of its subsets. Means of several of the four
    are plain. The subsets follow.
    """
    scores, micro, macro = [], {}, {}
    for folder, kind in SETS.items():
        for goal in GOALS:
            subsets = tuple(subset for subset in counts if subset.split("/")[:2] == [folder, goal])
            if not subsets:
                continue
            parts = tuple(Part(subset, 1.0, (subset,)) for subset in subsets)
            micro[folder, goal] = Score(f"{goal}, {kind}, micro", (Part(f"{folder}/{goal}", 1.0, subsets),))
            macro[folder, goal] = Score(f"{goal}, {kind}, macro", parts)
            scores += [micro[folder, goal], macro[folder, goal]]
    for averaging, by_set in (("micro", micro), ("macro", macro)):
        for goal in GOALS:
            both = [score for (_, of), score in by_set.items() if of == goal]
            if len(both) > 1:
                scores.append(mean_of_scores(f"{goal}, {averaging}", [(score, 1.0) for score in both]))
        if len(by_set) > 1:
            scores.append(mean_of_scores(f"Mean, {averaging}", [(score, 1.0) for score in by_set.values()]))
    return scores + [Score(name, (Part(name, 1.0, (name,)),), is_detail=True) for name in counts]


def helpful_and_harmless(scores: Sequence[Score]) -> dict[str, Score]:
    """{"Helpful", "Harmless"}: of each goal the mean of pairs and best-of-N, micro; of one of them if it is alone."""
    found = {}
    for name, goal in (("Helpful", "Helpfulness"), ("Harmless", "Harmlessness")):
        named = {score.name: score for score in scores}
        candidates = (f"{goal}, micro", *(f"{goal}, {kind}, micro" for kind in SETS.values()))
        of_goal = next((named[candidate] for candidate in candidates if candidate in named), None)
        if of_goal is not None:
            found[name] = of_goal
    return found


def load_rmb(path: str | None = None) -> Benchmark:
    """RMB from its folder (or a part of it, or one of its files), or from its repository where none is named.

    Raises:
        InputError: no file there, malformed JSON, or an item that lacks what RMB's have.
    """
    root = Path(path).expanduser() if path else _download()
    if not root.exists():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(root.rglob("*.json")) if root.is_dir() else [root]
    # The repository holds results and prompts too.
    files = [file for file in files if not root.is_dir() or SETS.keys() & set(file.absolute().parts)]
    items = [item for file in files for item in _items(file)]
    if not items:
        raise InputError(f"{path or ARCHIVE}: expected RMB's {' and '.join(SETS)} with .json files, found none")
    counts = Counter(item.subset for item in items)
    pairs = sum(len(item.rejected) == 1 for item in items if item.subset.startswith("Pairwise_set"))
    version = (
        f"RMB: {pairs:,} pairs and {len(items) - pairs:,} of best-of-N in {len(counts)} subsets, digest "
        f"{digest_of_items(items)}"
    )
    notes = ["The best response has to beat every loser. micro: over items; macro: over subsets, which are files."]
    return Benchmark("rmb", "rmb", path or ARCHIVE, version, items, scores_of(counts), notes)


def _download() -> Path:
    """The repository's files, kept under HF_HOME from the first time on."""
    folder = Path(constants.HF_HOME) / "idrm" / "rmb"
    if folder.is_dir():
        return folder
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"rmb: {ARCHIVE} is not on this machine, and HF_HUB_OFFLINE forbids to download it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            archive = Path(temporary) / "archive.zip"
            download_url_to_file(ARCHIVE, str(archive), progress=sys.stderr.isatty())
            with zipfile.ZipFile(archive) as files:
                files.extractall(Path(temporary) / "files")
            os.replace(Path(temporary) / "files", folder)
    except (OSError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"rmb: {ARCHIVE} cannot be downloaded: {reason}") from error
    return folder


def _items(file: Path) -> list[Item]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error.__class__.__name__})") from error
    if not isinstance(records, list):
        raise InputError(f"{file}: expected a JSON array of RMB's items, found {type(records).__name__}")
    items = []
    for number, record in enumerate(records, start=1):
        try:
            items.append(_item(record, file))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{file}: item {number}: expected 'conversation_input' with 'chosen' and 'reject', or with 'bon_best' "
                "and 'loser_list', as RMB has them"
            ) from error
    return items


def _item(record: Mapping[str, Any], file: Path) -> Item:
    prompt: list[Message] = [
        {"role": turn["role"], "content": turn["content"]} for turn in record["conversation_input"]
    ]
    if "bon_best" in record:
        folder, best, losers = "BoN_set", record["bon_best"], record["loser_list"]
    else:
        folder, best, losers = "Pairwise_set", record["chosen"], [record["reject"]]
    answers = [best["answer"], *(loser["answer"] for loser in losers)]
    texts = [text for turn in prompt for text in turn.values()]
    if not losers or not prompt or not all(isinstance(text, str) for text in [*answers, *texts]):
        raise ValueError
    chosen, *rejected = ([*prompt, {"role": "assistant", "content": answer}] for answer in answers)
    return Item("/".join([folder, *_categories(record, file)]), chosen, tuple(rejected))


def _categories(record: Mapping[str, Any], file: Path) -> list[str]:
    """Goal, category and subcategory, from the item itself or else from where its file is."""
    for path in (str(record.get("category_path", "")).split("/"), [*file.absolute().parts[:-1], file.stem]):
        goal = next((index for index, name in enumerate(path) if name in GOALS), None)
        if goal is not None:
            return path[goal:]
    raise ValueError
