"""Figure 5: what is read of finished runs, and what becomes of seeds."""

import json

import pytest
import yaml

from idrm.analysis import find_runs, sweep
from idrm.analysis.sensitivity import other_differences
from idrm.errors import InputError
from idrm.evaluation.outcomes import Outcome, Outcomes, write_outcomes


@pytest.fixture
def run(tmp_path):
    """run(name, accuracy, results=None, **recorded): a finished run's folder."""

    def make(name, accuracy, results=None, **recorded):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.yaml").write_text(yaml.safe_dump({"alpha": 1.0, "top_blocks": None, **recorded}))
        results = {"eval_accuracy": accuracy, "train_loss": 1.0} if results is None else results
        (folder / "all_results.json").write_text(json.dumps(results))
        return folder

    return make


def test_runs_by_alpha_m_and_seed(run, tmp_path):
    run("bt-0", 0.5, alpha=0.0, seed=0)
    run("bt-1", 0.52, alpha=0.0, seed=1, top_blocks=3)
    run("id-0", 0.6, seed=0)
    run("id-1", 0.7, seed=1, student_layers=[-1], teacher_layers=[-1])
    run("id-1-other-fold", 0.5, seed=1, top_blocks=1)
    run("m2", 0.55, student_layers=[-1, -2], teacher_layers=[-1, -2])
    teacher = tmp_path / "runs" / "teacher"
    teacher.mkdir()
    (teacher / "run.yaml").write_text("pooling: mean\n")
    runs = find_runs([tmp_path / "runs", tmp_path / "runs" / "id-0"])
    assert {found.folder.name: (found.top_blocks, found.seed) for found in runs} == {
        "bt-0": (None, 0),
        "bt-1": (None, 1),
        "id-0": (1, 0),
        "id-1": (1, 1),
        "id-1-other-fold": (1, 1),
        "m2": (2, 42),
    }
    assert len(runs) == 6
    points = [(p.alpha, p.top_blocks or 0, p.seeds, p.mean, p.lowest, p.highest) for p in sweep(runs)]
    expected = [(0.0, 0, 2, 0.51, 0.5, 0.52), (1.0, 1, 2, 0.6, 0.6, 0.6), (1.0, 2, 1, 0.55, 0.55, 0.55)]
    assert points == [pytest.approx(point) for point in expected]


def test_what_else_differs_is_named(run, tmp_path):
    run("a", 0.5, alpha=0.5, learning_rate=1e-3, teacher_cache="a")
    run("b", 0.6, alpha=1.0, learning_rate=1e-4, teacher_cache="b")
    run("c", 0.6, alpha=0.0, teacher_name_or_path=None, metric="kl")
    assert other_differences(find_runs([tmp_path / "runs"])) == ["learning_rate"]


def test_accuracy_by_name(run):
    folder = run("a", None, results={"eval_hh_accuracy": 0.6, "eval_tldr_accuracy": 0.7, "eval_hh_margin": 1.0})
    with pytest.raises(InputError, match="expected one accuracy, found eval_hh_accuracy, eval_tldr_accuracy; name one"):
        find_runs([folder])
    assert find_runs([folder], metric="eval_tldr_accuracy")[0].accuracy == 0.7
    with pytest.raises(InputError, match="has no 'eval_accuracy'; its accuracies are: eval_hh_accuracy, eval_tldr"):
        find_runs([folder], metric="eval_accuracy")


def test_outcomes_files_of_runs(run, tmp_path):
    folder = run("a", None, results={})
    items = [Outcome(str(i), "pairs", str(i), reward, (0.5,), 3, (3,)) for i, reward in enumerate((1.0, 0.5, 0.0, 2.0))]

    def write(name, items, model):
        write_outcomes(tmp_path / name, Outcomes("a", "held-out", items, {"model": str(model)}))
        return tmp_path / name

    whole = write("whole.jsonl", items, folder)
    (found,) = find_runs([whole])
    assert (found.folder, found.accuracy) == (folder.resolve(), 0.5)
    with pytest.raises(InputError, match=r"accuracy 0\.5000 by what was named before and 1\.0000 here"):
        find_runs([whole, write("part.jsonl", items[:1], folder)])
    with pytest.raises(InputError, match=r"is no run folder; expected one with run\.yaml"):
        find_runs([write("other.jsonl", items, tmp_path)])


def test_refusals(run, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        find_runs([tmp_path / "none"])
    with pytest.raises(InputError, match="holds no run"):
        find_runs([tmp_path])
    with pytest.raises(InputError, match=r"supervises student_layers \[-2\] by teacher_layers \[-1\]; expected"):
        find_runs([run("below", 0.5, student_layers=[-2], teacher_layers=[-1])])
    unfinished = run("unfinished", 0.5)
    (unfinished / "all_results.json").unlink()
    with pytest.raises(InputError, match=r"all_results\.json: cannot be read .*; expected a run that has ended"):
        find_runs([unfinished])
    (unfinished / "run.yaml").write_text("alpha: [")
    with pytest.raises(InputError, match=r"run\.yaml: cannot be read \(ParserError\)"):
        find_runs([unfinished])
    with pytest.raises(InputError, match="all 2 runs have alpha 1 and m 1; expected several"):
        sweep(find_runs([run("a", 0.5, seed=1), run("b", 0.6, seed=2)]))
