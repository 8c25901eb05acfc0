"""A whole inspection: its numbers against maps made independently, its files, and what it refuses."""

import dataclasses
import io
import json
import os
import re

import pytest
import torch
from matplotlib import image
from rich.console import Console
from tokenizers import Tokenizer, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from idrm.alignment import PairEncoder
from idrm.capture import Teacher
from idrm.collator import PairCollator
from idrm.errors import InputError
from idrm.inspection import inspect_teacher
from idrm.preference import load_preferences
from idrm_kernels import PackedAttention, attention_map_loss

FILES = ["check.json", "check.md", "check.png"]


@pytest.fixture
def inspect(tmp_path, records):
    """inspect(teacher, pairs=None, **options): the inspection, and what it printed."""

    def run(teacher, pairs=None, **options):
        console = Console(file=io.StringIO(), width=80)
        options = {"output_dir": tmp_path / "out", "dtype": torch.float64, "console": console, **options}
        inspection = inspect_teacher(teacher, records if pairs is None else pairs, **options)
        return inspection, console.file.getvalue()

    return run


def maps_of(path, record):
    """Per layer transformers' joint and block maps (content, content) of a pair, heads averaged, and the lengths."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    sides = [[message["content"] for message in record[side]] for side in ("chosen", "rejected")]
    chosen, rejected = ("\n".join(contents) for contents in sides)
    encoded = tokenizer(chosen, rejected, return_tensors="pt", return_special_tokens_mask=True)
    content = encoded.pop("special_tokens_mask")[0] == 0
    classifier = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float64
    )
    model = classifier.base_model.eval()
    if model.config.model_type != "bert":
        del encoded["token_type_ids"]
    with torch.no_grad():
        attentions = model(**encoded, output_attentions=True).attentions
    count = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (chosen, rejected)]
    response = [len(tokenizer(contents[-1], add_special_tokens=False)["input_ids"]) for contents in sides]
    maps = []
    for attention in attentions:
        of_content = attention[0][:, content][:, :, content]
        joint = of_content / of_content.sum(-1, keepdim=True)
        parts = [of_content[..., : count[0]], of_content[..., count[0] :]]
        block = torch.cat([part / part.sum(-1, keepdim=True) for part in parts], dim=-1)
        maps.append((joint.mean(0), block.mean(0)))
    return maps, count, response


def expected_measures(path, records, layer):
    """From the definitions in docs/teachers.md, entry by entry."""
    pairs = [maps_of(path, record) for record in records]
    crossing, response_crossing, inter, moved, responses = [], [], [], [], []
    for maps, (n, m), (s, t) in pairs:
        joint, block = maps[layer]
        crossing.append((joint[:n, n:].sum() + joint[n:, :n].sum()) / (n + m))
        response_crossing.append((joint[n - s : n, n + m - t :].sum() + joint[n + m - t :, n - s : n].sum()) / (s + t))
        first, second = block[:n, n:] - 1 / m, block[n:, :n] - 1 / n
        inter.append(first.square().sum().sqrt() + second.square().sum().sqrt())
        moved.append((first.abs().sum() + second.abs().sum()) / 2 / (n + m))
        parts = [block[n - s : n, n + m - t :], block[n + m - t :, n - s : n]]
        responses.append(sum((part - part.mean(0)).square().sum().sqrt() for part in parts))
    return {
        "crossing": torch.stack(crossing).mean().item(),
        "response_crossing": torch.stack(response_crossing).mean().item(),
        "inter": torch.stack(inter).mean().item(),
        "moved": torch.stack(moved).mean().item(),
        "responses": torch.stack(responses).mean().item(),
    }


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_measures_equal_those_of_transformers_maps(family, make_teacher, inspect, records):
    path = make_teacher(family)
    inspection, _ = inspect(path)
    (teacher,) = inspection.teachers
    assert list(teacher.blocks) == [0, 1, 2]
    for layer, block in teacher.blocks.items():
        found = {
            "crossing": block.crossing.share,
            "response_crossing": block.response_crossing.share,
            "inter": block.inter.distance,
            "moved": block.inter.moved,
            "responses": block.responses.row_specific_distance,
        }
        assert found == pytest.approx(expected_measures(path, records, layer), abs=1e-9)
    assert max(block.inter.moved for block in teacher.blocks.values()) > 0.1


@pytest.mark.parametrize("rows", ["all", "response"])
def test_distances_are_the_training_loss_of_a_uniform_student(rows, make_teacher, inspect, records):
    path = make_teacher("deberta")
    inspection, _ = inspect(path, interaction_rows=rows, layers=[-2])
    teacher = Teacher.load(path, layers=[-2], dtype=torch.float64)
    encoder = PairEncoder(teacher.tokenizer, teacher.tokenizer, max_length=512, teacher_max_length=512)
    collate = PairCollator(teacher.tokenizer, teacher.tokenizer, interaction_rows=rows)
    inputs = collate([encoder(record) for record in records])["interaction"]
    zeros = torch.zeros(inputs.layout.total_tokens, 1, 16, dtype=torch.float64)
    student = PackedAttention(q=zeros, k=zeros)
    loss = attention_map_loss(student, *teacher.attention(inputs), inputs.layout, row_weights=inputs.row_weights)
    (block,) = inspection.teachers[0].blocks.values()
    assert block.intra.distance == pytest.approx(loss.intra.item(), abs=1e-9)
    assert block.inter.distance == pytest.approx(loss.inter.item(), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_uniform_teacher(dtype, uniform_teacher, inspect):
    inspection, printed = inspect(uniform_teacher, dtype=dtype)
    (teacher,) = inspection.teachers
    for block in teacher.blocks.values():
        assert block.crossing.ratio == pytest.approx(1, abs=1e-6)
        for structure in (block.intra, block.inter, block.responses):
            assert vars(structure) == dict.fromkeys(vars(structure), 0.0)
    assert teacher.most_row_specific_layer == 2
    assert "In no block do the rows of the maps between the responses differ" in " ".join(printed.split())


def test_files_are_whole_and_take_the_place_of_earlier_ones(make_teacher, inspect, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "check.json").write_text("{")
    (folder / "model.safetensors").write_text("another's")
    inspection, printed = inspect(make_teacher(), heat_map_layer=-1, heat_map_pair=1, heat_map_normalization="joint")
    assert sorted(os.listdir(folder)) == [*FILES, "model.safetensors"]
    saved = json.loads((folder / "check.json").read_text())
    assert saved["heat_map"] == {"pair": 1, "normalization": "joint", "layers": [2]}
    of_layer = saved["teachers"][0]["blocks"][2]
    block = inspection.teachers[0].blocks[2]
    assert of_layer["crossing"]["ratio"] == block.crossing.ratio
    assert of_layer["inter"] == vars(block.inter)
    text = (folder / "check.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 2 (-1) |"))
    assert f" {block.crossing.share:.0%} | {block.crossing.ratio:.2f} | {block.intra.distance:.2f} |" in row
    assert row.count("|") == len(re.findall(r"\|", text.splitlines()[4]))
    assert all(sentence in text for sentence in saved["verdict"])
    assert max(map(len, printed.splitlines())) <= 80 or str(folder) in printed.splitlines()[-1]
    assert "…" not in printed


def test_the_picture_is_not_blank_whatever_the_tokens(make_teacher, make_pair, inspect, tmp_path):
    _, _ = inspect(make_teacher(), [make_pair("$x_1^2$ {the} 東京", "the \\kettle $", "a lamp")])
    pixels = image.imread(tmp_path / "out" / "check.png")
    assert min(pixels.shape[:2]) > 600
    assert pixels[..., :3].std() > 0.05


def test_teachers_side_by_side(make_teacher, inspect, uniform_teacher):
    path = make_teacher()
    right = {label: {"accuracy": 0.8, "examples": 100} for label in ("entailment", "neutral", "contradiction")}
    accuracy = {"accuracy": 0.8, "examples": 300, "per_label": right}
    wrong = {"accuracy": 0.36, "examples": 300, "per_label": right}
    inspection, printed = inspect(path, accuracy=accuracy, compare_with={uniform_teacher: wrong})
    ours, other = inspection.teachers
    assert all(block.distance_to_first is None for block in ours.blocks.values())
    for layer, block in other.blocks.items():
        own = ours.blocks[layer]
        assert block.distance_to_first == pytest.approx(own.intra.distance + own.inter.distance, abs=1e-6)
    said = " ".join(printed.split())
    assert "A: NLI accuracy 80.0% on 300 examples" in said
    assert "It has learnt to tell these labels." in said
    assert "B: NLI accuracy 36.0% on 300 examples" in said
    assert "not 3 standard errors above: nothing shows that it is tuned" in said
    assert "By accuracy, only the first has learnt NLI's labels" in said
    assert len(re.findall(r"^ +\d \(-\d\) [AB] ", printed, flags=re.MULTILINE)) == 6


def test_without_accuracy_nothing_is_claimed(make_teacher, inspect):
    first, second = make_teacher(), make_teacher("deberta")
    _, printed = inspect(first, compare_with={second: None})
    said = " ".join(printed.split())
    assert said.count("NLI accuracy not measured.") == 2
    assert "Not told apart by accuracy" in said
    assert "has learnt" not in said


def test_teachers_of_other_depth_meet_at_the_end(make_teacher, inspect):
    deep, shallow = make_teacher(), make_teacher(num_hidden_layers=1)
    inspection, _ = inspect(deep, compare_with={shallow: None}, heat_map_layer=0)
    assert inspection.heat_map.layers == [0, 0]
    (block,) = inspection.teachers[1].blocks.values()
    assert block.distance_to_first > 0
    assert inspect(shallow, compare_with={deep: None})[0].heat_map.layers == [0, 2]


def test_other_tokens_are_not_compared_entry_by_entry(make_teacher, inspect, student_tokenizer):
    backend = Tokenizer.from_str(student_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    byte_level = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", model_input_names=inputs)
    other = make_teacher(tokenizer=byte_level)
    inspection, printed = inspect(make_teacher(), compare_with={other: None})
    assert all(block.distance_to_first is None for block in inspection.teachers[1].blocks.values())
    assert "No block at the same distance from the end read the same tokens" in " ".join(printed.split())


def test_pairs_that_were_cut_or_left_out_are_counted(make_teacher, make_pair, inspect, records):
    same = make_pair("the kettle", "a lamp", "a lamp")
    long = make_pair("the kettle boils " * 6, "a lamp", "the river")
    pairs = [records[0], same, long, make_pair("a", "b", "")]
    inspection, printed = inspect(make_teacher(), pairs, teacher_max_length=24)
    counts = inspection.teachers[0].pairs
    assert dataclasses.asdict(counts) | {"tokens": 0} == {
        "given": 4,
        "chosen": 4,
        "measured": 3,
        "cut": 1,
        "tokens": 0,
        "tokens_in_no_unit": 0,
        "dropped": {"identical": 1},
    }
    assert "3 pairs measured, of 4 given; dropped: 1 identical; cut to its length: 1" in " ".join(printed.split())


def test_pairs_are_taken_at_even_distances(make_teacher, inspect, records):
    path = make_teacher()
    some, _ = inspect(path, max_pairs=2)
    same, _ = inspect(path, [records[0], records[1]])
    assert some.teachers[0].blocks == same.teachers[0].blocks
    assert some.teachers[0].pairs.given == 3
    last, _ = inspect(path, [*records, records[1]], max_pairs=2)
    assert last.teachers[0].blocks == inspect(path, [records[0], records[2]])[0].teachers[0].blocks


def test_empty_texts_leave_a_dash(make_teacher, make_pair, inspect, tmp_path):
    empty = make_pair("", "the kettle boils", "")
    inspection, printed = inspect(make_teacher(), [empty])
    block = inspection.teachers[0].blocks[2]
    assert block.crossing.ratio is None
    assert block.inter.distance == 0 < block.intra.distance
    assert (
        json.loads((tmp_path / "out" / "check.json").read_text())["teachers"][0]["blocks"][2]["crossing"]["ratio"]
        is None
    )
    assert re.search(r"2 \(-1\) +0% +- ", printed)


def test_layers_with_windows_are_left_out(save_encoder, inspect):
    path = str(save_encoder("modernbert", num_hidden_layers=4))
    assert list(inspect(path)[0].teachers[0].blocks) == [0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heat_map_pair": 3}, "heat_map_pair 3: expected one of the 3 pairs"),
        ({"heat_map_layer": 3}, "heat_map_layer: layer 3 is beyond the model's depth"),
        ({"heat_map_layer": 0, "layers": [-1]}, r"heat_map_layer 0: expected one of \[2\]"),
        ({"layers": [5]}, "teacher: layer 5 is beyond the model's depth"),
        ({"max_pairs": 0}, "max_pairs: expected at least 1, found 0"),
        ({"teacher_max_length": 200}, "--teacher_max_length 200: the model reads 128 tokens at most"),
        ({"accuracy": {"accuracy": 0.5}}, "accuracy: expected accuracy, examples, and per_label"),
        ({"compare_with": {"/no/where": None}}, "no such folder"),
    ],
)
def test_refusals_write_nothing(options, message, make_teacher, inspect, tmp_path):
    with pytest.raises(InputError, match=message) as refusal:
        inspect(make_teacher(), **options)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_pair_without_a_map_is_no_picture(make_teacher, make_pair, inspect, records):
    with pytest.raises(InputError, match=r"heat_map_pair 1: this pair has no map \(identical\)"):
        inspect(make_teacher(), [records[0], make_pair("a", "the lamp", "the lamp")], heat_map_pair=1)


def test_a_teacher_beside_itself_is_refused(make_teacher, inspect):
    path = make_teacher()
    with pytest.raises(InputError, match="is the teacher itself"):
        inspect(path, compare_with={path: None})


def test_an_output_folder_that_is_a_file_is_refused(make_teacher, inspect, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        inspect(make_teacher(), output_dir=tmp_path / "file")


def test_what_cannot_be_written_leaves_nothing_half_written(make_teacher, inspect, tmp_path):
    (tmp_path / "out" / "check.json").mkdir(parents=True)
    with pytest.raises(InputError, match="while writing"):
        inspect(make_teacher())
    assert os.listdir(tmp_path / "out") == ["check.json"]


def test_minilm_on_real_pairs(minilm_path, real_data, inspect, tmp_path):
    pairs, _ = load_preferences(str(real_data / "hh_rlhf_harmless_base_test.jsonl.gz"), split="train[:8]")
    inspection, printed = inspect(str(minilm_path), pairs, dtype=None)
    (teacher,) = inspection.teachers
    assert teacher.pairs.measured == 8
    assert teacher.pairs.cut == 1
    assert list(teacher.blocks) == list(range(6))
    # Most of the last block's structure is hub keys; near the input it is positions, row by row.
    assert 0.15 < teacher.blocks[5].inter.row_specific_share < 0.35
    assert teacher.blocks[1].inter.row_specific_share > 0.9
    assert teacher.most_row_specific_layer == 1
    assert "block 1 (-5) has the most row-specific structure" in " ".join(printed.split())
    assert image.imread(tmp_path / "out" / "check.png").std() > 0.05
