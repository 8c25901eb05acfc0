"""What --benchmark takes, and preference pairs as a benchmark."""

import gzip
import json

import pytest

from idrm.errors import InputError
from idrm.evaluation.catalogue import BenchmarkSource, benchmark_sources, load_benchmark


def test_entries_are_names_paths_or_both(tmp_path):
    odd = tmp_path / "a=b.jsonl"
    odd.touch()
    entries = [
        "rewardbench",
        "rmb=RMB_dataset",
        "hh=Anthropic/hh-rlhf",
        "Anthropic/hh-rlhf",
        str(odd),
        "x/pairs.jsonl.gz",
    ]
    sources = benchmark_sources(entries)
    assert sources == [
        BenchmarkSource("rewardbench", None),
        BenchmarkSource("rmb", "RMB_dataset"),
        BenchmarkSource("hh", "Anthropic/hh-rlhf"),
        BenchmarkSource("hh-rlhf", "Anthropic/hh-rlhf"),
        BenchmarkSource("a-b", str(odd)),
        BenchmarkSource("pairs", "x/pairs.jsonl.gz"),
    ]
    downloads = [source.download for source in sources]
    assert downloads == ["allenai/reward-bench", None, "Anthropic/hh-rlhf", "Anthropic/hh-rlhf", None, None]
    with pytest.raises(InputError, match=r"a/pairs\.jsonl: there is another one named pairs; give name=source"):
        benchmark_sources(["pairs.jsonl", "a/pairs.jsonl"])
    with pytest.raises(InputError, match="expected at least one"):
        benchmark_sources([])


def test_pairs_of_any_format_are_a_benchmark(tmp_path):
    records = [
        {"prompt": "Is it far? ", "chosen": "Ten minutes.", "rejected": "Yes."},
        {"prompt": "Is it far? ", "chosen": "Yes.", "rejected": "Yes."},
        {"prompt": "Is it far? ", "chosen": "An hour.", "rejected": "Yes."},
        {"prompt": "Is it cold? ", "chosen": "An hour.", "rejected": "Yes."},
    ]
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    benchmark = load_benchmark(BenchmarkSource("far", str(tmp_path / "pairs.jsonl.gz")))
    # Training drops the second one.
    assert [item.chosen[-1]["content"] for item in benchmark.items] == ["Ten minutes.", "Yes.", "An hour.", "An hour."]
    assert {item.subset for item in benchmark.items} == {"far"}
    assert not benchmark.items[0].conversational
    keys = [item.prompt_key for item in benchmark.items]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert len({item.key for item in benchmark.items}) == 4
    assert [score.name for score in benchmark.scores] == ["Accuracy"]
