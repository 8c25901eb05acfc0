"""`idrm teacher` from flags to saved teacher: processes, ZeRO-3, being killed and going on, refusals, --check."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from idrm.capture import Teacher
from idrm.nli import encode_nli, evaluate_classifier, load_nli
from idrm.teacher import main

SCRIPT = "idrm/teacher.py"
LABELS = ("entailment", "neutral", "contradiction")


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory, encoder_config, teacher_tokenizer):
    """A classifier of other labels, whose head makes room, without dropout: ranks then see the same model."""
    config = encoder_config(
        "bert",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    torch.manual_seed(8)
    folder = tmp_path_factory.mktemp("encoder")
    BertForSequenceClassification(config).save_pretrained(folder)
    teacher_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flags(encoder_path, nli_path, eval_nli_path):
    """Six epochs of twelve steps, with an evaluation and a checkpoint every eighteen."""
    return (
        *("--model_name_or_path", encoder_path, "--dataset_name", nli_path, "--eval_dataset_name", eval_nli_path),
        *("--num_train_epochs", 6, "--learning_rate", "5e-3", "--eval_steps", 18, "--logging_steps", 6),
    )


@pytest.fixture(scope="session")
def run_here():
    """run_here(folder, *flags): the command in this process, on one thread as the processes of other tests are."""

    def run(folder, *flags):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            main([*map(str, flags), "--output_dir", str(folder), "--use_cpu", "true", "--disable_tqdm", "true"])
        finally:
            torch.set_num_threads(threads)
        return folder

    return run


@pytest.fixture(scope="session")
def plain(tmp_path_factory, run_here, flags):
    """The folder of one plain run."""
    return run_here(tmp_path_factory.mktemp("teacher") / "out", *flags, "--per_device_train_batch_size", 8)


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def records(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [record for record in history if "loss" in record]


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def measured(folder, path):
    """The metrics of a saved teacher, by code that knows nothing of its training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    pairs, _, _ = load_nli(str(path))
    encoded, _ = encode_nli(pairs, tokenizer, max_length=128, token_types=True)
    return evaluate_classifier(model, tokenizer, encoded, LABELS, show_progress=False)


def test_what_a_run_leaves(plain, eval_nli_path, caplog):
    names = {path.name for path in plain.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "run.yaml", "all_results.json"}
    assert not {name for name in names if name.startswith(".") or name.endswith((".bin", ".pt"))}
    assert yaml.safe_load((plain / "run.yaml").read_text())["eval_strategy"] == "steps"
    ours = measured(plain, eval_nli_path)
    assert ours["accuracy"] > 0.6
    for name in ("accuracy", "macro_f1"):
        assert results(plain)[f"eval_{name}"] == pytest.approx(ours[name])
    for label in LABELS:
        assert results(plain)[f"eval_accuracy_{label}"] == pytest.approx(ours["per_label"][label]["accuracy"])
    with caplog.at_level("WARNING", logger="idrm"):
        Teacher.load(str(plain))
    assert caplog.messages == []


def test_the_teacher_is_the_best_checkpoint(plain):
    history = json.loads((plain / "trainer_state.json").read_text())
    evaluations = {
        record["step"]: record["eval_accuracy"] for record in history["log_history"] if "eval_accuracy" in record
    }
    assert len(evaluations) > 2
    best = max(evaluations, key=lambda step: (evaluations[step], -step))
    assert history["best_model_checkpoint"].endswith(f"checkpoint-{best}")
    expected = weights(plain / f"checkpoint-{best}")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(plain).items())


def test_two_ranks_under_zero3_are_one_plain_process(tmp_path, train, run_here, flags):
    flags = (*flags, "--num_train_epochs", 1, "--eval_steps", 6)
    plain = run_here(tmp_path / "plain", *flags, "--per_device_train_batch_size", 8)
    flags = ("--deepspeed", "ds_zero3.json", *flags, "--per_device_train_batch_size", 4)
    run = train(tmp_path / "out", *flags, ranks=2, script=SCRIPT)
    assert run.returncode == 0, run.errors
    assert run.errors.count("makes room for one for entailment, neutral, contradiction") == 1
    assert run.errors.rstrip().splitlines()[-1].endswith(f"The teacher is in {run.folder}")
    ours, theirs = results(run.folder), results(plain)
    for name in ("eval_loss", "eval_accuracy", "eval_macro_f1", "train_loss", "eval_pairs"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-3), name
    # The first steps, before rounding has grown: a gradient that the ranks had summed would be twice as long.
    assert run.records[0]["grad_norm"] == pytest.approx(records(plain)[0]["grad_norm"], rel=1e-3)
    for ours, theirs in zip(run.records, records(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2, abs=1e-3)


def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(
    tmp_path, train, start_training, run_here, flags, teacher_path
):
    # A head that is kept, dropout, and evaluations that do not improve: all that a resumed run has to take up. The loss
    # falls and ought to rise, so that soon each evaluation counts, and the twelfth in a row ends the training: some
    # of them before the kill and some after it.
    flags = (*flags, "--model_name_or_path", teacher_path, "--per_device_train_batch_size", 8)
    flags = (*flags, "--num_train_epochs", 12, "--eval_steps", 6, "--learning_rate", "1e-3")
    flags = (*flags, "--early_stopping_patience", 12, "--metric_for_best_model", "loss", "--greater_is_better", "true")
    unbroken = run_here(tmp_path / "unbroken", *flags)
    folder = tmp_path / "out"
    process = start_training(folder, *flags, script=SCRIPT, start_new_session=True)
    deadline = time.monotonic() + 200
    later = re.compile(r".*/checkpoint-(2[4-9]|[3-9]\d)/trainer_state\.json")  # it may be half-written
    while not any(later.fullmatch(str(path)) for path in folder.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "all_results.json").exists()
    assert not (folder / "config.json").exists()
    resumed = train(folder, *flags, "--resume_from_checkpoint", script=SCRIPT)
    assert resumed.returncode == 0, resumed.errors
    states = [json.loads((run / "trainer_state.json").read_text()) for run in (folder, unbroken)]
    best, last = states[1]["best_global_step"], states[1]["global_step"]
    assert best < 24 < last == best + 72 < states[1]["max_steps"]
    assert (states[0]["best_global_step"], states[0]["global_step"]) == (best, last)
    for part in (".", f"checkpoint-{last}"):
        expected = weights(unbroken / part)
        for name, weight in weights(folder / part).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


def test_training_stops_where_evaluation_no_longer_improves(tmp_path, run_here, flags, caplog):
    flags = (*flags, "--learning_rate", 0, "--eval_steps", 6, "--early_stopping_patience", 2)
    with caplog.at_level("INFO", logger="idrm"):
        folder = run_here(tmp_path / "out", *flags, "--num_train_epochs", 30)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["global_step"]) == (6, 18)
    assert "Stopped early, at step 18 of 90." in caplog.messages
    # Going on from there, it has nothing to do but to save what it had found.
    (folder / "model.safetensors").unlink()
    caplog.clear()
    with caplog.at_level("INFO", logger="idrm"):
        run_here(folder, *flags, "--num_train_epochs", 30, "--resume_from_checkpoint")
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 18
    assert "Stopped early, at step 18 of 90." in caplog.messages
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-6"]
    expected = weights(folder / "checkpoint-6")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(folder).items())


def test_a_newcomers_run_holds_out_pairs_and_tests(tmp_path, run_here, encoder_path, nli_path, eval_nli_path, caplog):
    with caplog.at_level("INFO", logger="idrm"):
        folder = run_here(
            tmp_path / "out",
            *("--model_name_or_path", encoder_path, "--dataset_name", nli_path, nli_path),
            *("--num_train_epochs", 1, "--eval_share", 0.25, "--pooling", "mean"),
            *("--test_dataset_name", f"near={eval_nli_path}", f"same={nli_path}"),
        )
    assert "48 of the training pairs are held out to evaluate on" in caplog.text
    found = results(folder)
    assert (found["train_pairs"], found["eval_pairs"]) == (144, 48)
    assert (found["test_near_pairs"], found["test_same_pairs"]) == (29, 96)
    assert json.loads((folder / "config.json").read_text())["classifier_pooling"] == "mean"


def test_a_check_measures_accuracy_and_writes_it(tmp_path, run_here, plain, eval_nli_path, capsys):
    flags = ("--model_name_or_path", plain, "--eval_dataset_name", eval_nli_path, "--check")
    run_here(tmp_path / "report", *flags)
    report = json.loads((tmp_path / "report" / "nli_accuracy.json").read_text())
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["nli_accuracy.json"]
    found = report[str(plain)]
    assert 0 <= found.pop("with_other_premises") <= 1
    assert report == {str(plain): measured(plain, eval_nli_path)}
    table = capsys.readouterr().out
    for label in LABELS:
        row = next(line for line in table.splitlines() if label in line)
        assert f"{report[str(plain)]['per_label'][label]['accuracy']:.4f}" in row


def test_a_check_exchanges_the_premises(tmp_path, run_here, save_encoder):
    """A classifier whose answer is in the hypothesis alone has the same accuracy with any premise."""
    rows = [{"premise": f"the {index} reads", "hypothesis": "a lamp", "label": index % 3} for index in range(30)]
    path = tmp_path / "nli.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = dict(enumerate(LABELS))
    encoder = save_encoder("bert", AutoModelForSequenceClassification, id2label=names, hidden_size=32)
    model = AutoModelForSequenceClassification.from_pretrained(encoder)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    model.save_pretrained(encoder)
    run_here(tmp_path / "report", "--check", "--model_name_or_path", encoder, "--eval_dataset_name", path)
    (found,) = json.loads((tmp_path / "report" / "nli_accuracy.json").read_text()).values()
    assert found["with_other_premises"] == found["accuracy"] == pytest.approx(1 / 3)


def test_a_check_puts_teachers_side_by_side(tmp_path, run_here, plain, encoder_path, eval_nli_path, eval_pairs_path):
    """The trained one and the untuned one it came from, on NLI and on preference pairs."""
    flags = ("--check", "--model_name_or_path", plain, "--compare_with", encoder_path, "--max_pairs", 4)
    run_here(tmp_path / "report", *flags, "--eval_dataset_name", eval_nli_path, "--pairs_name", eval_pairs_path)
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"check.json", "check.md", "check.png"}
    report = json.loads((tmp_path / "report" / "check.json").read_text())
    trained, untuned = report["teachers"]
    assert (trained["name"], untuned["name"]) == (str(plain), str(encoder_path))
    assert trained["accuracy"]["accuracy"] == measured(plain, eval_nli_path)["accuracy"]
    assert untuned["accuracy"] is None
    assert trained["pairs"]["measured"] == 4
    own, other = (teacher["blocks"] for teacher in (trained, untuned))
    assert len(own) == len(other) == 2
    for ours, theirs in zip(own, other, strict=True):
        assert ours["intra"]["distance"] != theirs["intra"]["distance"]
    assert "A against B: Only the first has a head for NLI's labels" in " ".join(report["verdict"])


@pytest.fixture
def refused(tmp_path, encoder_path, nli_path, capsys):
    """refused(name=value, ...): the one line that a run with these flags ends with, its folder untouched."""
    good = {"model_name_or_path": encoder_path, "dataset_name": nli_path, "output_dir": tmp_path / "out"}

    def run(**changes):
        before = sorted((tmp_path / "out").rglob("*"))
        argv = ["--use_cpu", "true", "--disable_tqdm", "true"]
        for name, value in {**good, **changes}.items():
            if value is not None:
                argv += [f"--{name}", *([] if value is True else [str(value)])]
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2
        assert sorted((tmp_path / "out").rglob("*")) == before
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    return run


def test_bad_input_is_one_line(refused, tmp_path, student_path, eval_nli_path):
    (tmp_path / "bad.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": 7}\n')
    assert "bad.jsonl: record 1: expected an integer from 0 to 2" in refused(dataset_name=tmp_path / "bad.jsonl")
    assert "bad.jsonl: record 1" in refused(eval_dataset_name=tmp_path / "bad.jsonl")
    assert "./nowhere.jsonl: no such file" in refused(test_dataset_name="./nowhere.jsonl")
    assert "is no encoder that can teach (llama)" in refused(model_name_or_path=student_path)
    assert "--max_length 129: the model reads 128 tokens at most" in refused(max_length=129)
    assert "--metric_for_best_model f1: expected one of loss, accuracy" in refused(metric_for_best_model="f1")
    assert "--attn_implementation ring_attention: " in refused(attn_implementation="ring_attention")
    assert "--report_to no_such_tracker" in refused(report_to="no_such_tracker")
    assert "make no batch of 512" in refused(dataloader_drop_last="true", per_device_train_batch_size=512)
    assert "--model_name_or_path ./nowhere: no such folder" in refused(model_name_or_path="./nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_bnb_8bit"}, "--optim adamw_bnb_8bit: "),
        ({"optim": "lomo"}, "--optim lomo: "),
        ({"optim": "adafactor", "optim_args": "no_value"}, "--optim adafactor, --optim_args no_value: "),
        ({"use_liger_kernel": "true"}, "--use_liger_kernel: liger-kernel is not installed here"),
        ({"torch_compile_mode": "bogus"}, "--torch_compile_mode bogus: "),
        ({"torch_compile_backend": "bogus"}, "--torch_compile_backend bogus: "),
        ({"accelerator_config": "nowhere.json"}, "training arguments: [Errno 2] No such file"),
        ({"push_to_hub": "true"}, "--push_to_hub: the hub cannot be asked: Cannot reach "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr: "),
    ],
)
def test_what_cannot_be_set_up_is_one_line(refused, monkeypatch, tmp_path, changes, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert message in refused(**changes)
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_a_metric_of_a_label_that_the_evaluation_lacks(refused, tmp_path, nli_path):
    records = [line for line in nli_path.read_text().splitlines() if json.loads(line)["label"] != 1]
    (tmp_path / "two.jsonl").write_text("\n".join(records))
    line = refused(eval_dataset_name=tmp_path / "two.jsonl", metric_for_best_model="accuracy_neutral")
    assert line.endswith("expected one of loss, accuracy, macro_f1, accuracy_entailment, accuracy_contradiction")


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_training_that_diverges_saves_no_model(tmp_path, run_here, flags, capsys, evaluates):
    flags = (*flags, "--learning_rate", "1e30", "--warmup_steps", 0, "--max_steps", 3, "--eval_steps", 3)
    if not evaluates:
        flags = (*flags, "--eval_strategy", "no", "--save_strategy", "no")
    with pytest.raises(SystemExit) as exit_:
        run_here(tmp_path / "out", *flags)
    assert exit_.value.code == 2
    message = "error: --learning_rate 1e+30: the loss of an evaluation is nan after 3 steps: the training has diverged"
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_deberta_v1_in_half_precision(refused, save_encoder):
    assert "DeBERTa v1 fails under autocast" in refused(model_name_or_path=save_encoder("deberta"), bf16="true")


def test_a_folder_that_holds_another_run(refused, plain, tmp_path, eval_nli_path):
    shutil.copytree(plain, tmp_path / "out")
    assert "holds another run (run.yaml)" in refused()
    assert "holds another run, with eval_dataset_name" in refused(resume_from_checkpoint="true")


def test_flags_of_a_check_without_one(refused, eval_pairs_path):
    assert "--pairs_name is for --check" in refused(pairs_name=eval_pairs_path)
    assert "--compare_with is for --check" in refused(compare_with="other")
    assert "--check needs something to measure on" in refused(check=True, dataset_name=None)
    assert "--max_pairs: expected at least 1" in refused(check=True, pairs_name=eval_pairs_path, max_pairs=0)


def test_a_check_refuses_before_it_measures(refused, eval_pairs_path, eval_nli_path, plain, tmp_path, encoder_path):
    def line(**changes):
        values = {"eval_dataset_name": eval_nli_path, "model_name_or_path": plain, "dataset_name": None}
        return refused(**{"check": True, **values, **changes})

    assert "heat_map_pair 99: expected one of the 11 pairs" in line(pairs_name=eval_pairs_path, heat_map_pair=99)
    assert "layer 9 is beyond the model's depth" in line(pairs_name=eval_pairs_path, heat_map_layer=9)
    assert "--teacher_max_length 999: the model reads" in line(pairs_name=eval_pairs_path, teacher_max_length=999)
    assert "is for the attention maps: give --pairs_name too" in line(max_pairs=3)
    assert f"--compare_with {plain}: is there already" in line(compare_with=plain)
    assert "--dataset_name is for training" in line(dataset_name=eval_nli_path)
    assert "is no NLI classifier, and there is nothing to measure" in line(model_name_or_path=encoder_path)
    (tmp_path / "file").touch()
    assert "--output_dir" in line(output_dir=tmp_path / "file")


def test_a_check_is_one_process(refused, monkeypatch, eval_nli_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--check runs in one process" in refused(check=True, eval_dataset_name=eval_nli_path, dataset_name=None)
