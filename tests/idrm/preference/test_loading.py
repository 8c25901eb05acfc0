import gzip
import json
import re

import pytest
from datasets import Dataset

from idrm.errors import InputError
from idrm.preference import load_preferences

RECORDS = [
    {"prompt": "One?", "chosen": " yes", "rejected": " no"},
    {"prompt": "Two?", "chosen": " same", "rejected": " same"},
    {"prompt": "Three?", "chosen": " ", "rejected": " no"},
    {"prompt": "Four?", "chosen": " 4", "rejected": " 5"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Neither the network nor the user's own cache is touched."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def _write_lines(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _make(kind, folder):
    if kind == "parquet":
        Dataset.from_list(RECORDS).to_parquet(folder / "pairs.parquet")
        return folder / "pairs.parquet"
    if kind == "array":
        (folder / "pairs.json").write_text(json.dumps(RECORDS, indent=1))
        return folder / "pairs.json"
    if kind == "folder":
        (folder / "data").mkdir()
        return _write_lines(folder / "data" / "train.jsonl", RECORDS).parent
    if kind == "saved":
        Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
        return folder / "saved"
    return _write_lines(folder / f"pairs{kind}", RECORDS)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".jsonl.gz", "array", "parquet", "folder", "saved"])
def test_every_source_gives_the_same_pairs_and_counts(kind, tmp_path):
    source = str(_make(kind, tmp_path))
    pairs, report = load_preferences(source)
    assert pairs.column_names == ["chosen", "rejected", "conversational", "margin"]
    assert [pair["chosen"][0]["content"] for pair in pairs] == ["One?", "Four?"]
    assert pairs[1] == {
        "chosen": [{"role": "user", "content": "Four?"}, {"role": "assistant", "content": " 4"}],
        "rejected": [{"role": "user", "content": "Four?"}, {"role": "assistant", "content": " 5"}],
        "conversational": False,
        "margin": None,
    }
    assert (report.read, report.kept) == (4, 2)
    assert report.dropped == {"empty_response": 1, "identical_responses": 1}
    assert report.summary() == (f"{source}: 4 pairs read, 2 kept; dropped: 1 empty_response, 1 identical_responses")
    everything, report = load_preferences(source, keep_all=True)
    assert (len(everything), report.kept, report.dropped) == (4, 4, {})


def test_a_slice_of_a_file(tmp_path):
    pairs, report = load_preferences(str(_write_lines(tmp_path / "a.jsonl", RECORDS)), split="train[3:]")
    assert (report.read, len(pairs)) == (1, 1)


def test_a_split_of_a_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 4), ("test", 1)):
        _write_lines(folder / f"{split}.jsonl", RECORDS[:count])
    assert load_preferences(str(folder), split="test")[1].read == 1
    with pytest.raises(InputError, match="validation"):
        load_preferences(str(folder), split="validation")


def test_a_change_to_the_file_is_seen(tmp_path):
    path = _write_lines(tmp_path / "a.jsonl", RECORDS[:1])
    assert load_preferences(str(path))[1].read == 1
    _write_lines(path, [RECORDS[3], RECORDS[0]])
    assert load_preferences(str(path))[0][0]["chosen"][0]["content"] == "Four?"


def _bad(text, message):
    return pytest.param(text if isinstance(text, bytes) else text.encode(), message, id=message)


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        _bad(GOOD + '{"chosen": "b", "rejected"\n' + GOOD, ":2: malformed JSON: Expecting ':'"),
        _bad(GOOD * 2 + '{"chosen": "b', ":3: malformed JSON: Unterminated string"),
        _bad(GOOD + "\n17\n", ":3: expected a JSON object, found int"),
        _bad('[{"chosen": "b"},\n{"chosen" "c"}]', ":2: malformed JSON"),
        _bad("", "the file is empty"),
        _bad(GOOD + '{"prompt": "a", "chosen": "b", "score": 3}\n', ": record 2: .*found 'prompt', 'chosen', 'score'"),
        _bad(GOOD.encode() + b'{"chosen": "\xff", "rejected": "b"}\n', ": record 2: not UTF-8"),
        _bad(GOOD + '{"prompt": "a", "chosen": "\\ud83d", "rejected": "c"}\n', ":2: malformed JSON: surrogates"),
        _bad('{"prompt": "a", "chosen": "b", "rejected": ""}\n', "no pair can be used .*1 empty_response"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_files_are_named_by_line_or_record(content, message, suffix, tmp_path):
    path = tmp_path / f"pairs{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*{message}|{message}") as error:
        load_preferences(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_archive_is_named(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress((GOOD * 100).encode())[:50])
    with pytest.raises(InputError, match=re.escape(str(path)) + r":\d+: cannot be read"):
        load_preferences(str(path))


@pytest.mark.parametrize("source", ["./pairs", "/no/such/folder", "~/no_such_pairs", "pairs.jsonl", "a/b.parquet"])
def test_a_path_that_does_not_exist_is_never_looked_up_elsewhere(source, monkeypatch):
    monkeypatch.setattr("idrm.sources.load_dataset", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(InputError, match=re.escape(source) + ": no such file or folder"):
        load_preferences(source)


def test_a_file_of_another_type(tmp_path):
    (tmp_path / "pairs.txt").write_text("x")
    with pytest.raises(InputError, match=r"pairs\.txt: expected a file of type \.jsonl"):
        load_preferences(str(tmp_path / "pairs.txt"))


def test_a_name_that_the_hub_cannot_give():
    with pytest.raises(InputError, match="nobody/no_such_pairs: cannot be loaded"):
        load_preferences("nobody/no_such_pairs")


def test_real_dialogues(real_data):
    path = real_data / "hh_rlhf_harmless_base_test.jsonl.gz"
    pairs, report = load_preferences(str(path))
    assert (report.read, report.kept, report.dropped) == (2312, 2308, {"empty_response": 4})
    different_prompts = turns = 0
    for pair in pairs:
        for side in ("chosen", "rejected"):
            roles = [message["role"] for message in pair[side]]
            assert roles[0] == "user"
            assert roles[-1] == "assistant"
            assert all(message["content"] == message["content"].strip() for message in pair[side])
            turns += len(roles)
        different_prompts += pair["chosen"][:-1] != pair["rejected"][:-1]
    assert different_prompts == 5
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    kept = [record for record in records if not any(text.endswith("\n\nAssistant: ") for text in record.values())]
    header = re.compile(r"\n\n(?:Human|Assistant):")
    assert turns == sum(len(header.findall(text)) for record in kept for text in record.values())
