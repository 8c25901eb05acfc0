"""The paper's recipes: a row differs from its baseline in what its name says alone, a tiny twin in its size alone."""

from pathlib import Path

import pytest
import yaml

from idrm.arguments import paired_layers, parse_arguments
from idrm.grid.specification import read_grid
from idrm.pipeline.specification import read_pipeline
from idrm.pipeline.steps import Place, names_of, require_runnable
from idrm.policy.arguments import parse_arguments as parse_policy
from idrm.yaml_files import names_in_braces, read_yaml

PAPER = Path(__file__).resolve().parents[1] / "recipes" / "paper"
TINY = PAPER / "tiny"
GRIDS = sorted(path for path in PAPER.rglob("*.yaml") if "\nrows:\n" in path.read_text(encoding="utf-8"))
PIPELINES = {"tables": {"judge_endpoint": "http://localhost/v1"}, "tiny": {}}
# What a tiny twin says otherwise: models, data, sizes, precision, schedule, and where things go.
SIZES = {
    *("model_name_or_path", "teacher_name_or_path", "reward_model_name_or_path", "dataset_name", "output_dir"),
    *("max_length", "teacher_max_length", "max_prompt_length", "response_length", "max_completion_length"),
    *("bf16", "teacher_dtype", "activation_checkpointing", "gradient_checkpointing", "save_strategy"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("num_train_epochs", "max_steps", "total_episodes", "local_rollout_forward_batch_size", "pad_token"),
}
# By file, the flags in which it differs from idrm.yaml.
ABLATIONS = {
    "deberta-untuned": {"teacher_name_or_path"},
    "bert": {"teacher_name_or_path"},
    "bert-untuned": {"teacher_name_or_path"},
    "without-intra": {"intra_weight"},
    "without-inter": {"inter_weight"},
    # What a teacher reads is no setting of a run without one.
    "bradley-terry": {"teacher_name_or_path", "alpha", "top_blocks", "teacher_max_length", "teacher_dtype"},
}


def recorded(name):
    values = parse_arguments(["--config", str(PAPER / "table-3" / f"{name}.yaml"), "--output_dir", "out"]).recorded
    return {key: value for key, value in values.items() if value is not None}


# By file of table-2/, the flags in which it differs from Bradley-Terry.
OBJECTIVES = {
    "adaptive-margin": {"dataset_name", "margin_column"},
    "label-flipping": {"dataset_name", "flip_fraction"},
    "inform": {"inform_latent_size"},
}


def runs_of_grid(path, folder):
    """The grid, and of every row and seed what `idrm train` makes of its flags."""
    grid = read_grid(path, values={name: f"made/{name}" for name in names_in_braces(read_yaml(path))})
    runs = {(row.name, seed): row.run(folder, seed) for row in grid.rows for seed in row.seeds}
    return grid, {key: parse_arguments(run.tokens) for key, run in runs.items()}


def runs_are_different(recorded):
    """Whether no two of them are one, where they go aside."""
    seen = [{key: value for key, value in values.items() if key != "output_dir"} for values in recorded]
    return all(seen.count(values) == 1 for values in seen)


def differing(ours, theirs):
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


def grid_rows(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_it_ablates_and_nothing_else(name):
    idrm, ablation = recorded("idrm"), recorded(name)
    changed = {key for key in idrm.keys() | ablation.keys() if idrm.get(key) != ablation.get(key)}
    assert changed == ABLATIONS[name]


def test_ablations_are_those_of_the_table():
    assert {path.stem for path in (PAPER / "table-3").glob("*.yaml")} == {"idrm", *ABLATIONS}
    configs = [row["config"] for row in grid_rows(PAPER / "table-3.yaml")]
    assert sorted(configs) == sorted(f"table-3/{name}.yaml" for name in ("idrm", *ABLATIONS))
    assert recorded("without-intra")["intra_weight"] == recorded("without-inter")["inter_weight"] == 0
    assert recorded("bradley-terry")["alpha"] == 0


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: str(path.relative_to(PAPER)))
def test_rows_of_a_grid_are_runs_of_their_own(path, tmp_path):
    grid, runs = runs_of_grid(path, tmp_path)
    assert runs_are_different(run.recorded for run in runs.values())
    assert all(run.model.model_name_or_path and run.data.dataset_name for run in runs.values())
    assert grid.benchmarks


def test_the_curves_of_figure_5_share_one_point():
    points = []
    for row in grid_rows(PAPER / "figure-5.yaml"):
        flags = [f"--{flag}={value}" for flag, value in row.get("overrides", {}).items()]
        interaction = parse_arguments(["--config", str(PAPER / row["config"]), *flags]).interaction
        points.append((interaction.alpha, len(paired_layers(interaction)[0])))
    assert points == [(0.2, 1), (0.4, 1), (0.6, 1), (0.8, 1), (1.0, 1), (1.0, 2), (1.0, 3), (1.0, 4)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_changes_what_makes_it_and_nothing_else(name):
    bradley_terry, objective = recorded("bradley-terry"), recorded(f"../table-2/{name}")
    assert differing(bradley_terry, objective) == OBJECTIVES[name]
    assert objective.get("inform_latent_size") in (None, 128)
    assert objective["flip_fraction"] in (0.0, 0.2)


def test_table_2_has_every_objective_alone_and_beside_the_interaction_loss(tmp_path):
    _, runs = runs_of_grid(PAPER / "table-2.yaml", tmp_path)
    alone = {"AM-RM": "Id-RM and AM", "LF-RM": "Id-RM and LF", "InfoRM": "Id-RM and InfoRM"}
    for name, beside in alone.items():
        added = differing(runs["BT-RM", 0].recorded, runs[name, 0].recorded)
        assert differing(runs["Id-RM", 0].recorded, runs[beside, 0].recorded) == added
        assert {key: runs[name, 0].recorded[key] for key in added - {"output_dir"}} == {
            key: runs[beside, 0].recorded[key] for key in added - {"output_dir"}
        }


@pytest.mark.parametrize(
    ("tiny", "whole"),
    [
        ("table-2.yaml", "table-2.yaml"),
        ("table-3.yaml", "table-3.yaml"),
        ("margin-models.yaml", "table-2/margin-models.yaml"),
    ],
)
def test_a_tiny_grid_has_the_same_rows_which_differ_in_size_alone(tmp_path, tiny, whole):
    (tiny_grid, tiny_runs), (grid, runs) = (runs_of_grid(path, tmp_path) for path in (TINY / tiny, PAPER / whole))
    assert [(row.name, row.model is None) for row in tiny_grid.rows] == [(r.name, r.model is None) for r in grid.rows]
    assert tiny_grid.baseline == grid.baseline
    assert "tiny" in tiny_grid.title
    for key, run in tiny_runs.items():
        assert differing(run.recorded, runs[key].recorded) <= SIZES


def test_the_tiny_runs_of_warm_are_runs_of_warm(tmp_path):
    _, runs = runs_of_grid(PAPER.parent / "warm" / "grid.yaml", tmp_path)
    tiny_grid, tiny_runs = runs_of_grid(TINY / "warm.yaml", tmp_path)
    for (_, seed), run in tiny_runs.items():
        (whole,) = (other for (_, other_seed), other in runs.items() if other_seed == seed)
        assert differing(run.recorded, whole.recorded) <= SIZES
        assert run.training["learning_rate"] == pytest.approx(100 * whole.training["learning_rate"])
    assert len(tiny_grid.rows) == 3


def step_flags(name, folder):
    """Of a pipeline's every training step, what its command makes of its flags."""
    pipeline = read_pipeline(PAPER / f"{name}.yaml", PIPELINES[name])
    place = Place(folder, ["python"], [])
    names = names_of(pipeline, place, "http://localhost/v1")
    parsers = {"train": parse_arguments}
    for action in ("sft", "dpo", "rloo", "ppo"):
        parsers[f"policy {action}"] = lambda tokens, action=action: parse_policy(action, tokens)
    return {s.name: parsers[s.kind](place.tokens(s, names)).recorded for s in pipeline.steps if s.kind in parsers}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_flag_of_the_pipelines_parses(tmp_path, name):
    pipeline = read_pipeline(PAPER / f"{name}.yaml", PIPELINES[name])
    require_runnable(pipeline, Place(tmp_path / "out", ["python"], []))


def test_the_tiny_pipeline_has_the_same_steps_which_differ_in_size_alone(tmp_path):
    tiny, tables = (read_pipeline(PAPER / f"{name}.yaml", PIPELINES[name]) for name in ("tiny", "tables"))
    made = [step.name for step in tiny.steps if step.kind == "embedded"]
    assert [(step.name, step.kind) for step in tables.steps] == [
        (step.name, step.kind) for step in tiny.steps if step.name not in made
    ]
    assert [(table.grid, table.judged) for table in tiny.tables] == [(t.grid, t.judged) for t in tables.tables]
    assert tiny.note.startswith("Tiny: ")
    whole = step_flags("tables", tmp_path)
    for name, flags in step_flags("tiny", tmp_path).items():
        assert differing(flags, whole[name]) <= SIZES, name


def test_every_policy_of_table_1_has_a_file_and_every_reward_model_a_policy(tmp_path):
    assert {path.stem for path in (PAPER / "table-1").glob("*.yaml")} == {"sft", "dpo", "ppo", "rloo"}
    steps = step_flags("tables", tmp_path)
    rewards = [flags["reward_model_name_or_path"] for name, flags in steps.items() if name.startswith("ppo-")]
    rows = [row.slug for row in read_grid(PAPER / "table-2.yaml", values={"margins": "m", "warm": "w"}).rows]
    # Those of the paper; the last three are ours.
    expected = ["warm" if slug == "warm" else f"table-2/runs/{slug}/seed_0" for slug in rows[:-3]]
    assert rewards == [f"{tmp_path}/steps/{place}" for place in expected]


def test_policies_and_reward_models_pad_with_one_token(tmp_path):
    """Llama 3 has no pad token, and ppo has the reward model read the policy's ids."""
    _, runs = runs_of_grid(PAPER / "table-2.yaml", tmp_path)
    tokens = {run.model.pad_token for run in runs.values()}
    tokens |= {flags.get("pad_token") for name, flags in step_flags("tables", tmp_path).items() if name == "sft"}
    head = parse_arguments(["--config", str(PAPER.parent / "warm" / "head.yaml"), "--output_dir", "out"])
    assert tokens | {head.model.pad_token} == {"<|reserved_special_token_0|>"}
