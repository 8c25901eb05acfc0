"""The tiny reward model in float64, with and without a chat template, and pairs for it."""

import shutil

import pytest
from transformers import AutoTokenizer

from idrm.evaluation.reward_model import load_reward_model
from idrm.preference import load_preferences

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="session")
def with_template(tmp_path_factory, student_path):
    """with_template(template): the folder of the tiny reward model with this chat template."""

    def make(template=TEMPLATE):
        folder = tmp_path_factory.mktemp("templated") / "model"
        shutil.copytree(student_path, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def load(student_path):
    """load(folder=None, **options): a reward model on the CPU in float64."""

    def of(folder=None, **options):
        return load_reward_model(str(folder or student_path), dtype="float64", device="cpu", **options)

    return of


@pytest.fixture(scope="session")
def pairs(eval_pairs_path):
    """Eleven dialogues."""
    return list(load_preferences(str(eval_pairs_path), split="test")[0])


@pytest.fixture(scope="session")
def make_pair():
    """make_pair(prompt, chosen, rejected): a dialogue as ``load_preferences`` gives it."""

    def pair(prompt, chosen, rejected):
        ask = {"role": "user", "content": prompt}
        sides = [[ask, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
        return {"chosen": sides[0], "rejected": sides[1], "conversational": True, "margin": None}

    return pair
