"""Figure 2: scores between two sequences, made again from the model's own projections, and the page that shows them."""

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from idrm.analysis import InteractionScores, interaction_scores
from idrm.analysis.content import ContentReader
from idrm.analysis.interaction_scores import EXAMPLE, TokensOfSequence, centred
from idrm.analysis.page import scores_page
from idrm.errors import InputError


@pytest.fixture
def pair(make_pair):
    return make_pair("the price of the lamp?", "seven, and the café is green.", "a naïve answer")


def query_and_key(model, ids, layer):
    """(tokens, heads, head_dim) of one sequence, after RoPE; keys repeated for the query heads that share them."""
    attention, seen = model.model.layers[layer].self_attn, {}
    handles = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
        for name in "qk"
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    query, key = (seen[name].view(1, len(ids), -1, attention.head_dim).transpose(1, 2) for name in "qk")
    cos, sin = model.model.rotary_emb(query, torch.arange(len(ids))[None])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return query[0].transpose(0, 1), key[0].repeat_interleave(2, dim=0).transpose(0, 1)


@pytest.mark.parametrize(("layer", "queries"), [(-1, "chosen"), (0, "rejected")])
def test_scores_are_the_centred_head_means_of_query_and_key(layer, queries, load, pair):
    reward_model = load()
    found = interaction_scores(reward_model, pair, layer=layer, queries=queries)
    sequences = dict(zip(("chosen", "rejected"), ContentReader(reward_model)(pair), strict=True))
    keys = "rejected" if queries == "chosen" else "chosen"
    query = query_and_key(reward_model.model, sequences[queries].ids, layer)[0][sequences[queries].positions]
    key = query_and_key(reward_model.model, sequences[keys].ids, layer)[1][sequences[keys].positions]
    scores = torch.einsum("ihd,jhd->ij", query, key) / query.shape[1]
    expected = scores - scores.mean()
    torch.testing.assert_close(torch.from_numpy(found.scores), expected / expected.abs().max(), rtol=0, atol=1e-6)
    assert found.layer == layer % 3
    assert np.abs(found.scores).max() == 1.0
    assert (found.rows.name, found.columns.name) == (queries, keys)
    rewards = dict(zip(sequences, reward_model.rewards([sequence.ids for sequence in sequences.values()]), strict=True))
    assert found.rows.reward == pytest.approx(rewards[queries], abs=1e-6)
    assert found.columns.reward == pytest.approx(rewards[keys], abs=1e-6)


def test_part_of_the_scores(load, pair):
    whole = interaction_scores(load(), pair)
    part = interaction_scores(load(), pair, part="response")
    rows, columns = whole.rows.response_start, whole.columns.response_start
    assert part.rows.texts == whole.rows.texts[rows:]
    assert "".join(whole.columns.texts[:columns]) == "thepriceofthelamp?"
    assert part.rows.response_start == part.columns.response_start == 0
    np.testing.assert_allclose(part.scores, centred(whole.scores[rows:, columns:]), atol=1e-9)


def test_centred():
    np.testing.assert_allclose(centred(np.array([[1.0, 2.0], [3.0, 10.0]])), [[-0.5, -1 / 3], [-1 / 6, 1.0]])
    assert (centred(np.full((3, 7), 0.1)) == 0).all()
    assert (centred(np.zeros((2, 2))) == 0).all()


def test_a_model_without_differences_shows_none(load, make_pair):
    reward_model = load()
    with torch.no_grad():
        reward_model.model.model.layers[-1].self_attn.q_proj.weight.zero_()
    example = interaction_scores(reward_model, make_pair(*(EXAMPLE[name] for name in ("prompt", "chosen", "rejected"))))
    assert (example.scores == 0).all()


def test_refusals(load, with_template, pair):
    with pytest.raises(InputError, match="layer 7 is beyond the model's depth"):
        interaction_scores(load(), pair, layer=7)
    refusing = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="its chat template refuses the messages: roles must alternate"):
        interaction_scores(load(refusing), pair)


class Page(HTMLParser):
    """The tags, (tag, name, value) attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_every_score_and_escapes_every_token():
    tokens = ["<script>alert(1)</script>", '"><img src=x onerror=a>', "Zoë"]
    rows = TokensOfSequence("chosen", tokens, 1, 0.5)
    columns = TokensOfSequence("rejected", tokens[:2], 1, -0.25)
    scores = InteractionScores(np.array([[1.0, -1.0], [0.0, 0.25], [-0.5, 0.125]]), rows, columns, 2)
    page = Page(scores_page(scores, "<b>by & model"))
    assert not {"script", "img", "b", "link", "iframe"} & set(page.tags)
    assert not [attribute for attribute in page.attributes if attribute[1] in ("src", "href", "onerror")]
    assert all(token in page.text for token in [*tokens, "<b>by & model"])
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("td", "title")]
    assert [label.rsplit(": ", 1)[1] for label in labels] == [f"{score:+.3f}" for score in scores.scores.ravel()]
    colours = [value for tag, name, value in page.attributes if (tag, name) == ("td", "style")]
    assert len(set(colours)) == 6
    assert colours[0] == "background:#67001f"  # the reddest
