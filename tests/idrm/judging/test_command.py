"""The command `idrm judge`, from two files to a report."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from idrm.judging.command import main

REPOSITORY = Path(__file__).resolve().parents[3]
KEY = "sk-secret-of-this-test"
WINS, LOSES, TIES = 4, 2, 1


@pytest.fixture
def files(write_lines):
    """Two response files: for a judge that prefers the longer one, A wins 4 prompts, loses 2, and ties 1."""
    a = [{"prompt": f"question {i}", "response": f"{i} " + "long " * (1 if i < LOSES else 3)} for i in range(7)]
    b = [{"prompt": f"question {i}", "response": f"{i} " + "text " * (3 if i == 6 else 2)} for i in range(7)]
    return write_lines("a.jsonl", a), write_lines("b.jsonl", b)


@pytest.fixture
def argv(files, endpoint, tmp_path):
    """argv(name=value, ...): a command line."""

    def make(**changes):
        flags = {"endpoint": endpoint.url, "judge_model": "m", "output_dir": tmp_path / "out", **changes}
        return [
            *map(str, files),
            *(token for name, value in flags.items() if value is not None for token in (f"--{name}", str(value))),
        ]

    return make


@pytest.fixture
def refused(argv, capsys, tmp_path, endpoint):
    """refused(name=value, ...): the one line that this command ends with, having asked nothing and written nothing."""

    def run(**changes):
        with pytest.raises(SystemExit) as exit_:
            main(argv(**changes))
        assert exit_.value.code == 2
        assert not (tmp_path / "out").exists()
        assert endpoint.requests == []
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    return run


def report(tmp_path):
    return json.loads((tmp_path / "out" / "judge.json").read_text(encoding="utf-8"))


def written(tmp_path):
    return {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}


def test_a_repetition_asks_nothing(argv, endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("THE_KEY", KEY)
    command = argv(api_key_variable="THE_KEY")
    main(command)
    result = report(tmp_path)
    assert (result["wins"], result["ties"], result["loses"], result["unparseable"]) == (WINS, TIES, LOSES, 0)
    assert result["win_rate"] == WINS / (WINS + LOSES)
    assert result["interval"][0] < result["win_rate"] < result["interval"][1]
    assert (result["inconsistent_share"], result["first_share"]) == (0.0, 0.5)
    assert result["answered_by"] == ["stub-2026"]
    # Both orders of all pairs, each once.
    asked = sorted(endpoint.responses(request) for request in endpoint.requests)
    assert len(asked) == len(set(asked)) == 14
    assert sorted((second, first) for first, second in asked) == asked

    before = written(tmp_path)
    assert set(before) == {"judge.json", "judge.md", "verdicts.jsonl"}
    main(command)
    assert len(endpoint.requests) == 14
    assert written(tmp_path) == before
    # The key went to the endpoint and nowhere else.
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 14 + 3
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in "".join(capsys.readouterr())


def test_verdicts_are_there_to_be_read(argv, tmp_path):
    main(argv())
    lines = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["lose"] * LOSES + ["win"] * WINS + ["tie"] * TIES
    assert lines[0]["prompt"] == [{"role": "user", "content": "question 0"}]
    assert lines[0]["a_first"]["preference"] == "second"
    assert lines[0]["b_first"]["preference"] == "first"
    assert lines[0]["b_first"]["answers"][0].endswith("Verdict: 1")
    markdown = (tmp_path / "out" / "judge.md").read_text()
    assert "| win rate | 66.7% |" in markdown
    assert f"| lose | {LOSES} |" in markdown


def test_a_judge_that_goes_by_place(argv, endpoint, tmp_path, capsys):
    endpoint.answer = lambda request: "Verdict: 2"
    main(argv())
    result = report(tmp_path)
    assert (result["wins"], result["ties"], result["loses"]) == (0, 7, 0)
    assert (result["win_rate"], result["interval"]) == (None, None)
    assert (result["inconsistent_share"], result["first_share"]) == (1.0, 0.0)
    assert "| win rate | - |" in (tmp_path / "out" / "judge.md").read_text()


def test_a_judge_that_cannot_be_read_is_no_tie(argv, endpoint, tmp_path):
    def answer(request):
        if "question 3" in request["messages"][0]["content"]:
            return "It depends."
        return endpoint.longer(request)

    endpoint.answer = answer
    main(argv(max_reminders=1))
    result = report(tmp_path)
    assert (result["wins"], result["ties"], result["loses"], result["unparseable"]) == (WINS - 1, TIES, LOSES, 1)
    assert result["unparseable_share"] == result["reminded_share"] == 2 / 14
    assert len(endpoint.requests) == 14 + 2


def test_a_failure_keeps_the_answers_that_had_come(argv, endpoint, reply, tmp_path, capsys):
    def failing(request):
        if len(endpoint.requests) > 5:
            return reply({"error": {"message": "out of credit"}}, 403)
        return endpoint.longer(request)

    endpoint.answer = failing
    with pytest.raises(SystemExit) as exit_:
        main(argv(concurrency=1))
    assert exit_.value.code == 2
    assert f"error: --endpoint {endpoint.url}/chat/completions: answered 403 (out of credit)" in capsys.readouterr().err
    assert written(tmp_path) == {}
    endpoint.requests.clear()
    endpoint.answer = endpoint.longer
    main(argv())
    assert len(endpoint.requests) == 14 - 5
    assert report(tmp_path)["wins"] == WINS


def test_a_killed_process_is_gone_on_from_by_another(argv, endpoint, tmp_path):
    held, gone = threading.Event(), threading.Event()

    def answer(request):
        if len(endpoint.requests) > 4:
            held.set()
            gone.wait(60)
        return endpoint.longer(request)

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", "from idrm.cli import main; main()", "judge", *argv(concurrency=2)],
            cwd=REPOSITORY,
            env={**os.environ, "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    endpoint.answer = answer
    with start() as process:
        assert held.wait(120)
        process.kill()
        process.communicate(timeout=30)
    gone.set()
    assert written(tmp_path) == {}
    kept = len(list((tmp_path / "out" / "answers").glob("*.json")))
    assert kept in (3, 4)  # of two threads one is held; the fourth answer may still have been on its way to the other

    endpoint.requests.clear()
    with start() as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(endpoint.requests) == 14 - kept
    assert "66.7%" in output
    assert report(tmp_path)["wins"] == WINS


def test_an_interruption_is_one_line_and_waits_for_no_answer(argv, endpoint, tmp_path, capsys):
    main_thread, interrupted = threading.get_ident(), threading.Event()

    def answer(request):
        if len(endpoint.requests) == 4:
            signal.pthread_kill(main_thread, signal.SIGINT)
        if len(endpoint.requests) >= 4:
            interrupted.wait(60)
        return endpoint.longer(request)

    endpoint.answer = answer
    with pytest.raises(SystemExit) as exit_:
        main(argv())
    assert not interrupted.is_set()
    interrupted.set()
    assert exit_.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert written(tmp_path) == {}


def test_a_template_and_a_shared_cache(argv, endpoint, tmp_path):
    (tmp_path / "short.txt").write_text("{prompt}|{first}|{second}")
    endpoint.answer = lambda request: "Verdict: tie"
    main(argv(judge_template=tmp_path / "short.txt", cache_dir=tmp_path / "shared"))
    assert sorted(request["messages"][0]["content"] for request in endpoint.requests)[0].startswith("question 0|0 ")
    assert len(list((tmp_path / "shared").glob("*.json"))) == 14
    assert not (tmp_path / "out" / "answers").exists()
    assert report(tmp_path)["template"] == str(tmp_path / "short.txt")


def test_flags_from_a_file(argv, endpoint, tmp_path):
    (tmp_path / "judge.yaml").write_text("judge_model: from-yaml\nmax_tokens: 20\n")
    main(argv(judge_model=None, config=tmp_path / "judge.yaml"))
    assert {(request["model"], request["max_tokens"]) for request in endpoint.requests} == {("from-yaml", 20)}


def test_refusals(refused, write_lines, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "--endpoint is missing" in refused(endpoint=None)
    assert "--judge_model is missing" in refused(judge_model=None)
    assert "--endpoint host: expected a URL" in refused(endpoint="host")
    assert "--api_key_variable NO_SUCH_KEY: the environment has no" in refused(api_key_variable="NO_SUCH_KEY")
    assert "--concurrency: expected at least 1" in refused(concurrency=0)
    assert "--timeout: expected more than 0" in refused(timeout="nan")
    assert "none.txt: cannot be read" in refused(judge_template=tmp_path / "none.txt")
    assert "--output_dir" in refused(output_dir=write_lines("file", []) / "out")
    assert "unrecognized arguments: --key" in refused(key="x")
    monkeypatch.setenv("SPOILT_KEY", "two words")
    assert "two words" not in refused(api_key_variable="SPOILT_KEY")
    write_lines("a.jsonl", ["{"])
    assert "a.jsonl:1: malformed JSON" in refused()


def test_two_files_are_needed(capsys):
    for files in ([], ["a.jsonl"], ["a.jsonl", "b.jsonl", "c.jsonl"]):
        with pytest.raises(SystemExit) as exit_:
            main([*files, "--endpoint", "http://localhost/v1", "--judge_model", "m"])
        assert exit_.value.code == 2
        assert (
            f"expected two response files, idrm judge A.jsonl B.jsonl ..., got {len(files)}" in capsys.readouterr().err
        )
