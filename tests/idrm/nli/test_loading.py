"""Formats, the meaning and order of labels, what is dropped, what is refused."""

import gzip
import json
import re

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from idrm.errors import InputError
from idrm.nli import load_nli
from idrm.nli.held_out import hold_out
from idrm.nli.loading import load_all_nli, reorder_labels

NAMES = ("entailment", "neutral", "contradiction")
TEXTS = [("A dog runs.", "It moves."), ("A dog runs.", "It is late."), ("A cat sits.", "It flies.")]
EXPECTED = [{"premise": p, "hypothesis": h, "label": label} for (p, h), label in zip(TEXTS, range(3), strict=True)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Neither the network nor the user's own cache is touched."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def write(tmp_path):
    """write(records, name="nli.jsonl"): a JSON Lines file with these records; its path as a string."""

    def to_file(records, name="nli.jsonl"):
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return str(tmp_path / name)

    return to_file


def hub_records(labels=(0, 1, 2)):
    return [{"premise": p, "hypothesis": h, "label": label} for (p, h), label in zip(TEXTS, labels, strict=True)]


def original_records(labels=NAMES):
    other = {"annotator_labels": ["neutral"], "pairID": "1", "sentence1_parse": "(ROOT)"}
    return [
        {"sentence1": p, "sentence2": h, "gold_label": label, **other}
        for (p, h), label in zip(TEXTS, labels, strict=True)
    ]


@pytest.fixture
def save_features(tmp_path):
    """save_features(names): a Parquet file whose labels are a ClassLabel of these names; its path as a string."""

    def save(names):
        label = ClassLabel(names=list(names))
        features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": label})
        Dataset.from_list(hub_records(), features=features).to_parquet(tmp_path / "nli.parquet")
        return str(tmp_path / "nli.parquet")

    return save


@pytest.fixture(params=["integers", "names", "original", "gz", "class_label", "saved"])
def source(request, tmp_path, write, save_features):
    if request.param == "integers":
        return write(hub_records())
    if request.param == "names":
        return write(hub_records(["Entailment", "neutral", "CONTRADICTION"]))
    if request.param == "original":
        return write(original_records())
    if request.param == "gz":
        return write(hub_records(), "nli.json.gz")
    path = save_features(NAMES)
    if request.param == "saved":
        Dataset.from_parquet(path).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")
    return path


def test_every_format_gives_the_same_pairs(source):
    pairs, labels, report = load_nli(source)
    assert list(pairs) == EXPECTED
    assert labels == NAMES
    assert (report.read, report.kept, report.dropped) == (3, 3, {})
    assert report.labels == dict.fromkeys(NAMES, 1)


def test_pairs_without_a_label_or_a_text_are_dropped_and_counted(write):
    records = [*hub_records(), *hub_records((-1, None, 0))]
    records[-1]["hypothesis"] = " "
    pairs, _, report = load_nli(write(records))
    assert list(pairs) == EXPECTED
    assert report.dropped == {"empty_text": 1, "no_label": 2}
    assert "6 pairs read, 3 kept (1 entailment, 1 neutral, 1 contradiction)" in report.summary()
    pairs, _, report = load_nli(write([*original_records(), *original_records(("-", None, "neutral"))]))
    assert (len(pairs), report.dropped) == (4, {"no_label": 2})


def test_a_label_of_white_space_is_none_and_integers_may_be_strings(write):
    labels = (" - ", "", "-1", *NAMES)
    records = [*original_records(labels[:3]), *original_records(labels[3:])]
    pairs, found, report = load_nli(write(records))
    assert (found, len(pairs), report.dropped) == (NAMES, 3, {"no_label": 3})
    records = [*hub_records(("0", " 1 ", "2")), *hub_records(("-1", "-", "neutral"))]
    pairs, _, report = load_nli(write(records), label_names=NAMES)
    assert pairs["label"][:] == [0, 1, 2, 1]
    assert report.dropped == {"no_label": 2}
    with pytest.raises(InputError, match="record 2: expected an integer from 0 to 2, or a name, as 'label', found 3"):
        load_nli(write(hub_records(("0", "3", "2"))), label_names=NAMES)


def test_bare_integers_are_said_to_be_in_the_order_of_snli(write):
    assert "taken to be in SNLI's order" in load_nli(write(hub_records()))[2].summary()
    assert "SNLI" not in load_nli(write(original_records()))[2].summary()


def test_label_names_say_what_integers_mean(write):
    path = write(hub_records())
    pairs, labels, report = load_nli(path, label_names=("contradiction", "Entailment", "neutral"))
    assert labels == ("contradiction", "entailment", "neutral")
    assert pairs["label"][:] == [0, 1, 2]
    assert not report.assumed


def test_label_names_order_labels_that_have_names(write, save_features):
    order = ("neutral", "contradiction", "entailment")
    for source in (write(original_records()), save_features(NAMES)):
        pairs, labels, _ = load_nli(source, label_names=order)
        assert labels == order
        assert [labels[label] for label in pairs["label"]] == list(NAMES)


def test_label_names_replace_names_that_say_nothing(save_features):
    pairs, labels, _ = load_nli(save_features(("0", "1", "2")), label_names=NAMES)
    assert labels == NAMES
    assert pairs["label"][:] == [0, 1, 2]
    with pytest.raises(InputError, match="--label_names has 2 names for the labels 0, 1, 2"):
        load_nli(save_features(("0", "1", "2")), label_names=("entailment", "other"))


def test_labels_are_matched_by_the_names_of_the_features(save_features):
    names = ("contradiction", "neutral", "entailment")
    assert load_nli(save_features(names))[1] == names
    pairs, labels, _ = load_nli(save_features(names), labels=NAMES)
    assert labels == NAMES
    assert pairs["label"][:] == [2, 1, 0]


def test_two_classes(write):
    pairs, labels, _ = load_nli(write(hub_records(("not_entailment", "entailment", "not_entailment"))))
    assert labels == ("entailment", "not_entailment")
    assert pairs["label"][:] == [1, 0, 1]


def test_several_sources_are_matched_by_name(write):
    sources = [write(hub_records()), write(original_records()[::-1], "original.jsonl")]
    pairs, labels, reports = load_all_nli(sources)
    assert labels == NAMES
    assert pairs["label"][:] == [0, 1, 2, 2, 1, 0]
    assert [report.kept for report in reports] == [3, 3]


def test_labels_in_another_order(write):
    pairs, labels, _ = load_nli(write(hub_records()))
    order = ("contradiction", "entailment", "neutral")
    assert [order[label] for label in reorder_labels(pairs, labels, order)["label"]] == list(NAMES)


def test_a_configuration_of_a_hub_name(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options["split"]))
        return Dataset.from_list(hub_records())

    monkeypatch.setattr("idrm.sources.load_dataset", load)
    load_nli("nyu-mll/glue:mnli", split="validation_matched")
    load_nli("stanfordnlp/snli")
    assert asked == [
        (("nyu-mll/glue", "mnli"), "validation_matched"),
        (("stanfordnlp/snli", None), "train"),
    ]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"premise": "a", "label": 0}], "record 1: expected the keys premise, hypothesis, label, or sentence1"),
        (hub_records((0, 3, 1)), "record 2: expected an integer from 0 to 2, or a name, as 'label', found 3"),
        (hub_records((0, 1, -2)), "record 3: expected an integer from 0 to 2, or a name, as 'label', found -2"),
        (hub_records((0, 1, 1.5)), "as 'label', found 0.0"),
        (hub_records((True, True, False)), "record 1: .* found True"),
        (
            [*hub_records(), {"premise": None, "hypothesis": "b", "label": 1}],
            "record 4: expected a string as 'premise'",
        ),
        (
            hub_records(("neutral", "0", "entailment")),
            "record 2: expected a name as 'label', found '0': give --label_names for integers",
        ),
        (hub_records((-1, -1, -1)), r"no pair can be used \(.*3 no_label"),
        (hub_records(("positive", "negative", "neutral")), "two or three labels with 'entailment' among them, found"),
        (hub_records(("entailment",) * 3), "two or three labels with 'entailment' among them, found 'entailment'"),
    ],
)
def test_bad_records_are_named_by_file_and_number(write, records, message):
    path = write(records)
    with pytest.raises(InputError, match=message) as error:
        load_nli(path)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_names_beyond_those_asked_for(write):
    with pytest.raises(InputError, match="label 'contradiction' is none of entailment, neutral"):
        load_nli(write(original_records()), labels=("entailment", "neutral"))
    with pytest.raises(InputError, match="record 3: expected one of entailment, neutral as 'gold_label'"):
        load_nli(write(original_records()), label_names=("entailment", "neutral"))


def test_malformed_json_is_named_by_line(write, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": 0}\n{"premise": "a"\n')
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/bad.jsonl:2: malformed JSON")):
        load_nli(str(tmp_path / "bad.jsonl"))


def test_no_premise_is_on_both_sides(write):
    records = [
        {"premise": f"Premise {index // 3}.", "hypothesis": f"{index}", "label": index % 3} for index in range(60)
    ]
    pairs = load_nli(write(records))[0]
    train, held_out = hold_out(pairs, 0.2, seed=3)
    assert (len(train), len(held_out)) == (48, 12)
    assert not set(train["premise"]) & set(held_out["premise"])
    assert hold_out(pairs, 0.2, seed=3)[1]["hypothesis"][:] == held_out["hypothesis"][:]
    assert hold_out(pairs, 0.2, seed=4)[1]["hypothesis"][:] != held_out["hypothesis"][:]
    assert [len(part) for part in hold_out(pairs, 0.001, seed=3)] == [57, 3]
    with pytest.raises(InputError, match="one premise cannot be divided"):
        hold_out(pairs.select(range(3)), 0.2, seed=3)


def test_real_pairs(real_data):
    pairs, labels, report = load_nli(str(real_data / "snli_dev.jsonl.gz"))
    assert (report.read, report.kept, labels) == (9842, 9842, NAMES)
    assert report.labels == {"entailment": 3329, "neutral": 3235, "contradiction": 3278}
    assert pairs[1]["hypothesis"] == "Two woman are holding packages ."
    assert pairs[1]["label"] == 0
