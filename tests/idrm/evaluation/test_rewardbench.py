"""RewardBench's arithmetic against published scores, and its pairs from local files."""

import json

import pytest
from datasets import Dataset

from idrm.errors import InputError
from idrm.evaluation.rewardbench import EXAMPLE_COUNTS, PAIRS_OF_MATH_PRM, SECTIONS, load_rewardbench, section_scores

# allenai/reward-bench, pull requests 215 (LDL-Reward-Gemma-2-27B-v0.1) and 223 (AtlaAI/Selene-1): scores of subsets and
# of sections, as the submitted files have them.
PUBLISHED = {
    "LDL-Reward-Gemma-2-27B-v0.1": (
        {
            "alpacaeval-easy": 0.99,
            "alpacaeval-hard": 0.9473684210526315,
            "alpacaeval-length": 0.9368421052631579,
            "donotanswer": 0.8161764705882353,
            "hep-cpp": 0.9817073170731707,
            "hep-go": 0.9817073170731707,
            "hep-java": 0.9939024390243902,
            "hep-js": 0.9939024390243902,
            "hep-python": 0.975609756097561,
            "hep-rust": 0.9573170731707317,
            "llmbar-adver-GPTInst": 0.9565217391304348,
            "llmbar-adver-GPTOut": 0.8297872340425532,
            "llmbar-adver-manual": 0.8478260869565217,
            "llmbar-adver-neighbor": 0.9104477611940298,
            "llmbar-natural": 0.94,
            "math-prm": 1.0,
            "mt-bench-easy": 1.0,
            "mt-bench-hard": 0.8648648648648649,
            "mt-bench-med": 0.975,
            "refusals-dangerous": 0.97,
            "refusals-offensive": 0.99,
            "xstest-should-refuse": 0.948051948051948,
            "xstest-should-respond": 0.964,
        },
        {
            "Chat": 0.9636871508379888,
            "Chat Hard": 0.9078947368421053,
            "Safety": 0.9378378378378378,
            "Reasoning": 0.9903455284552846,
        },
    ),
    "Selene-1": (
        {
            "alpacaeval-easy": 0.96,
            "alpacaeval-hard": 0.9789473684210527,
            "alpacaeval-length": 0.9789473684210527,
            "donotanswer": 0.8235294117647058,
            "hep-cpp": 0.9695121951219512,
            "hep-go": 0.9908536585365854,
            "hep-java": 0.9939024390243902,
            "hep-js": 0.9695121951219512,
            "hep-python": 0.9634146341463414,
            "hep-rust": 0.975609756097561,
            "llmbar-adver-GPTInst": 0.8586956521739131,
            "llmbar-adver-GPTOut": 0.7446808510638298,
            "llmbar-adver-manual": 0.7391304347826086,
            "llmbar-adver-neighbor": 0.7985074626865671,
            "llmbar-natural": 0.98,
            "math-prm": 0.9373601789709173,
            "mt-bench-easy": 1.0,
            "mt-bench-hard": 0.8108108108108109,
            "mt-bench-med": 1.0,
            "refusals-dangerous": 0.96,
            "refusals-offensive": 0.99,
            "xstest-should-refuse": 1.0,
            "xstest-should-respond": 0.884,
        },
        {
            "Chat": 0.9776536312849162,
            "Chat Hard": 0.8399122807017544,
            "Safety": 0.9216216216216216,
            "Reasoning": 0.9572471626561904,
        },
    ),
}
# The leaderboard's rows of May 2024: sections, Prior Sets, score; in percent.
LEADERBOARD = {
    "ArmoRM-Llama3-8B-v0.1": ({"Chat": 96.9, "Chat Hard": 76.8, "Safety": 92.2, "Reasoning": 97.3}, 74.3, 89.0),
    "Cohere May 2024": ({"Chat": 96.4, "Chat Hard": 71.3, "Safety": 92.7, "Reasoning": 97.7}, 78.2, 88.3),
    "pair-preference-model": ({"Chat": 98.3, "Chat Hard": 65.8, "Safety": 89.7, "Reasoning": 94.7}, 74.6, 85.7),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sections_follow_from_published_subsets(model):
    subsets, sections = PUBLISHED[model]
    scores = section_scores(subsets)
    for name, score in sections.items():
        assert scores[name] == pytest.approx(score, abs=1e-12), name
    assert scores["Leaderboard"] == pytest.approx(sum(sections.values()) / 4)


@pytest.mark.parametrize("model", LEADERBOARD)
def test_prior_sets_count_half_in_the_leaderboard(model):
    sections, prior, score = LEADERBOARD[model]
    subsets = {subset: sections[section] for section, names in SECTIONS.items() for subset in names}
    prior_sets = dict.fromkeys(("anthropic_helpful", "anthropic_hhh", "shp", "summarize"), prior)
    scores = section_scores({**subsets, **prior_sets})
    assert round(scores["Leaderboard"], 1) == score
    assert scores["Mean of sections"] == pytest.approx(sum(sections.values()) / 4)
    # A plain mean, though summarize has forty times the pairs of anthropic_hhh.
    apart = {"anthropic_helpful": 80.0, "anthropic_hhh": 90.0, "shp": 60.0, "summarize": 70.0}
    assert section_scores({**subsets, **apart})["Prior Sets"] == pytest.approx(75.0)


def test_the_official_counts():
    assert sum(EXAMPLE_COUNTS.values()) - EXAMPLE_COUNTS["math-prm"] + PAIRS_OF_MATH_PRM == 2985
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(EXAMPLE_COUNTS)
    assert EXAMPLE_COUNTS["math-prm"] == sum(count for name, count in EXAMPLE_COUNTS.items() if name.startswith("hep"))
    assert (EXAMPLE_COUNTS["xstest-should-refuse"], EXAMPLE_COUNTS["xstest-should-respond"]) == (154, 250)


def write(path, subsets):
    records = [
        {"prompt": f"Question {index}", "chosen": "Yes.", "rejected": "", "subset": subset, "id": index}
        for index, subset in enumerate(subsets)
    ]
    if path.suffix == ".parquet":
        Dataset.from_list(records).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("name", ["rewardbench.jsonl", "data/filtered-00000-of-00001.parquet", "data/any.parquet"])
def test_pairs_come_from_a_file_or_a_folder(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    write(file, ["hep-go", "math-prm", "hep-go"])
    benchmark = load_rewardbench(str(file if file.suffix == ".jsonl" else tmp_path))
    assert [item.subset for item in benchmark.items] == ["hep-go", "math-prm", "hep-go"]
    # Nothing is dropped, were a response empty: the official numbers count it.
    assert benchmark.items[0].rejected[0][-1] == {"role": "assistant", "content": ""}
    assert [score.name for score in benchmark.scores] == ["Reasoning", "Leaderboard", "math-prm", "hep-go"]
    assert "3 pairs of 2 subsets" in benchmark.version
    assert any("hep-go 2 of 164" in note and "math-prm 1 of 447" in note for note in benchmark.notes)


def test_the_whole_benchmark_has_no_reservation(tmp_path):
    counts = {**EXAMPLE_COUNTS, "math-prm": PAIRS_OF_MATH_PRM}
    write(tmp_path / "all.jsonl", [name for name, count in counts.items() for _ in range(count)])
    benchmark = load_rewardbench(str(tmp_path / "all.jsonl"))
    assert "2,985 pairs of 23 subsets" in benchmark.version
    assert len(benchmark.notes) == 1
    assert "154 should-refuse and 250 should-respond" in benchmark.notes[0]


def test_what_is_no_rewardbench_is_refused(tmp_path, eval_pairs_path):
    write(tmp_path / "other.jsonl", ["hep-go", "hep-cobol"])
    with pytest.raises(InputError, match="record 2: RewardBench has no subset 'hep-cobol'"):
        load_rewardbench(str(tmp_path / "other.jsonl"))
    with pytest.raises(InputError, match="record 1: expected a string as 'prompt'"):
        load_rewardbench(str(eval_pairs_path))
