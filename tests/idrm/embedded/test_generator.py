"""The embedded data: repeatable, labelled as its facts say, its cue where it should be, no prompt twice."""

import re

import pytest

from idrm.embedded.generator import (
    CUE_SHARE_OF_SPLIT,
    FACTS_PER_PROMPT,
    NLI_LABELS,
    POLITE_OPENERS,
    VALUES_OF_KEY,
    Sizes,
    has_surface_cue,
    read_data,
    surface_cue_accuracy,
    write_data,
)

SIZES = Sizes(train=240, evaluation=80, nli_train=300, nli_dev=150)
CLAIM = re.compile("(" + "|".join(VALUES_OF_KEY) + r"): (.+?)\.", re.IGNORECASE)


def facts_in(text: str) -> dict[str, str]:
    """The facts that a text claims, read back from its words alone."""
    found = [(key.lower(), value) for key, value in CLAIM.findall(text)]
    assert len(dict(found)) == len(found)
    return dict(found)


def prompt_and_response(dialogue: str) -> tuple[str, str]:
    prompt, response = re.fullmatch(r"\n\nHuman: (.*)\n\nAssistant: (.*)", dialogue).groups()
    return prompt, response


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, seed=3, sizes=SIZES)
    return {path.stem: read_data(path) for path in folder.glob("*.jsonl")}


def test_a_seed_gives_the_same_bytes_and_another_seed_gives_others(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_data(tmp_path / folder, seed, SIZES)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "c" / path.name).read_bytes()


def test_sizes_are_kept_and_nothing_else_is_written(data):
    counts = {name: len(records) for name, records in data.items()}
    assert counts == {
        "train": 240,
        "in_distribution": 80,
        "out_of_distribution": 80,
        "neutral": 80,
        "nli_train": 300,
        "nli_dev": 150,
    }


def test_the_default_data_stays_small(tmp_path):
    write_data(tmp_path, seed=0, sizes=Sizes())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 16e6


def test_chosen_tells_the_truth_and_rejected_swaps_the_value_within_its_type(data):
    for split in CUE_SHARE_OF_SPLIT:
        for pair in data[split]:
            (prompt, chosen), (same_prompt, rejected) = map(prompt_and_response, (pair["chosen"], pair["rejected"]))
            assert prompt == same_prompt
            facts = facts_in(prompt)
            assert len(facts) == FACTS_PER_PROMPT
            ((key, truth),), ((rejected_key, lie),) = facts_in(chosen).items(), facts_in(rejected).items()
            assert facts[key] == truth
            assert rejected_key == key
            assert lie != truth
            assert {lie, truth} <= set(VALUES_OF_KEY[key])


@pytest.mark.parametrize("split", CUE_SHARE_OF_SPLIT)
def test_exactly_one_response_has_the_cue_and_its_share_is_exact(data, split):
    sides = [
        tuple(has_surface_cue(prompt_and_response(pair[side])[1]) for side in ("chosen", "rejected"))
        for pair in data[split]
    ]
    assert set(sides) == {(True, False), (False, True)}
    share = sum(chosen for chosen, _ in sides) / len(sides)
    assert share == pytest.approx(CUE_SHARE_OF_SPLIT[split], abs=0.5 / len(sides))
    assert surface_cue_accuracy(data[split]) == share


def test_without_the_cue_a_pair_differs_in_the_value_alone(data):
    for pair in data["train"]:
        bare = []
        for side in ("chosen", "rejected"):
            response = prompt_and_response(pair[side])[1]
            for opener in POLITE_OPENERS:
                response = response.removeprefix(opener + " ")
            bare.append(re.sub(": .*", "", response))
        assert bare[0] == bare[1]


def test_no_prompt_appears_twice_in_whatever_split_or_task(data):
    prompts = [prompt_and_response(pair["chosen"])[0] for split in CUE_SHARE_OF_SPLIT for pair in data[split]]
    prompts += [record["premise"] for name in ("nli_train", "nli_dev") for record in data[name]]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", ["nli_train", "nli_dev"])
def test_nli_labels_follow_from_the_premise(data, name):
    for record in data[name]:
        facts, ((key, value),) = facts_in(record["premise"]), facts_in(record["hypothesis"]).items()
        expected = "neutral" if key not in facts else "entailment" if facts[key] == value else "contradiction"
        assert record["label"] == expected
    assert {sum(record["label"] == label for record in data[name]) for label in NLI_LABELS} == {len(data[name]) // 3}


def test_nli_labels_cannot_be_told_from_the_cue(data):
    cued = [record["label"] for record in data["nli_train"] if has_surface_cue(record["hypothesis"])]
    assert all(abs(cued.count(label) / len(cued) - 1 / 3) < 0.1 for label in NLI_LABELS)


def test_facts_are_of_every_kind_early_and_late(data):
    early, late = set(), set()
    for pair in data["train"]:
        keys = list(facts_in(prompt_and_response(pair["chosen"])[0]))
        early.update(keys[:2])
        late.update(keys[2:])
    assert early == late == set(VALUES_OF_KEY)
    everything = "".join(pair["chosen"] for pair in data["train"])
    assert "ł" in everything.lower()
    assert "🎈" in everything
