"""Policies in training: losses against other code, rewards that rise, two ranks under ZeRO-3, resuming, refusals."""

import json
import shutil
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, modeling_utils

from idrm.errors import InputError
from idrm.evaluation.command import main as evaluate
from idrm.evaluation.reward_model import load_reward_model
from idrm.policy import command, training
from idrm.policy.arguments import parse_arguments
from idrm.policy.dialogues import load_examples
from idrm.policy.generation import generate
from idrm.policy.generation import parse_arguments as parse_generation
from idrm.policy.models import load_policy, load_policy_tokenizer
from idrm.policy.reward import reward_function

FAST = ("--learning_rate", 3e-3, "--logging_steps", 1)
RLOO = (
    *("--max_steps", 25, "--learning_rate", 3e-3, "--beta", 0.0, "--num_generations", 4),
    *("--per_device_train_batch_size", 32, "--max_completion_length", 16, "--save_strategy", "no"),
)
PPO = (
    *("--total_episodes", 640, "--learning_rate", 5e-3, "--lr_scheduler_type", "constant", "--kl_coef", 0.0),
    *("--num_mini_batches", 2, "--num_ppo_epochs", 2, "--per_device_train_batch_size", 32, "--response_length", 16),
    *("--temperature", 1.0, "--gradient_checkpointing", "false", "--save_strategy", "no"),
)


PPO_NAMES = ("--model_name_or_path", "m", "--dataset_name", "d", "--reward_model_name_or_path", "r")


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_sft_learns_the_responses_alone(sft_path, untrained_path, eval_pairs_path):
    """TRL's evaluation against a cross-entropy written out here, over the tokens after each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(sft_path)
    examples, _ = load_examples("sft", str(eval_pairs_path), "test", False)

    def loss(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        losses = []
        for example in examples:
            prompt = len(tokenizer(example["prompt"])["input_ids"])
            ids = torch.tensor(tokenizer(example["prompt"] + example["completion"] + "</s>")["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="none"))
        return losses

    losses = loss(sft_path)
    # Batches of eight and three pairs: a mean over batches of means over tokens.
    batches = [torch.cat(losses[:8]).mean(), torch.cat(losses[8:]).mean()]
    result = json.loads((sft_path / "eval_results.json").read_text())["eval_loss"]
    low, high = sorted((torch.cat(losses).mean().item(), statistics.mean(map(float, batches))))
    assert low - 0.02 <= result <= high + 0.02
    assert torch.cat(losses).mean() < torch.cat(loss(untrained_path)).mean() - 1


def test_a_resumed_policy_is_the_unbroken_one(
    tmp_path, run_action, sft_path, untrained_path, pairs_path, eval_pairs_path
):
    folder = tmp_path / "out"
    shutil.copytree(sft_path, folder)
    shutil.rmtree(folder / "checkpoint-40")
    flags = (
        *("--model_name_or_path", untrained_path, "--dataset_name", pairs_path, "--eval_dataset_name", eval_pairs_path),
        *("--max_steps", 40, "--learning_rate", 3e-3, "--save_steps", 20, "--logging_steps", 1),
    )
    with pytest.raises(InputError, match="holds another run"):
        run_action("sft", folder, *flags)
    run_action("sft", folder, *flags, "--resume_from_checkpoint")
    for name, weight in load_policy(str(sft_path)).state_dict().items():
        torch.testing.assert_close(load_policy(str(folder)).state_dict()[name], weight, rtol=0, atol=0)


def test_dpo_raises_its_implicit_accuracy_and_idrm_eval_measures_the_same(
    tmp_path, run_action, sft_path, pairs_path, eval_pairs_path
):
    flags = ("--model_name_or_path", sft_path, "--dataset_name", pairs_path, "--eval_dataset_name", eval_pairs_path)
    folder = run_action("dpo", tmp_path / "dpo", *flags, "--max_steps", 12, "--learning_rate", 1e-3)
    result = json.loads((folder / "eval_results.json").read_text())
    assert result["eval_rewards/accuracies"] > 0.9
    scores = ["--implicit_reward", str(sft_path), "--benchmark", f"held-out={eval_pairs_path}", "--device", "cpu"]
    evaluate([str(folder), *scores, "--output_dir", str(tmp_path / "scores")])
    outcomes = (tmp_path / "scores" / "outcomes" / "dpo" / "held-out.jsonl").read_text().splitlines()
    outcomes = [json.loads(line) for line in outcomes]
    outcomes = [outcome for outcome in outcomes if "chosen_reward" in outcome]
    margins = [outcome["chosen_reward"] - max(outcome["rejected_rewards"]) for outcome in outcomes]
    assert len(margins) == 11
    assert statistics.mean(margin > 0 for margin in margins) > 0.9
    # TRL's is a mean of batches' means, of eight and three pairs.
    batches = [statistics.mean(margins[:8]), statistics.mean(margins[8:])]
    assert min(batches) - 1e-3 <= result["eval_rewards/margins"] <= max(batches) + 1e-3


def held_out_rewards(policy, reward, prompts, folder):
    """The rewards of six samples of each held-out prompt."""
    rewards = []
    for seed in range(6):
        flags = ["--model_name_or_path", policy, "--dataset_name", prompts, "--output_file", folder / f"{seed}.jsonl"]
        flags += ["--overwrite", "true", "--max_new_tokens", 16, "--seed", seed, "--device", "cpu"]
        lines = generate(parse_generation([*map(str, flags)]))
        messages = [[*line["prompt"], {"role": "assistant", "content": line["response"]}] for line in lines]
        rewards += reward.rewards([reward.encode(dialogue, True) for dialogue in messages], show_progress=False)
    return torch.tensor(rewards, dtype=torch.float64)


@pytest.mark.parametrize(("action", "flags", "seeds"), [("rloo", RLOO, 3), ("ppo", PPO, 2)], ids=["rloo", "ppo"])
def test_the_reward_of_held_out_prompts_rises(
    tmp_path, run_action, sft_path, reward_path, pairs_path, eval_pairs_path, action, flags, seeds
):
    reward = load_reward_model(str(reward_path), device="cpu")
    before = held_out_rewards(sft_path, reward, eval_pairs_path, tmp_path)
    models = ("--model_name_or_path", sft_path, "--reward_model_name_or_path", reward_path)
    for seed in range(seeds):
        folder = run_action(action, tmp_path / f"{seed}", *models, "--dataset_name", pairs_path, *flags, "--seed", seed)
        after = held_out_rewards(folder, reward, eval_pairs_path, tmp_path)
        error = (before.var() / len(before) + after.var() / len(after)).sqrt()
        # The lower end of a 95% interval.
        assert after.mean() - before.mean() - 1.96 * error > 0.2


def test_the_reward_is_that_of_transformers_alone(reward_path, eval_pairs_path):
    examples, _ = load_examples("prompts", str(eval_pairs_path), "test", False)
    reward = reward_function(load_reward_model(str(reward_path), device="cpu"), batch_size=4)
    completions = [f" The kettle boils {index} times. " for index in range(len(examples))]
    rewards = reward(
        prompts=examples["prompt"][:],
        completions=completions,
        messages=examples["messages"][:],
        conversational=examples["conversational"][:],
        trainer_state=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(reward_path)
    model = AutoModelForSequenceClassification.from_pretrained(reward_path)
    for prompt, completion, value in zip(examples["prompt"], completions, rewards, strict=True):
        inputs = tokenizer(prompt + completion.rstrip() + "</s>", return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            assert value == pytest.approx(model(**inputs).logits.item(), abs=1e-5)


def test_a_policy_with_a_chat_template(
    tmp_path, run_action, chat_tokenizer, untrained_path, reward_path, pairs_path, eval_pairs_path
):
    """It learns and writes messages, and is rewarded by a model without a template, which reads a dialogue."""
    base = tmp_path / "base"
    shutil.copytree(untrained_path, base)
    chat_tokenizer.save_pretrained(base)
    data = ("--dataset_name", pairs_path, "--eval_dataset_name", eval_pairs_path, "--save_strategy", "no")
    sft = run_action("sft", tmp_path / "sft", "--model_name_or_path", base, *data, "--max_steps", 20, *FAST)
    losses = [record["loss"] for record in history(sft) if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
    dpo = run_action("dpo", tmp_path / "dpo", "--model_name_or_path", sft, *data, "--max_steps", 12, *FAST)
    assert json.loads((dpo / "eval_results.json").read_text())["eval_rewards/accuracies"] > 0.9
    models = ("--model_name_or_path", sft, "--reward_model_name_or_path", reward_path)
    rloo = run_action("rloo", tmp_path / "rloo", *models, *data, "--max_steps", 2, "--max_completion_length", 8)
    assert torch.tensor(json.loads((rloo / "eval_results.json").read_text())["eval_reward"]).isfinite()
    path = tmp_path / "responses.jsonl"
    flags = ["--model_name_or_path", dpo, "--dataset_name", eval_pairs_path, "--output_file", path, "--device", "cpu"]
    lines = generate(parse_generation([*map(str, flags), "--max_new_tokens", "8"]))
    assert not any("[assistant]" in line["response"] for line in lines)


def test_two_ranks_under_zero3(tmp_path, start_training, sft_path, reward_path, pairs_path):
    """PPO, which of all four has the most models; saved from partitioned weights, whole, and moved."""
    process = start_training(
        tmp_path / "out",
        *("--deepspeed", "ds_zero3.json", "--model_name_or_path", sft_path, "--reward_model_name_or_path", reward_path),
        *("--dataset_name", pairs_path, "--per_device_train_batch_size", 8, "--total_episodes", 16),
        *("--response_length", 8, "--learning_rate", 1e-3, "--num_ppo_epochs", 1),
        *("--gradient_checkpointing", "false"),
        ranks=2,
        script=("--module", "idrm.policy", "ppo"),
    )
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    saved, before = load_policy(str(tmp_path / "out")), load_policy(str(sft_path))
    moved = [not torch.equal(a, b) for a, b in zip(saved.parameters(), before.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert all(bool(weight.isfinite().all()) for weight in saved.parameters())


@pytest.mark.parametrize(
    ("action", "flags", "message"),
    [
        ("sft", ["--dataset_name", "d"], "--model_name_or_path is missing: give the language model"),
        ("dpo", ["--model_name_or_path", "m"], "--dataset_name is missing: give the preference pairs"),
        ("rloo", ["--model_name_or_path", "m", "--dataset_name", "d"], "--reward_model_name_or_path is missing"),
        ("sft", ["--model_name_or_path", "m", "--dataset_name", "d", "--action", "dpo"], "this is idrm policy sft"),
        ("ppo", [*PPO_NAMES, "--max_steps", "3"], "--max_steps: is not for TRL's PPO trainer"),
        ("ppo", [*PPO_NAMES, "--reward_max_length", "64"], "--reward_max_length: is not for TRL's PPO trainer"),
        ("ppo", [*PPO_NAMES, "--batch_size", "64"], "--batch_size: is not for TRL's PPO trainer"),
        ("ppo", [*PPO_NAMES, "--max_grad_norm", "0.5"], "--max_grad_norm: .* clips no gradient but under --deepspeed"),
        ("ppo", [*PPO_NAMES, "--eval_dataset_name", "e"], "--num_sample_generations: .* give both or neither"),
        ("ppo", [*PPO_NAMES, "--save_strategy", "epoch"], "--save_strategy epoch: "),
        ("ppo", [*PPO_NAMES, "--total_episodes", "0"], "--total_episodes: expected at least 1"),
        ("ppo", [*PPO_NAMES, "--temperature", "-1"], "--temperature: expected more than 0"),
        ("ppo", [*PPO_NAMES, "--num_mini_batches", "3"], "--num_mini_batches 3: does not divide the 8 responses"),
        (
            "ppo",
            [*PPO_NAMES, "--num_mini_batches", "2", "--gradient_accumulation_steps", "2"],
            "--num_mini_batches: .* one update of all micro-batches",
        ),
        (
            "ppo",
            [*PPO_NAMES, "--whiten_rewards", "true", "--num_mini_batches", "2"],
            "--whiten_rewards: needs mini-batches of 8",
        ),
        ("sft", ["--model_name_or_path", "m", "--dataset_name", "d", "--eval_strategy", "epoch"], "needs pairs"),
    ],
)
def test_flags_that_make_no_run_are_refused(action, flags, message):
    with pytest.raises(InputError, match=message):
        parse_arguments(action, flags)


def test_what_cannot_be_loaded_is_refused_and_nothing_is_written(
    tmp_path, run_action, sft_path, reward_path, minilm_path, pairs_path
):
    data, folder = ("--dataset_name", pairs_path), tmp_path / "out"
    with pytest.raises(InputError, match="is a sequence classifier; expected a language model"):
        run_action("sft", folder, "--model_name_or_path", reward_path, *data)
    policy = ("--model_name_or_path", sft_path, *data)
    with pytest.raises(InputError, match="is a language model"):
        run_action("rloo", folder, *policy, "--reward_model_name_or_path", sft_path)
    other = tmp_path / "other"
    shutil.copytree(reward_path, other)
    AutoTokenizer.from_pretrained(minilm_path).save_pretrained(other)
    with pytest.raises(InputError, match=r"has another vocabulary than .*; rloo takes any reward model"):
        run_action("ppo", folder, *policy, "--reward_model_name_or_path", other)
    rewarded = (*policy, "--reward_model_name_or_path", reward_path)
    with pytest.raises(InputError, match=r"48 prompts make no batch of 64"):
        run_action("ppo", folder, *rewarded, "--per_device_train_batch_size", 64)
    for action, flag in (("ppo", "--response_length"), ("rloo", "--max_completion_length")):
        with pytest.raises(InputError, match=rf"{flag} 250: behind a prompt of \d+ tokens it leaves the 256 that"):
            run_action(action, folder, *rewarded, flag, 250)
    with pytest.raises(InputError, match=r"--max_prompt_length 8: all 48 prompts are longer"):
        run_action("rloo", folder, *rewarded, "--max_prompt_length", 8)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("ending", "action", "message"),
    [
        ("[end]", "sft", r"ends a response with '\[end\]' and without its EOS token '</s>'"),
        ("</s>!", "ppo", "ends a response with '</s>!'; ppo has the reward model read up to '</s>'"),
    ],
)
def test_a_template_that_would_teach_no_end_is_refused(
    tmp_path, run_action, sft_path, reward_path, pairs_path, ending, action, message
):
    policy, reward = tmp_path / "policy", tmp_path / "reward"
    for source, folder in ((sft_path, policy), (reward_path, reward)):
        shutil.copytree(source, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}" + ending + "{% endfor %}"
        )
        tokenizer.save_pretrained(folder)
    flags = ("--model_name_or_path", policy, "--dataset_name", pairs_path)
    if action == "ppo":
        flags = (*flags, "--reward_model_name_or_path", reward)
    with pytest.raises(InputError, match=message):
        run_action(action, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_policy_s_template_knows_no_other_date(sft_path, tmp_path):
    folder = tmp_path / "dated"
    shutil.copytree(sft_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    rendered = load_policy_tokenizer(str(folder)).apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    assert rendered == "2024x</s>"


def test_references_have_the_policy_s_dtype_and_attention(
    tmp_path, monkeypatch, run_action, sft_path, reward_path, pairs_path
):
    seen = {}

    def stop(self, *_, **__):
        seen[type(self).__name__] = (self.ref_model.dtype, self.ref_model.config._attn_implementation)
        raise KeyboardInterrupt

    flags = ("--model_name_or_path", sft_path, "--dataset_name", pairs_path, "--beta", 0.1)
    flags = (*flags, "--dtype", "bfloat16", "--attn_implementation", "eager")
    rloo = ("--reward_model_name_or_path", reward_path, "--max_completion_length", 16)
    for action, more in (("dpo", ()), ("rloo", rloo)):
        monkeypatch.setattr(training.CheckpointingTrainer, "train", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run_action(action, tmp_path / action, *flags, *more)
    assert set(seen.values()) == {(torch.bfloat16, "eager")}
    assert len(seen) == 2


def test_ppo_checkpoints_activations_and_drops_nothing_out(
    tmp_path, monkeypatch, run_action, sft_path, reward_path, pairs_path
):
    """Neither of which TRL's trainer sees to: counted in a run whose reward model was trained with dropout."""
    dropping = tmp_path / "dropping"
    shutil.copytree(reward_path, dropping)
    config = json.loads((dropping / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    recomputed, dropouts = [], set()
    checkpoint, attention = modeling_utils.checkpoint, torch.nn.functional.scaled_dot_product_attention

    def note(function, *args, **kwargs):
        recomputed.append(function)
        return checkpoint(function, *args, **kwargs)

    def note_dropout(*args, dropout_p=0.0, **kwargs):
        dropouts.add(dropout_p)
        return attention(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(modeling_utils, "checkpoint", note)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", note_dropout)
    models = ("--model_name_or_path", sft_path, "--reward_model_name_or_path", dropping)
    size = ("--total_episodes", 16, "--per_device_train_batch_size", 16, "--num_ppo_epochs", 1, "--response_length", 4)
    for wanted in (True, False):
        recomputed.clear()
        checkpointing = ("--gradient_checkpointing", str(wanted).lower(), "--save_strategy", "no")
        run_action("ppo", tmp_path / str(wanted), *models, "--dataset_name", pairs_path, *size, *checkpointing)
        # Two blocks of the policy and two of the value model in the update, and the latter as it values responses.
        assert len(recomputed) == (6 if wanted else 0)
    assert dropouts == {0.0}


def test_without_the_extra_it_is_one_line_that_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        command.main(["dpo", "--model_name_or_path", "m"])
    assert ended.value.code == 2
    line = "error: idrm policy dpo: needs TRL, in the release of this project's extra: pip install 'idrm[policy]'\n"
    assert capsys.readouterr().err == line


def test_an_unknown_action_is_one_line(capsys):
    for action, line in (
        (["ppoo"], "error: idrm policy ppoo: expected one of sft, dpo, rloo, ppo, generate\n"),
        ([], "error: idrm policy: expected one of sft, dpo, rloo, ppo, generate\n"),
    ):
        with pytest.raises(SystemExit):
            command.main(action)
        assert capsys.readouterr().err == line
