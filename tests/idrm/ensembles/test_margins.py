"""`idrm margins`: the numbers are the formula's, every pair is kept, and the file is data again."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from idrm.alignment import PairEncoder
from idrm.ensembles.margins import Margins, write_with_margins
from idrm.ensembles.margins_command import main
from idrm.errors import InputError
from idrm.preference import load_preferences


@pytest.fixture
def models(make_run):
    return [make_run(seed, size=0.2) for seed in (1, 2, 3)]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def margins_of(models, pairs, out, *flags):
    command = [*map(str, models), "--dataset_name", str(pairs), "--output_file", str(out), "--device", "cpu"]
    main([*command, *flags])
    return read(out)


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as ending:
        main([str(flag) for flag in flags])
    assert ending.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_margins_are_those_of_transformers_alone(tmp_path, models, eval_pairs_path, student_tokenizer):
    written = margins_of(models, eval_pairs_path, tmp_path / "out.jsonl", "--dtype", "float64")
    pairs, _ = load_preferences(str(eval_pairs_path))
    encoder = PairEncoder(student_tokenizer, None, max_length=256, teacher_max_length=8)
    expected = np.empty((3, 11))
    for row, folder in enumerate(models):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
        for column, pair in enumerate(map(encoder, pairs)):
            with torch.no_grad():
                chosen, rejected = (
                    model(torch.tensor([pair[f"{side}_input_ids"]])).logits.item() for side in ("chosen", "rejected")
                )
            expected[row, column] = chosen - rejected
    mean = expected.sum(0) / 3
    deviation = np.sqrt(((expected - mean) ** 2).sum(0) / 3)
    assert [record["margin_mean"] for record in written] == pytest.approx(mean, rel=1e-9, abs=1e-11)
    assert [record["margin_deviation"] for record in written] == pytest.approx(deviation, rel=1e-9, abs=1e-11)
    assert deviation.min() > 1e-3


def test_the_file_is_reproducible_and_does_not_hang_on_batches(tmp_path, models, eval_pairs_path):
    first = margins_of(models, eval_pairs_path, tmp_path / "first.jsonl")
    margins_of(models, eval_pairs_path, tmp_path / "again.jsonl")
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    singly = margins_of(models, eval_pairs_path, tmp_path / "singly.jsonl", "--batch_size", "1")
    for name in ("margin_mean", "margin_deviation"):
        assert [record[name] for record in singly] == pytest.approx([record[name] for record in first], abs=1e-5)


def test_all_pairs_are_kept_in_order_as_they_were(tmp_path, models, capsys):
    prompt = "\n\nHuman: Zoë?\n\nAssistant:"
    records = [
        {"chosen": f"{prompt} The kettle boils.", "rejected": f"{prompt} No.", "id": 7, "tags": ["a", "é"]},
        {"chosen": f"{prompt} The same.", "rejected": f"{prompt} The same.", "id": 5, "tags": []},
        {"chosen": f"{prompt} A lamp.", "rejected": f"{prompt}", "id": 6, "tags": ["b"]},
        {"chosen": f"{prompt} Seven.", "rejected": f"{prompt} Twelve.", "id": 1, "tags": ["c"]},
    ]
    source, out = tmp_path / "pairs.jsonl", tmp_path / "sub" / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    written = margins_of(models, source, out)
    added = [(record.pop("margin_mean"), record.pop("margin_deviation")) for record in written]
    assert written == records
    assert added[1] == (0.0, 0.0)
    assert added[2] == (None, None)
    assert all(None not in added[place] and added[place][1] > 0 for place in (0, 3))
    assert "Without a margin (null): 1," in capsys.readouterr().out
    # Data for training again, with nothing else beside.
    assert len(load_preferences(str(out))[0]) == 2
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_the_summary_counts():
    values = np.array([[1.0, -1.0, 2.0, 0.5, np.nan], [3.0, -2.0, -1.0, 0.5, 1.0]])
    margins = Margins(("a", "b"), values)
    assert margins.mean[:4].tolist() == [2.0, -1.5, 0.5, 0.5]
    assert margins.deviation[:4].tolist() == [1.0, 0.5, 1.5, 0.0]
    assert margins.scored.tolist() == [True] * 4 + [False]
    assert (margins.share_negative, margins.agreement, margins.share_unanimous) == (0.25, 0.75, 0.75)
    assert margins.quantiles([0.0, 0.5, 1.0]) == [-1.5, 0.5, 2.0]
    assert Margins(("a",), values[1:]).agreement == 1.0


def test_bad_input_is_one_line_and_nothing_written(tmp_path, models, eval_pairs_path, capsys):
    out = tmp_path / "out.jsonl"
    pairs = ("--dataset_name", eval_pairs_path)
    assert "expected reward models" in refused(capsys, *pairs, "--output_file", out)
    assert "--output_file is missing" in refused(capsys, models[0], *pairs)
    assert "ends with .jsonl" in refused(capsys, models[0], *pairs, "--output_file", tmp_path / "out.json")
    assert "--batch_size: expected at least 1" in refused(
        capsys, models[0], *pairs, "--output_file", out, "--batch_size", 0
    )
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", *pairs, "--output_file", out)
    assert "is --dataset_name" in refused(capsys, models[0], *pairs, "--output_file", eval_pairs_path)
    again = eval_pairs_path.parent / ".." / eval_pairs_path.parent.name / eval_pairs_path.name
    overwriting = ("--output_file", again, "--overwrite", "true")
    assert "is --dataset_name" in refused(capsys, models[0], *pairs, *overwriting)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"chosen": "a b", "rejected": "a c"}\n{"chosen": "a"}\n')
    line = refused(capsys, models[0], "--dataset_name", broken, "--output_file", out)
    assert "broken.jsonl: record 2: expected the keys 'chosen' and 'rejected'" in line
    broken.write_text('{"chosen": "a b", "rejected": "a c", "margin_mean": 1}\n')
    line = refused(capsys, models[0], "--dataset_name", broken, "--output_file", out)
    assert "has a column margin_mean already" in line
    assert not out.exists()
    out.write_text("mine")
    assert "is there already" in refused(capsys, models[0], *pairs, "--output_file", out)
    assert out.read_text() == "mine"


def test_a_column_of_margins_in_words_is_nothing_to_it(tmp_path, models):
    path = tmp_path / "words.jsonl"
    path.write_text('{"chosen": "a kettle", "rejected": "a lamp", "margin": "slightly better"}\n')
    main([str(models[0]), "--dataset_name", str(path), "--output_file", str(tmp_path / "out.jsonl")])
    assert json.loads((tmp_path / "out.jsonl").read_text())["margin"] == "slightly better"


@pytest.mark.parametrize("value", [float("nan"), b"bytes"])
def test_what_json_does_not_have_is_one_line_and_nothing_written(tmp_path, value):
    records = Dataset.from_dict({"chosen": ["a"], "rejected": ["b"], "value": [value]})
    with pytest.raises(InputError, match="which a JSON file cannot"):
        write_with_margins(tmp_path / "out.jsonl", records, Margins(("a",), np.array([[1.0]])))
    assert list(tmp_path.iterdir()) == []
