"""Pairs with a prompt and a response, and small teachers of two families on disk."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, DebertaV2Config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "num_labels": 3,
}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "deberta": DebertaV2Config(
        **SIZES,
        relative_attention=True,
        position_biased_input=False,
        type_vocab_size=0,
        pos_att_type=["c2p", "p2c"],
        norm_rel_ebd="layer_norm",
        position_buckets=16,
    ),
}


@pytest.fixture(scope="session")
def make_pair():
    """make_pair(prompt, chosen, rejected): a record as ``load_preferences`` gives it."""

    def pair(prompt: str, chosen: str, rejected: str) -> dict:
        ask = {"role": "user", "content": prompt}
        answers = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
        sides = [[ask, answer] for answer in answers]
        return {"chosen": sides[0], "rejected": sides[1], "conversational": True, "margin": None}

    return pair


@pytest.fixture(scope="session")
def records(make_pair):
    """Three pairs of unequal lengths."""
    return [
        make_pair("the kettle boils quickly", "please repeat the order tomorrow.", "seven green lamps"),
        make_pair("a friend reads", "helpful answer", "the river and the mountain, the city and the neighbour"),
        make_pair("price of the lamp?", "twelve", "a number"),
    ]


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory, teacher_tokenizer):
    """make_teacher(family="bert", change=None, tokenizer=None, **fields): the folder of a saved NLI classifier.

    Its maps are far from uniform. ``change`` is called with the model before it is saved.
    """

    def make(family="bert", change=None, tokenizer=None, **fields) -> str:
        tokenizer = tokenizer or teacher_tokenizer
        config = copy.deepcopy(CONFIGS[family])
        labels = {"entailment": 0, "neutral": 1, "contradiction": 2}
        names = {index: label for label, index in labels.items()}
        config.update({"vocab_size": len(tokenizer), "label2id": labels, "id2label": names, **fields})
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(mean=float(name.lower().endswith("norm.weight")), std=0.35)
            if change is not None:
                change(model)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def uniform_teacher(make_teacher) -> str:
    """A BERT whose queries are 0."""

    def silence(model):
        for block in model.bert.encoder.layer:
            block.attention.self.query.weight.zero_()
            block.attention.self.query.bias.zero_()

    return make_teacher(change=silence)
