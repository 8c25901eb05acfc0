"""A run whose prompts are read once against the same run in two rows a pair, with every loss there is.

At two ranks under ZeRO-3 it is that of tests/idrm/test_train.py.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from idrm.arguments import parse_arguments
from idrm.errors import InputError
from idrm.objectives import PreferenceLoss
from idrm.objectives.pair_order import draw_pair_order
from idrm.train import _let_share, _shares_prompts, main

EVERYTHING = {
    "alpha": 1.0,
    "student_layers": (-1, -2),
    "teacher_layers": (-1, -2),
    "preference_loss": PreferenceLoss(label_smoothing=0.1, confidence_weight=0.5),
    "prepare": lambda pairs: draw_pair_order(pairs, 3),
    "center_rewards_coefficient": 0.01,
}
RUN = {"per_device_train_batch_size": 8, "max_steps": 6}


def records(trainer):
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0},
        {"alpha": 1.0, "interaction": {"interaction_rows": "response", "normalization": "joint"}},
        EVERYTHING,
        {**EVERYTHING, "gradient_checkpointing": True},
    ],
    ids=["bradley-terry", "interaction", "everything", "checkpointing"],
)
def test_a_short_run_is_that_of_two_rows_a_pair(make_trainer, settings):
    apart, shared = (make_trainer(share_prompt=share, **settings, **RUN) for share in (False, True))
    for ours, theirs in zip(records(shared), records(apart), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"epoch", "step"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for ours, theirs in zip(shared.model.parameters(), apart.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    evaluations = [trainer.evaluate() for trainer in (shared, apart)]
    assert evaluations[0].keys() == evaluations[1].keys()
    for name in evaluations[0]:
        if not name.endswith(("runtime", "per_second")):
            assert evaluations[0][name] == pytest.approx(evaluations[1][name], rel=1e-4, abs=1e-5), name


def test_a_bottleneck_sees_the_pooled_tokens_alone(make_trainer):
    """Its noise is drawn for fewer tokens, so that an evaluation is what can be compared."""
    apart, shared = (
        make_trainer(share_prompt=share, alpha=0.0, bottleneck=(8, "paper"), bottleneck_weight=0.1)
        for share in (False, True)
    )
    shared.model.load_state_dict(apart.model.state_dict())
    ours, theirs = shared.evaluate(), apart.evaluate()
    assert ours["eval_latent_kl"] > 0
    for name in ("eval_latent_kl", "eval_loss", "eval_margin"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert all("loss" in record for record in records(shared)[:1])


def test_the_teacher_and_its_cache_do_not_know_of_it(make_trainer, tmp_path):
    """A cache that one of them has filled serves the other."""
    runs = []
    for share in (False, True):
        trainer = make_trainer(share_prompt=share, alpha=1.0, cache_folder=tmp_path / "cache", **RUN)
        runs.append(records(trainer))
        computed = trainer.interaction.teacher.computed
    assert computed == 0
    for ours, theirs in zip(*runs, strict=True):
        assert ours["interaction_loss"] == pytest.approx(theirs["interaction_loss"], rel=1e-4)


def test_what_cannot_share_is_said_once_or_refused(tmp_path, student_path, pairs_path, capsys, caplog):
    flags = ("--model_name_or_path", student_path, "--dataset_name", pairs_path, "--alpha", 0, "--max_steps", 1)
    flags = (*flags, "--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--output_dir")
    with pytest.raises(SystemExit) as ending:
        main([*map(str, flags), str(tmp_path / "on"), "--share_prompt", "on", "--torch_compile", "true"])
    assert ending.value.code == 2
    assert "error: --share_prompt on: under --torch_compile" in capsys.readouterr().err
    assert not (tmp_path / "on").exists()
    config = parse_arguments([*map(str, flags), str(tmp_path / "auto"), "--attn_implementation", "flex_attention"])
    with caplog.at_level("INFO", logger="idrm.train"):
        assert not _shares_prompts(config, AutoConfig.from_pretrained(student_path), 64)
    assert "read in both of its sequences: --attn_implementation flex_attention has no such" in caplog.text
    student = AutoModelForSequenceClassification.from_pretrained(student_path)
    student.score = torch.nn.Sequential(student.score)
    with caplog.at_level("INFO", logger="idrm.train"):
        assert not _let_share(config, student)
    assert "read in both of its sequences: LlamaForSequenceClassification has no plain reward head" in caplog.text
    config = parse_arguments([*map(str, flags), str(tmp_path / "on"), "--share_prompt", "on"])
    with pytest.raises(InputError, match="--share_prompt on: LlamaForSequenceClassification has no plain"):
        _let_share(config, student)
