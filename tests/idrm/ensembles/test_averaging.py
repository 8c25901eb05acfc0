"""`idrm average`: the mean is the mean, in any sharding and little memory, of runs that fit and of no others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from idrm.ensembles.average_command import main
from idrm.ensembles.checkpoint import read_checkpoint
from idrm.evaluation import command as evaluation_command
from idrm.evaluation.outcomes import read_outcomes

REPOSITORY = Path(__file__).resolve().parents[3]


def average(folders, out):
    main([*map(str, folders), "--output_dir", str(out)])


def weights(folder):
    return {name: values for path in sorted(folder.glob("*.safetensors")) for name, values in load_file(path).items()}


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder, edit):
    values = load_file(folder / "model.safetensors")
    edit(values)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def reshard(folder, size="20KB", dtype=None):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype or "auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_average_of_one_run_is_that_run(tmp_path, make_run, dtype, is_sharded):
    run, out = make_run(1), tmp_path / "out"
    edit_weights(run, lambda values: values["score.weight"][0, :4].copy_(torch.tensor([-0.0, 0.0, 1e-40, 3e38])))
    reshard(run, "20KB" if is_sharded else "1GB", dtype)
    average([run], out)
    files = sorted(path.name for path in run.glob("model*"))
    assert (len(files) > 2) == is_sharded
    assert sorted(path.name for path in out.glob("model*")) == files
    for name in files:
        ours, theirs = (folder / name for folder in (out, run))
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
            continue
        ours, theirs = load_file(ours), load_file(theirs)
        assert ours.keys() == theirs.keys()
        kind = torch.int32 if dtype == torch.float32 else torch.int16
        assert all(torch.equal(ours[name].view(kind), theirs[name].view(kind)) for name in ours)


def test_the_average_of_three_is_their_mean_in_any_sharding(tmp_path, make_run, monkeypatch):
    # Parts of tensors, of which the last has fewer rows.
    monkeypatch.setattr("idrm.ensembles.averaging.NUMBERS_AT_ONCE", 1000)
    runs = [make_run(seed, size=1.0) for seed in (1, 2, 3)]
    reshard(runs[1])
    average(runs, tmp_path / "out")
    averaged, parts = weights(tmp_path / "out"), [weights(run) for run in runs]
    assert averaged.keys() == parts[0].keys()
    assert "score.weight" in averaged
    for name, values in averaged.items():
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        assert values.dtype == torch.float32
        assert (values.double() - mean).abs().max() <= 1e-7 * max(1.0, float(mean.abs().max()))
    squares = sum(
        float((part[name].double() - averaged[name].double()).square().sum()) / 3 for part in parts for name in averaged
    )
    size = sum(float(values.double().square().sum()) for values in averaged.values())
    record = json.loads((tmp_path / "out" / "averaged.json").read_text())
    assert record["spread"]["overall"] == pytest.approx((squares / size) ** 0.5, rel=1e-5)
    assert [run["path"] for run in record["runs"]] == [str(run) for run in runs]
    assert not list(tmp_path.glob(".out*"))


def test_the_average_is_a_reward_model(tmp_path, make_run, eval_pairs_path):
    runs, out = [make_run(1), make_run(2)], tmp_path / "out"
    average(runs, out)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    expected = (weights(runs[0])["score.weight"].double() + weights(runs[1])["score.weight"].double()) / 2
    assert torch.equal(model.score.weight, expected.float())
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(runs[0]).get_vocab()
    flags = ["--benchmark", f"held-out={eval_pairs_path}", "--output_dir", str(tmp_path / "scores"), "--device", "cpu"]
    evaluation_command.main([str(out), *flags])
    assert len(read_outcomes(tmp_path / "scores/outcomes/out/held-out.jsonl")) == 11


@pytest.fixture
def refused(tmp_path, make_run, capsys):
    """refused(edit): the error where the second of two runs was edited; nothing is written then."""

    def average_edited(edit) -> str:
        first, second = make_run(1), make_run(2)
        edit(first, second)
        with pytest.raises(SystemExit) as ending:
            average([first, second], tmp_path / "out")
        assert ending.value.code == 2
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return average_edited


def other_tokenizer(folder, **values):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in values.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def write_runs(first, second, bases, seeds, latents=(None, None)):
    for folder, base, seed, latent in zip((first, second), bases, seeds, latents, strict=True):
        recorded = {"model_name_or_path": str(base), "seed": seed, "inform_latent_size": latent}
        (folder / "run.yaml").write_text(yaml.safe_dump(recorded))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda a, b: edit_weights(b, lambda w: w.update({"model.norm.weight": torch.ones(31)})),
            "has the shape (31,)",
        ),
        (lambda a, b: edit_weights(b, lambda w: w.pop("score.weight")), "has no weight score.weight"),
        (lambda a, b: edit_weights(b, lambda w: w.update({"other": torch.ones(1)})), "has no weight other"),
        (lambda a, b: reshard(b, "1GB", torch.bfloat16), "has the dtype BF16"),
        (
            lambda a, b: edit_weights(b, lambda w: w["score.weight"].fill_(torch.nan)),
            "score.weight holds numbers that are not finite",
        ),
        (lambda a, b: edit_json(b / "config.json", rms_norm_eps=0.5), "its config.json has rms_norm_eps 0.5"),
        (lambda a, b: other_tokenizer(b, chat_template="{{ 1 }}"), "its tokenizer has another chat template"),
        (lambda a, b: other_tokenizer(b, pad_token="<s>"), "its tokenizer has another special tokens"),
        (lambda a, b: (b / "model.safetensors").unlink(), "has no weights in safetensors"),
        (lambda a, b: (b / "model.safetensors").write_bytes(b"12345"), "its weights are not there or not whole"),
        (lambda a, b: (b / "config.json").unlink(), "run-2: "),
        (lambda a, b: shutil.rmtree(b), "no such folder"),
        (lambda a, b: write_runs(a, b, ("base-a", "base-b"), (1, 1)), "was trained from base-b, and "),
        (
            lambda a, b: edit_json(b / "config.json", nested={"attention_dropout": 0.1, "layers": 2}),
            "its config.json has nested {'layers': 2}, and that of ",
        ),
        (
            lambda a, b: write_runs(a, b, ("base", "base"), (1, 2), (16, 16)),
            "another bottleneck (--inform_latent_size 16, seed 2) than that of ",
        ),
        (
            lambda a, b: write_runs(a, b, ("base", "base"), (1, 1), (None, 16)),
            "another bottleneck (--inform_latent_size 16, seed 1) than that of ",
        ),
    ],
)
def test_runs_that_do_not_fit_are_one_line(refused, edit, message):
    line = refused(edit)
    assert message in line
    assert "run-2" in line


def test_a_tokenizer_with_another_vocabulary_is_refused(refused):
    def rename(first, second):
        content = json.loads((second / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
        (second / "tokenizer.json").write_text(json.dumps(content))

    assert "its tokenizer has another vocabulary" in refused(rename)


def test_heads_of_their_own_are_refused(tmp_path, refused, student_path):
    base = tmp_path / "language-model"
    LlamaForCausalLM.from_pretrained(student_path).save_pretrained(base)
    line = refused(lambda a, b: write_runs(a, b, (base, base), (1, 2)))
    assert "language-model, which the runs were trained from, has no score.weight" in line
    assert "--linear_probing true" in line


def test_one_seed_or_a_shared_head_are_averaged(tmp_path, make_run, student_path):
    base = tmp_path / "language-model"
    LlamaForCausalLM.from_pretrained(student_path).save_pretrained(base)
    first, second = make_run(1), make_run(2)
    write_runs(first, second, (base, base), (3, 3))
    average([first, second], tmp_path / "one-seed")
    write_runs(first, second, (student_path, student_path), (1, 2))
    average([first, second], tmp_path / "shared-head")
    (run, other) = json.loads((tmp_path / "shared-head" / "averaged.json").read_text())["runs"]
    assert (run["base"], run["seed"], other["seed"]) == (str(student_path), 1, 2)


def test_dropouts_of_nested_configurations_may_differ_and_the_folder_may_be_a_link(tmp_path, make_run):
    first, second = make_run(1), make_run(2)
    for folder, dropout in ((first, 0.05), (second, 0.1)):
        edit_json(folder / "config.json", nested={"attention_dropout": dropout, "layers": 2})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    main([str(first), str(second), "--output_dir", str(tmp_path / "link")])
    assert (tmp_path / "elsewhere" / "model.safetensors").exists()
    assert (tmp_path / "link").is_symlink()


def test_what_is_not_known_is_said_and_what_looks_wrong(tmp_path, make_run, caplog):
    first, second = make_run(1), make_run(2)
    with caplog.at_level("WARNING", logger="idrm"):
        average([first, second], tmp_path / "near")
    (line,) = caplog.messages
    assert "run-1, " in line
    assert "no run.yaml says what was trained there" in line
    edit_weights(second, lambda values: values["score.weight"].copy_(torch.randn(1, 32)))
    with caplog.at_level("WARNING", logger="idrm"):
        average([first, second], tmp_path / "far")
    assert "score.weight differs between the runs by" in caplog.messages[-1]
    write_runs(first, second, ("owner/not-here", "owner/not-here"), (1, 2))
    with caplog.at_level("WARNING", logger="idrm"):
        average([first, second], tmp_path / "unknown")
    assert any("owner/not-here" in line and "is not on this machine" in line for line in caplog.messages)


def test_a_folder_that_is_not_empty_and_a_run_given_twice_are_refused(tmp_path, make_run, capsys):
    run = make_run(1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for folders, out, message in (
        ([run], tmp_path / "full", "is not empty"),
        ([run, run], tmp_path / "out", "is given twice"),
        ([], tmp_path / "out", "expected the folders of runs"),
    ):
        with pytest.raises(SystemExit) as ending:
            average(folders, out)
        assert ending.value.code == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    average([run], tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_index_that_leads_elsewhere_is_refused(tmp_path, make_run, capsys):
    run = make_run(1)
    (run / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(SystemExit):
        average([run], tmp_path / "out")
    assert "names files outside the folder" in capsys.readouterr().err


MEASURE = """
import sys
from pathlib import Path
from idrm.ensembles.averaging import write_average
from idrm.ensembles.checkpoint import read_checkpoint
from idrm.ensembles.sameness import AveragedRun
from transformers import AutoTokenizer
folders = [Path(name) for name in sys.argv[2:]]
runs = [AveragedRun(folder, read_checkpoint(folder), None, None) for folder in folders]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
def megabytes(field):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: importing has one of its own
before = megabytes("VmRSS")
write_average(runs, tokenizer, Path(sys.argv[1]))
print(megabytes("VmHWM") - before)
"""


def test_memory_is_one_shard_whatever_the_runs(tmp_path, make_run):
    """Six runs of three shards of 32 MiB, 576 MiB together, of which one shard and parts of tensors are held."""
    runs = [make_run(seed) for seed in range(2)]
    for run in runs:
        (run / "model.safetensors").unlink()
        weight_map = {}
        for shard in range(3):
            name = f"model-{shard}.safetensors"
            tensors = {f"w{shard}.{part}": torch.full((2048, 1024), float(shard)) for part in range(4)}
            save_file(tensors, run / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        (run / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    more = []
    for number in range(4):
        # Links: what is read is mapped for every run by itself.
        more.append(tmp_path / f"more-{number}")
        shutil.copytree(runs[number % 2], more[-1], copy_function=os.link)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "out"), *map(str, [*runs, *more])]
    # As large tensors always are, these are given back to the system when they are freed.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert 32 < float(run.stdout) < 32 + 64
    assert len(read_checkpoint(tmp_path / "out").files) == 3
