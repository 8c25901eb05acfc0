"""Models on benchmarks, from messages to outcomes, against transformers alone."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from idrm.errors import InputError
from idrm.evaluation import evaluation
from idrm.evaluation.benchmark import Benchmark, Item
from idrm.evaluation.evaluation import Scoring, evaluate_models

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
)


def messages(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.fixture(scope="module")
def chat_path(tmp_path_factory, student_path):
    """The tiny reward model with a chat template that has no system role."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(student_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_benchmark():
    """A pair, a pair of equal responses, one of best-of-N, and one that the template refuses."""
    system = [{"role": "system", "content": "Be brief."}]
    items = [
        Item("a", messages("Is it far?", "The lamp is green."), (messages("Is it far?", "No."),)),
        Item("a", messages("Is it far?", "No."), (messages("Is it far?", "No. "),)),
        Item("b", messages("The price?", "Seven."), tuple(messages("The price?", t) for t in ("Twelve.", "A river."))),
        Item("b", [*system, *messages("The price?", "Seven.")], ([*system, *messages("The price?", "No.")],)),
    ]
    return Benchmark("small", "pairs", "made up", "1", items, [])


def test_outcomes_are_what_transformers_alone_would_decide(chat_path, small_benchmark, caplog):
    seen = []
    with caplog.at_level("WARNING", logger="idrm"):
        options = {"on_outcomes": seen.append, "show_progress": False}
        outcomes = evaluate_models({"ours": str(chat_path)}, [small_benchmark], Scoring(device="cpu"), **options)
    assert outcomes == seen
    (one,) = outcomes
    tokenizer = AutoTokenizer.from_pretrained(chat_path)
    model = AutoModelForSequenceClassification.from_pretrained(chat_path).eval()

    def reward(sequence):
        inputs = tokenizer.apply_chat_template(sequence, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            return model(**inputs).logits.item(), inputs["input_ids"].shape[1]

    for item, outcome in list(zip(small_benchmark.items, one.items, strict=True))[:3]:
        chosen, *rejected = (reward(sequence) for sequence in (item.chosen, *item.rejected))
        assert (outcome.chosen_reward, outcome.chosen_length) == pytest.approx(chosen, rel=1e-5)
        assert outcome.rejected_rewards == pytest.approx([value for value, _ in rejected], rel=1e-5)
        assert outcome.rejected_lengths == tuple(length for _, length in rejected)
        assert (outcome.item, outcome.prompt, outcome.subset) == (item.key, item.prompt_key, item.subset)
    assert one.tied.tolist() == [False, True, False, False]
    assert one.unread.tolist() == [False, False, False, True]
    assert not one.won[3]
    assert "ours on small: 1 items cannot be read, and count as lost: no system role" in caplog.text
    assert one.origin["max_length"] == 256
    assert one.origin["model"] == str(chat_path)
    json.dumps(one.origin)


def test_all_models_are_looked_at_before_the_first_is_loaded(tmp_path, monkeypatch, chat_path, small_benchmark):
    broken = tmp_path / "broken"
    shutil.copytree(chat_path, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    loaded = []
    monkeypatch.setattr(evaluation, "load_reward_model", lambda name, **options: loaded.append(name))
    with pytest.raises(InputError, match=r"broken: its weights are not there or not whole"):
        evaluate_models({"good": str(chat_path), "broken": str(broken)}, [small_benchmark])
    weights.unlink()
    with pytest.raises(InputError, match=r"broken: its weights are not there"):
        evaluate_models({"good": str(chat_path), "broken": str(broken)}, [small_benchmark])
    index = {"weight_map": {"score.weight": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"broken: its weights are not there"):
        evaluate_models({"good": str(chat_path), "broken": str(broken)}, [small_benchmark])
    assert loaded == []


def test_one_model_is_in_memory_at_a_time(monkeypatch, chat_path, small_benchmark):
    references = []
    load = evaluation.load_reward_model

    def loading(name, **options):
        gc.collect()
        assert all(reference() is None for reference in references)
        model = load(name, **options)
        references.append(weakref.ref(model.model))
        return model

    monkeypatch.setattr(evaluation, "load_reward_model", loading)
    models = {"a": str(chat_path), "b": str(chat_path)}
    outcomes = evaluate_models(models, [small_benchmark, small_benchmark], Scoring(device="cpu"), show_progress=False)
    assert [one.model for one in outcomes] == ["a", "a", "b", "b"]
    assert len(references) == 2


def test_a_device_that_is_not_there_is_one_line(chat_path, small_benchmark):
    with pytest.raises(InputError, match="--device tpu9: is not there"):
        evaluate_models({"a": str(chat_path)}, [small_benchmark], Scoring(device="tpu9"))
