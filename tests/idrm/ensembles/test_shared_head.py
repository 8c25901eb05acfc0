"""Runs from one initialisation, head included: linear probing, the recipe's runs on a tiny model, and their mean."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, LlamaForCausalLM

from idrm import train
from idrm.arguments import ModelArguments, parse_arguments
from idrm.ensembles import average_command
from idrm.errors import InputError
from idrm.evaluation import command as evaluation_command
from idrm.grid.specification import read_grid
from idrm.models import load_student_config

RECIPES = Path(__file__).resolve().parents[3] / "recipes" / "warm"


@pytest.fixture
def language_model(tmp_path, student_path):
    folder = tmp_path / "language-model"
    LlamaForCausalLM.from_pretrained(student_path).save_pretrained(folder)
    AutoTokenizer.from_pretrained(student_path).save_pretrained(folder)
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def tiny(pairs, folder, **flags):
    """Flags of a recipe's run on a machine without a GPU."""
    common = {"dataset_name": pairs, "max_length": 128, "output_dir": folder, "max_steps": 3, "use_cpu": "true"}
    common |= {"bf16": "false", "activation_checkpointing": "false", "save_strategy": "no", "disable_tqdm": "true"}
    common |= {"pad_token": "<|pad|>"}
    return [f"--{name}={value}" for name, value in {**common, **flags}.items()]


def test_the_recipe_s_runs_share_a_head_and_are_averaged(tmp_path, language_model, pairs_path, eval_pairs_path, capsys):
    head = tmp_path / "warm-head"
    flags = tiny(pairs_path, head, model_name_or_path=language_model)
    train.main(["--config", str(RECIPES / "head.yaml"), *flags])
    probed, base = weights(head), weights(language_model)
    assert all(torch.equal(values, base[name]) for name, values in probed.items() if name != "score.weight")

    rows = read_grid(RECIPES / "grid.yaml").rows
    folders = []
    for row in (rows[0], rows[3]):
        (seed,) = row.seeds
        run = row.run(tmp_path / "runs", seed)
        train.main([*run.tokens, *tiny(pairs_path, run.folder, model_name_or_path=head, learning_rate=1e-3)])
        assert json.loads((run.folder / "config.json").read_text())["attention_dropout"] == row.flags["dropout"]
        folders.append(run.folder)
    first, second = (weights(folder) for folder in folders)
    assert not torch.equal(first["score.weight"], second["score.weight"])
    average_command.main([*map(str, folders), "--output_dir", str(tmp_path / "average")])
    averaged = weights(tmp_path / "average")
    for name, values in averaged.items():
        assert (values.double() - (first[name].double() + second[name].double()) / 2).abs().max() <= 1e-7
    record = json.loads((tmp_path / "average" / "averaged.json").read_text())
    assert [(run["base"], run["seed"]) for run in record["runs"]] == [(str(head), 1), (str(head), 4)]
    assert record["spread"]["widest"] < 0.3
    scores = ["--benchmark", f"held-out={eval_pairs_path}", "--output_dir", str(tmp_path / "scores"), "--device", "cpu"]
    evaluation_command.main([str(tmp_path / "average"), *scores])
    assert "average" in capsys.readouterr().out


def test_seeds_initialise_heads_of_their_own_without_one(tmp_path, language_model, pairs_path, capsys):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        train.main(tiny(pairs_path, folder, model_name_or_path=language_model, alpha=0, seed=seed))
    first, second = (weights(folder)["score.weight"] for folder in folders)
    assert (first - second).norm() > first.norm()
    with pytest.raises(SystemExit):
        average_command.main([*map(str, folders), "--output_dir", str(tmp_path / "average")])
    assert "has no score.weight: each seed initialised another one" in capsys.readouterr().err


def test_linear_probing_trains_the_head(tmp_path, student_path, pairs_path):
    flags = {"model_name_or_path": student_path, "alpha": 0, "linear_probing": "true", "learning_rate": 0.1}
    train.main(tiny(pairs_path, tmp_path / "out", **flags))
    before, after = weights(student_path), weights(tmp_path / "out")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["score.weight"]
    with pytest.raises(InputError, match=r"--linear_probing: .* give --alpha 0"):
        parse_arguments(["--model_name_or_path=m", "--dataset_name=d", "--linear_probing=true"])


def test_dropout_is_set_wherever_a_configuration_has_it(tmp_path, student_path):
    assert load_student_config(ModelArguments(str(student_path))).attention_dropout == 0
    assert load_student_config(ModelArguments(str(student_path), dropout=0.1)).attention_dropout == 0.1
    GPT2Config().save_pretrained(tmp_path)
    config = load_student_config(ModelArguments(str(tmp_path), dropout=0.05))
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0.05, 0.05, 0.05)
    for value in ("1", "-0.1", "nan"):
        with pytest.raises(InputError, match="--dropout: expected"):
            parse_arguments(["--model_name_or_path=m", "--dataset_name=d", "--alpha=0", f"--dropout={value}"])


def test_rows_of_the_recipe_differ_in_learning_rate_dropout_and_order():
    head = parse_arguments(["--config", str(RECIPES / "head.yaml"), "--output_dir", "warm-head"])
    assert head.model.linear_probing
    runs = [
        parse_arguments(run.tokens).recorded
        for row in read_grid(RECIPES / "grid.yaml").rows
        for run in [row.run(Path("warm"), seed) for seed in row.seeds]
    ]
    changed = {name for run in runs for name in run if run[name] != runs[0].get(name)}
    assert changed == {"learning_rate", "dropout", "seed", "output_dir"}
    assert len({(run["learning_rate"], run["dropout"]) for run in runs}) == len({run["seed"] for run in runs}) == 6
    assert {run["model_name_or_path"] for run in runs} == {"warm-head"}
    grid = yaml.safe_load((RECIPES / "grid.yaml").read_text(encoding="utf-8"))
    assert list(grid["benchmarks"]) == ["hh_rlhf"]
