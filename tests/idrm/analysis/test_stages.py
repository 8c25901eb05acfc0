"""Figure 1: stages of the content, the attention to each, and decisions with the front masked."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from idrm.analysis import attention_by_stage
from idrm.analysis.content import ContentReader
from idrm.analysis.stages import stage_bounds
from idrm.analysis.tables import masked_accuracy_rows, stage_rows
from idrm.errors import InputError

TAIL = " the kettle boils quickly and a friend reads the answer tomorrow please repeat the question"


def test_stages_are_of_equal_size_and_the_last_token_is_never_masked():
    assert stage_bounds(20) == list(range(0, 21, 2))
    assert np.diff(stage_bounds(25)).tolist() == [2, 3] * 5
    for tokens in range(1, 40):
        bounds = stage_bounds(tokens)
        assert bounds[0] == 0
        assert bounds[-2] < bounds[-1] == tokens
        assert set(np.diff(bounds)) <= {tokens // 10, tokens // 10 + 1}


def content_by_offsets(tokenizer, messages):
    """Ids of the plain text, and the positions of the tokens with visible characters of a content in them."""
    text, spans = "", []
    for message in messages:
        text += f"\n\n{'Human' if message['role'] == 'user' else 'Assistant'}: "
        spans.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    encoded = tokenizer(text, return_offsets_mapping=True)
    inside = [
        bool("".join(text[max(start, first) : min(end, last)] for first, last in spans).strip())
        for start, end in encoded["offset_mapping"]
    ]
    return [*encoded["input_ids"], tokenizer.eos_token_id], [place for place, content in enumerate(inside) if content]


def test_attention_and_masked_rewards_of_every_sequence(load, student_path, pairs):
    reward_model = load()
    analysis = attention_by_stage(reward_model, pairs, batch_size=3, stages=5)
    eager = AutoModelForSequenceClassification.from_pretrained(
        student_path, attn_implementation="eager", dtype=torch.float64
    ).eval()
    assert analysis.attention.shape == (11, 2, 5)
    assert analysis.rewards.shape == (5, 11, 2)
    for index, pair in enumerate(pairs):
        for side, name in enumerate(("chosen", "rejected")):
            ids, content = content_by_offsets(reward_model.tokenizer, pair[name])
            input_ids = torch.tensor([ids])
            bounds = [len(content) * stage // 5 for stage in range(6)]
            with torch.no_grad():
                row = eager(input_ids=input_ids, output_attentions=True).attentions[-1][0, :, -1].mean(dim=0)
                for stage in range(5):
                    paid = row[content[bounds[stage] : bounds[stage + 1]]].sum().item()
                    assert analysis.attention[index, side, stage] == pytest.approx(paid, abs=1e-6)
                    mask = torch.ones_like(input_ids)
                    mask[0, content[: bounds[stage]]] = 0
                    reward = eager(input_ids=input_ids, attention_mask=mask).logits.item()
                    assert analysis.rewards[stage, index, side] == pytest.approx(reward, abs=1e-5)
    np.testing.assert_allclose(analysis.shares.sum(axis=-1), 1.0)
    sequences = [reward_model.encode(pair[name], True) for pair in pairs for name in ("chosen", "rejected")]
    np.testing.assert_allclose(analysis.rewards[0].ravel(), reward_model.rewards(sequences), atol=1e-6)
    assert np.abs(analysis.rewards[0] - analysis.rewards[4]).min() > 1e-4


@pytest.mark.parametrize("template", [False, True])
def test_batches_make_no_difference(template, load, with_template, pairs):
    reward_model = load(with_template() if template else None)
    first, second = (attention_by_stage(reward_model, pairs, batch_size=size, layer=-2) for size in (1, 4))
    assert first.layer == 1
    np.testing.assert_allclose(first.rewards, second.rewards, atol=1e-6)
    np.testing.assert_allclose(first.attention, second.attention, atol=1e-6)
    assert first.prompts == second.prompts == [pair["chosen"][0]["content"] for pair in pairs]


@pytest.mark.parametrize(("template", "length"), [(False, 256), (True, 256), (False, 24)])
def test_content_tokens_cover_the_contents_that_a_cut_leaves(template, length, load, with_template, pairs):
    reward_model = load(with_template() if template else None, max_length=length)
    read_pair = ContentReader(reward_model)
    for pair in pairs:
        encoded = reward_model.encode_pair(pair["chosen"], pair["rejected"], True)
        for sequence, ids, name in zip(read_pair(pair), encoded, ("chosen", "rejected"), strict=True):
            assert sequence.ids == ids
            contents = ["".join(message["content"].split()) for message in pair[name]]
            read, response = "".join(sequence.texts), "".join(sequence.texts[sequence.response_start :])
            decoded = reward_model.tokenizer.decode([ids[place] for place in sequence.positions])
            assert "".join(decoded.split()) == read
            if length == 256:
                assert (read, response) == ("".join(contents), contents[-1])
            else:
                assert read != "".join(contents)
                assert "".join(contents).endswith(read)
                assert contents[-1].endswith(response)


def test_pairs_that_differ_in_what_is_masked_alone_are_ties(load, make_pair):
    pair = make_pair("the", "ab" + TAIL, "ba" + TAIL)
    chosen, rejected = ContentReader(load())(pair)
    differing = [place for place, (a, b) in enumerate(zip(chosen.ids, rejected.ids, strict=True)) if a != b]
    assert max(differing) < chosen.positions[len(chosen.positions) // 2]
    analysis = attention_by_stage(load(), [pair, pair])
    assert analysis.tied[5:].all()
    assert not analysis.tied[0].any()
    rows = masked_accuracy_rows(analysis)
    assert [rows[5][name] for name in ("masked_percent", "accuracy", "ties")] == [50.0, 0.0, 1.0]


def test_tables_have_means_over_rightly_and_wrongly_decided_pairs(load, pairs):
    analysis = attention_by_stage(load(), pairs)
    right = analysis.won[0]
    assert 0 < right.sum() < len(right)
    rows = stage_rows(analysis)
    assert len(rows) == 2 * 2 * 10
    for row in rows:
        chosen = right if row["decision"] == "right" else ~right
        side, stage = ("chosen", "rejected").index(row["sequence"]), row["stage"] - 1
        shares = analysis.shares[chosen, side]
        assert row["pairs"] == chosen.sum()
        assert row["share"] == pytest.approx(shares[:, stage].mean())
        assert row["cumulative_share"] == pytest.approx(shares[:, : stage + 1].sum(axis=1).mean())
        assert row["attention"] == pytest.approx(analysis.attention[chosen, side, stage].mean())
        assert row["share_low"] <= row["share"] <= row["share_high"]
    assert [row["accuracy"] for row in masked_accuracy_rows(analysis)] == analysis.won.mean(axis=1).tolist()


def test_pairs_that_cannot_be_read_are_counted(load, with_template, make_pair, pairs):
    shouting = load(with_template("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}{% endfor %}"))
    with pytest.raises(InputError, match=r"no pair can be analysed \(11 contents_not_found\); .*: none of the"):
        attention_by_stage(shouting, pairs)
    analysis = attention_by_stage(shouting, [*pairs, make_pair("KETTLE?", "LAMP", "CITY")])
    assert analysis.dropped == {"contents_not_found": 11}
    assert analysis.prompts == ["KETTLE?"]
    alike = make_pair("a city", "seven" + TAIL, "twelve" + TAIL)
    analysis = attention_by_stage(load(max_length=12), [*pairs, alike])
    assert analysis.dropped == {"identical_after_cutting": 1}
    with pytest.raises(InputError, match="stages: expected at least 1, got 0"):
        attention_by_stage(load(), pairs, stages=0)
