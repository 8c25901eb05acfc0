"""Pipeline files: what they mean, and every way to get one wrong."""

from pathlib import Path

import pytest

from idrm.errors import InputError
from idrm.pipeline.specification import read_pipeline

PIPELINE = """
title: Win rates
note: >-
  Two
  lines.
values: {pairs: pairs.jsonl, endpoint: null}
steps:
  models: {command: grid, inputs: [grids/bt.yaml], training: {bf16: false}}
  margins: {command: margins, inputs: ["{models}/runs/bt/seed_*"], flags: {dataset_name: "{pairs}"}}
  policy:
    command: policy rloo
    config: rloo.yaml
    each: {bt: "{models}/runs/bt/seed_0", am: "other"}
    flags: {reward_model_name_or_path: "{each}", dataset_name: "{pairs}", deepspeed: '{"a": {"stage": 3}}', seed: null}
  answers:
    command: policy generate
    each: {bt: "{policy-bt}", am: "{policy-am}"}
    flags: {model_name_or_path: "{each}"}
  judged: {command: judge, inputs: ["{answers-am}", "{answers-bt}"], flags: {endpoint: "{endpoint}"}}
tables:
  - grid: models
  - {title: AM against, judged: {BT: judged}}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "pipeline.yaml"
        path.write_text(text)
        return path

    return write


def test_steps_stand_for_what_they_leave_and_each_makes_several(write, tmp_path):
    pipeline = read_pipeline(write(PIPELINE), {"endpoint": "http://localhost/v1"})
    steps = {step.name: step for step in pipeline.steps}
    assert list(steps) == ["models", "margins", "policy-bt", "policy-am", "answers-bt", "answers-am", "judged"]
    assert (pipeline.title, pipeline.note) == ("Win rates", "Two lines.")
    assert pipeline.values == {"pairs": "pairs.jsonl", "endpoint": "http://localhost/v1"}
    assert steps["models"].inputs == (str(tmp_path / "grids" / "bt.yaml"),)
    assert steps["models"].files == [tmp_path / "grids" / "bt.yaml"]
    assert steps["models"].training == {"bf16": False}
    policy = steps["policy-bt"]
    assert policy.flags == {
        "reward_model_name_or_path": "{models}/runs/bt/seed_0",
        "dataset_name": "{pairs}",
        "deepspeed": '{"a": {"stage": 3}}',
    }
    assert steps["policy-am"].flags["reward_model_name_or_path"] == "other"
    assert (policy.kind, policy.config, policy.files) == (
        "policy rloo",
        tmp_path / "rloo.yaml",
        [tmp_path / "rloo.yaml"],
    )
    assert policy.placeholders == ["models", "pairs"]
    assert steps["judged"].inputs == ("{answers-am}", "{answers-bt}")
    assert (steps["margins"].location, steps["judged"].location) == ("steps/margins.jsonl", "steps/judged")
    assert [(table.title, table.grid, table.judged) for table in pipeline.tables] == [
        (None, "models", {}),
        ("AM against", None, {"BT": "judged"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", r"pipeline\.yaml:\d+: is not valid YAML"),
        ("- a", "expected a mapping, found list"),
        ("title: x", "expected steps, found none"),
        ("step: {}", "unknown key 'step'; expected one of title, note"),
        ("steps: {a: {command: trian}}", r"step a: command: expected one of embedded, train, .*, found 'trian'"),
        ("steps: {a: {command: train, argv: []}}", "step a: unknown key 'argv'"),
        ("steps: {a: {command: [train]}}", r"step a: command: expected one of .*, found \['train'\]"),
        ("steps: {a: {command: train, each: {}}}", "step a: each: expected a name with a text at least, found none"),
        (
            "steps: {a: {command: grid}}\ntables: [{grid: [a]}]",
            r"tables: expected the name of a grid step, found \['a'\]",
        ),
        ("steps: {a: {command: train}}\ntables: 5", "tables: expected a list, found 5"),
        ("steps: {a/b: {command: train}}", "step a/b: expected a name of letters"),
        ("steps: {a: {command: train, inputs: x}}", "step a: inputs: expected a list of paths, found 'x'"),
        ("steps: {a: {command: train, flags: {output_dir: x}}}", "step a: output_dir: is the pipeline's to give"),
        ("steps: {a: {command: train, training: {alpha: 0}}}", "step a: training: is for a grid; give flags"),
        (
            "steps: {a: {command: train, flags: {seed: '{b}'}}, b: {command: train}}",
            "{b} is neither a value nor an earl",
        ),
        ("steps: {a: {command: train, flags: {seed: '{a}'}}}", "step a: {a} is neither a value nor an earlier step"),
        ("steps: {a: {command: train, each: [x]}}", "step a: each: expected a mapping, found list"),
        ("values: {a: 1}\nsteps: {a: {command: train}}", "step a: expected a name that no value and no other step has"),
        (
            "steps: {a: {command: train, each: {b: x}}, a-b: {command: train}}",
            "step a-b: expected a name that no value",
        ),
        ("values: {a: null}\nsteps: {b: {command: train}}", "a has to be given: --values a="),
        (
            "embedded_judge: [a]\nsteps: {b: {command: train}}",
            r"embedded_judge: expected a name of its own, found \['a'\]",
        ),
        ("steps: {a: {command: train}}\ntables: [{grid: a}]", "tables: expected the name of a grid step, found 'a'"),
        ("steps: {a: {command: train}}\ntables: [{grid: a, title: b}]", "tables: expected {grid: step} or {title"),
        ("steps: {a: {command: train}}\ntables: [{title: t, judged: {x: a}}]", "expected the name of a judge step"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(write, text, message):
    with pytest.raises(InputError, match=message) as refusal:
        read_pipeline(write(text))
    assert "\n" not in str(refusal.value)


def test_values_that_the_file_does_not_have(write):
    with pytest.raises(InputError, match=r"--values pears: .*pipeline\.yaml has no such value; it has pairs, endpoint"):
        read_pipeline(write(PIPELINE), {"pears": "x"})
