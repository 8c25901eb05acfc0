"""Bad input: one clear line on stderr, exit status 2, and nothing half-written."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, BertForSequenceClassification, ModernBertConfig

from idrm.errors import InputError
from idrm.train import main


@pytest.fixture
def flags(tmp_path, student_path, teacher_path, pairs_path):
    """The flags of a good run as a dict, to be spoilt one at a time."""
    return {
        "model_name_or_path": student_path,
        "teacher_name_or_path": teacher_path,
        "dataset_name": pairs_path,
        "output_dir": tmp_path / "out",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "max_steps": 1,
    }


@pytest.fixture
def refused(flags, capsys):
    """refused(name=value, ...): the one line that the run with these flags ends with."""

    def run(**changes):
        before = sorted(flags["output_dir"].rglob("*"))
        argv = []
        for name, value in {**flags, **changes}.items():
            if value is not None:
                argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2
        assert sorted(flags["output_dir"].rglob("*")) == before
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    return run


def test_a_missing_file(refused):
    assert "./nowhere.jsonl: no such file" in refused(dataset_name="./nowhere.jsonl")


def test_malformed_json_is_named_by_file_and_line(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": "a",\n')
    assert f"{tmp_path}/bad.jsonl:2: malformed JSON" in refused(dataset_name=tmp_path / "bad.jsonl")


def test_missing_keys(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    line = refused(dataset_name=tmp_path / "bad.jsonl")
    assert "bad.jsonl: record 1" in line
    assert "rejected" in line


def test_a_bad_evaluation_set_is_refused_before_training(refused):
    assert "./nowhere.jsonl" in refused(eval_dataset_name=["near=./nowhere.jsonl"])


def test_data_without_a_model_and_a_model_without_data(refused):
    assert "--model_name_or_path" in refused(model_name_or_path=None)
    assert "--dataset_name" in refused(dataset_name=None)


def test_alpha_without_a_teacher(refused):
    assert "--teacher_name_or_path" in refused(teacher_name_or_path=None)


def test_a_pad_token_that_is_eos(refused, tmp_path, student_path):
    shutil.copytree(student_path, tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "student")
    assert "--pad_token" in refused(model_name_or_path=tmp_path / "student")


def test_a_teacher_without_a_fast_tokenizer(refused, tmp_path, teacher_path):
    BertForSequenceClassification.from_pretrained(teacher_path).save_pretrained(tmp_path / "teacher")
    assert "tokenizer" in refused(teacher_name_or_path=tmp_path / "teacher")


@pytest.mark.parametrize("prefix", ["gradient", "activation"])
def test_reentrant_checkpointing(refused, prefix):
    kwargs = {f"{prefix}_checkpointing": "true", f"{prefix}_checkpointing_kwargs": '{"use_reentrant": true}'}
    assert "use_reentrant" in refused(**kwargs)


def test_an_unknown_attention_implementation(refused):
    assert "ring_attention" in refused(attn_implementation="ring_attention")


def test_layers_beyond_either_depth(refused):
    assert "student: layer 3 is beyond" in refused(student_layers=3, teacher_layers=0)
    assert "teacher: layer -3 is beyond" in refused(student_layers=0, teacher_layers=-3)
    assert "is beyond" in refused(top_blocks=3)


def test_head_groups_that_do_not_divide(refused):
    assert "4 of the student and 2 of the teacher" in refused(num_head_groups=4)


def test_lengths_beyond_what_the_models_read(refused):
    assert "--max_length 257: the model reads 256 tokens at most" in refused(max_length=257)
    assert "--teacher_max_length 129: the model reads 128 tokens at most" in refused(teacher_max_length=129)


def test_a_kernel_that_cannot_run_here(refused, monkeypatch):
    if importlib.util.find_spec("triton") is not None:
        # Tests without a GPU interpret Triton's kernels, which a user's process does not.
        monkeypatch.setattr("idrm_kernels.impl.triton.INTERPRETED", SimpleNamespace(value=False))
    assert "--kernel_impl triton" in refused(kernel_impl="triton")


def test_a_metric_that_evaluation_does_not_have(refused, eval_pairs_path):
    line = refused(
        eval_dataset_name=[f"near={eval_pairs_path}"], eval_strategy="steps", metric_for_best_model="accuracy"
    )
    assert "eval_near_accuracy" in line


def test_a_cache_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file: cannot be made" in refused(teacher_cache=tmp_path / "file")
    assert "--teacher_cache: expected a folder, got an empty name" in refused(teacher_cache="")
    assert "--alpha 0 has no teacher" in refused(teacher_cache=tmp_path / "cache", alpha=0)
    assert "--teacher_cache_max_gb 1: caps no cache" in refused(teacher_cache_max_gb=1)
    assert "--teacher_cache_max_gb: expected at least" in refused(teacher_cache_max_gb=-1, teacher_cache="cache")


def test_an_unknown_flag(refused):
    assert "--alfa" in refused(alfa=1)


def test_an_output_folder_that_holds_another_run(refused, flags):
    folder = flags["output_dir"]
    folder.mkdir()
    (folder / "run.yaml").write_text("alpha: 0.5\n")
    assert "holds another run (run.yaml)" in refused()
    assert "holds another run, with model_name_or_path None" in refused(resume_from_checkpoint="true")


def test_an_output_folder_that_holds_a_model(refused, flags):
    flags["output_dir"].mkdir()
    (flags["output_dir"] / "config.json").write_text("{}")
    assert "holds a model or checkpoints" in refused()


def test_an_output_folder_that_is_a_file(refused, flags, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in refused(output_dir=tmp_path / "file")


def test_a_checkpoint_that_is_none(refused, tmp_path):
    assert "expected a folder with trainer_state.json" in refused(resume_from_checkpoint=tmp_path)


def test_a_deepspeed_configuration_that_contradicts_the_flags(tmp_path, flags):
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}}')
    flags |= {"deepspeed": tmp_path / "ds.json", "alpha": 0, "per_device_train_batch_size": 2}
    script = [sys.executable, "idrm/train.py", *itertools.chain(*((f"--{name}", str(v)) for name, v in flags.items()))]
    run = subprocess.run(script, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert run.returncode == 2
    assert "error: --deepspeed: contradicts the flags (ds train_micro_batch_size_per_gpu=3 vs hf" in run.stderr
    assert not flags["output_dir"].exists()


def test_an_output_folder_that_cannot_be_made(refused, flags, pairs_path):
    assert "cannot be written to" in refused(output_dir=pairs_path / "below" / "a file")


def test_models_that_are_not_there(refused):
    assert "--model_name_or_path ./nowhere: no such folder" in refused(model_name_or_path="./nowhere")
    assert "teacher '/no/where': no such folder" in refused(teacher_name_or_path="/no/where")


def test_a_student_that_is_an_encoder(refused, teacher_path, tmp_path):
    assert "is an encoder (bert)" in refused(model_name_or_path=teacher_path)
    ModernBertConfig().save_pretrained(tmp_path / "modernbert")
    assert "is an encoder (modernbert)" in refused(model_name_or_path=tmp_path / "modernbert")


def test_windows_of_a_teacher_that_turns_by_position(refused, save_encoder):
    teacher = save_encoder("modernbert", num_hidden_layers=3)
    line = refused(teacher_name_or_path=teacher, teacher_long_inputs="windows")
    assert "those of two windows do not compare; it reads up to 128 tokens at once" in line


def test_a_teachers_attention_that_is_unknown(refused):
    line = refused(teacher_attn_implementation="flashdeberta")
    assert "teacher: attention implementation 'flashdeberta' is unknown; expected one of eager, sdpa, " in line


@pytest.mark.parametrize("whose", ["model", "teacher"])
def test_files_of_a_model_that_are_broken(refused, tmp_path, flags, whose):
    name = f"{whose}_name_or_path"
    for file, size in (("tokenizer.json", 2), ("config.json", 1), ("model.safetensors", 1000)):
        shutil.copytree(flags[name], tmp_path / file)
        content = (tmp_path / file / file).read_bytes()
        (tmp_path / file / file).write_bytes(b"{}" if size == 2 else content[:size])
        assert str(tmp_path / file) in refused(**{name: tmp_path / file})


def test_a_tracker_that_is_not_there(refused):
    assert "--report_to no_such_tracker" in refused(report_to="no_such_tracker")


def test_an_optimizer_and_a_schedule_that_cannot_be_built(refused):
    assert "--optim lomo: You need to install `lomo_optim`" in refused(optim="lomo")
    assert "get_cosine_schedule_with_warmup() got an unexpected keyword" in refused(
        lr_scheduler_type="cosine", lr_scheduler_kwargs='{"no_such_argument": 1}'
    )


def test_fewer_pairs_than_the_one_batch_that_is_not_dropped(refused):
    line = refused(dataloader_drop_last="true", per_device_train_batch_size=64)
    assert "48 pairs make no batch of 64" in line


def test_batches_of_tokens_that_cannot_be(refused, monkeypatch):
    """A pair that fits in none, and students whose pairs are not packed: known before and only after loading."""
    line = refused(tokens_per_batch=60, alpha=0)
    assert "--tokens_per_batch 60: training pair " in line
    assert "takes 64 tokens, the most of 1 that do not fit; give at least 64, or a lower --max_length" in line
    needs = "--tokens_per_batch 234: needs each prompt read once: "
    line = refused(tokens_per_batch=234, alpha=0, torch_compile="true")
    assert f"{needs}under --torch_compile every batch would be compiled anew" in line
    assert "split_batches" in refused(tokens_per_batch=234, alpha=0, accelerator_config='{"split_batches": true}')

    def unreadable(student):
        raise InputError("it has no plain reward head")

    monkeypatch.setattr("idrm.train.read_packed_pairs", unreadable)
    assert f"{needs}it has no plain reward head" in refused(tokens_per_batch=234, alpha=0)


def test_an_interrupted_run_shows_no_traceback(flags, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("idrm.train.train", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main([token for name, value in flags.items() for token in (f"--{name}", str(value))])
    assert exit_.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
