"""The demonstration's judge: what it calls right, and that `idrm judge` gets its verdicts from it."""

import json
import random

import pytest

from idrm.embedded.generator import Generator
from idrm.embedded.judge import MODEL, answer, serve, standing
from idrm.judging.command import main as judge
from idrm.judging.judge import Message
from idrm.judging.template import fill_template, load_template, read_verdict

PROMPT = "Hi. Colour: purple. Contact: Zoë. Long day here. Day: Saturday. Price: 12 euros. Tell me one."


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Contact: Zoë.", 1),
        ("With pleasure! Price: 12 euros.", 1),
        ("Colour: purple. Day: Saturday.", 1),
        ("Contact: Leila.", -1),
        ("Colour: purple. Day: Friday.", -1),
        ("City: Oslo.", -1),
        # Neither ends nor begins as a claim does.
        ("Contact: Zoë", 0),
        ("purple.", 0),
        ("", 0),
    ],
)
def test_a_response_is_right_if_all_that_it_claims_stands_in_the_prompt(response, expected):
    assert standing(PROMPT, response) == expected


def test_every_label_of_the_generator_is_its_verdict():
    template = load_template()
    for pair in Generator(3).preference_pairs(200, 0.5):
        prompt, chosen = pair["chosen"].removeprefix("\n\nHuman: ").split("\n\nAssistant: ")
        rejected = pair["rejected"].rpartition("\n\nAssistant: ")[2]
        messages = (Message("user", prompt),)
        for first, second, verdict in (
            (chosen, rejected, "first"),
            (rejected, chosen, "second"),
            (rejected, rejected, "tie"),
            ("Good evening.", rejected, "first"),
            ("Good evening.", chosen, "second"),
        ):
            assert read_verdict(answer(fill_template(template, messages, first, second))) == verdict


def test_it_has_no_verdict_on_another_question():
    assert read_verdict(answer("Which of the two is better?")) is None


def test_idrm_judge_asks_it_as_any_endpoint(tmp_path):
    source = random.Random(0)
    pairs = list(Generator(4).preference_pairs(20, 0.5))
    won = 0
    with (tmp_path / "a.jsonl").open("w") as a, (tmp_path / "b.jsonl").open("w") as b:
        for pair in pairs:
            prompt = pair["chosen"].removeprefix("\n\nHuman: ").split("\n\nAssistant: ")[0]
            chosen, rejected = (pair[side].rpartition("\n\nAssistant: ")[2] for side in ("chosen", "rejected"))
            a_is_chosen = source.random() < 0.7
            won += a_is_chosen
            for file, response in ((a, chosen if a_is_chosen else rejected), (b, rejected if a_is_chosen else chosen)):
                file.write(json.dumps({"prompt": [{"role": "user", "content": prompt}], "response": response}) + "\n")
    with serve() as address:
        flags = ["--endpoint", address, "--judge_model", MODEL, "--output_dir", str(tmp_path / "judged")]
        judge([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), *flags])
    result = json.loads((tmp_path / "judged" / "judge.json").read_text())
    assert (result["wins"], result["loses"], result["ties"], result["unparseable"]) == (won, 20 - won, 0, 0)
    assert 0 < won < 20
