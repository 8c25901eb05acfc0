"""RMB from its own files: keys, folders, micro and macro averages, and the download."""

import http.server
import json
import shutil
import threading
import zipfile

import numpy as np
import pytest

from idrm.errors import InputError
from idrm.evaluation import rmb
from idrm.evaluation.rmb import helpful_and_harmless, load_rmb

CONVERSATION = [{"content": "Is it far?", "language": "English", "role": "user"}]


def answer(text, **extra):
    return {"llm_name": "model", "answer": text, **extra}


def pair(prompt, path):
    conversation = [{**CONVERSATION[0], "content": prompt}]
    return {
        "pair_uid": "1",
        "conversation_input": conversation,
        "chosen": answer("Ten minutes.", score=2.5),
        "reject": answer("Yes.", score=1.0),
        "category_path": path,
    }


def best_of(prompt, path, losers):
    conversation = [{**CONVERSATION[0], "content": prompt}]
    return {
        "conversation_input": conversation,
        "bon_best": answer("Ten minutes."),
        "loser_list": [answer(f"No {index}.") for index in range(losers)],
        "bon_uid": "2",
        "category_path": path,
    }


@pytest.fixture
def folder(tmp_path):
    """A small RMB_dataset, one subset of it in one of both sets alone."""
    files = {
        "Pairwise_set/Helpfulness/Chat/Casual Conversation": [pair("a", None), pair("a", None), pair("b", None)],
        "Pairwise_set/Helpfulness/Code/Data Management": [pair("c", None)],
        "Pairwise_set/Harmlessness/S1": [pair("d", None)] * 2,
        "BoN_set/Helpfulness/Chat/Casual Conversation": [best_of("a", None, 3), best_of("b", None, 2)],
        "BoN_set/Harmlessness/S1": [best_of("d", None, 3)],
        "BoN_set/Harmlessness/multi": [best_of("e", None, 1)],
    }
    root = tmp_path / "RMB-Reward-Model-Benchmark" / "RMB_dataset"
    for name, records in files.items():
        path = root / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        for record in records:
            record["category_path"] = name
        path.write_text(json.dumps(records, indent=1))
    results = root.parent / "eval" / "result" / "model_result.json"
    results.parent.mkdir(parents=True)
    results.write_text('[{"pair_uid": "1", "is_correct": true}]')
    return root.parent


def test_items_have_their_prompt_and_every_loser(folder):
    benchmark = load_rmb(str(folder))
    assert len(benchmark.items) == 10
    by_subset = {}
    for item in benchmark.items:
        by_subset.setdefault(item.subset, []).append(item)
    best = by_subset["BoN_set/Helpfulness/Chat/Casual Conversation"]
    assert [len(item.rejected) for item in best] == [3, 2]
    assert best[0].chosen == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Ten minutes."}]
    assert best[0].rejected[2][-1]["content"] == "No 2."
    # The pairs of a conversation are drawn together, and with its best-of-N.
    pairs = by_subset["Pairwise_set/Helpfulness/Chat/Casual Conversation"]
    assert pairs[0].prompt_key == pairs[1].prompt_key == best[0].prompt_key != pairs[2].prompt_key
    assert pairs[0].rejected[0][-1]["content"] == "Yes."
    assert "6 pairs and 4 of best-of-N in 6 subsets" in benchmark.version
    # The same items from a part of the folder, or by their place where they do not say it.
    part = load_rmb(str(folder / "RMB_dataset" / "BoN_set"))
    assert [item.key for item in part.items] == [item.key for item in benchmark.items if "BoN" in item.subset]
    file = folder / "RMB_dataset" / "BoN_set" / "Harmlessness" / "S1.json"
    file.write_text(json.dumps([{**record, "category_path": None} for record in json.loads(file.read_text())]))
    assert [item.subset for item in load_rmb(str(file)).items] == ["BoN_set/Harmlessness/S1"]


def test_micro_is_over_items_and_macro_over_subsets(folder):
    benchmark = load_rmb(str(folder))
    subsets = np.array([item.subset for item in benchmark.items])
    won = np.isin(subsets, ["Pairwise_set/Helpfulness/Code/Data Management", "BoN_set/Harmlessness/multi"])
    won |= subsets == "BoN_set/Helpfulness/Chat/Casual Conversation"
    scores = {score.name: score.within(subsets, won) for score in benchmark.scores if not score.is_detail}
    assert scores["Helpfulness, pairs, micro"] == pytest.approx(1 / 4)
    assert scores["Helpfulness, pairs, macro"] == pytest.approx(1 / 2)
    assert scores["Harmlessness, pairs, micro"] == scores["Harmlessness, pairs, macro"] == 0
    assert scores["Helpfulness, BoN, micro"] == 1
    assert scores["Harmlessness, BoN, micro"] == scores["Harmlessness, BoN, macro"] == pytest.approx(1 / 2)
    assert scores["Helpfulness, micro"] == pytest.approx((1 / 4 + 1) / 2)
    assert scores["Harmlessness, micro"] == pytest.approx(1 / 4)
    assert scores["Mean, micro"] == pytest.approx((1 / 4 + 0 + 1 + 1 / 2) / 4)
    assert scores["Mean, macro"] == pytest.approx((1 / 2 + 0 + 1 + 1 / 2) / 4)
    details = [score.name for score in benchmark.scores if score.is_detail]
    assert sorted(details) == sorted(set(subsets))
    goals = helpful_and_harmless(benchmark.scores)
    assert {name: score.name for name, score in goals.items()} == {
        "Helpful": "Helpfulness, micro",
        "Harmless": "Harmlessness, micro",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"conversation_input": []}\n,]', r"S1\.json:2: malformed JSON"),
        ("{}", "expected a JSON array of RMB's items, found dict"),
        ('[{"chosen": "a", "rejected": "b"}]', "item 1: expected 'conversation_input' with 'chosen' and 'reject'"),
        (json.dumps([{**best_of("a", "BoN_set/Harmlessness/S1", 0)}]), "item 1: expected 'conversation_input'"),
    ],
)
def test_what_is_no_rmb_is_refused(tmp_path, content, message):
    file = tmp_path / "BoN_set" / "Harmlessness" / "S1.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        load_rmb(str(tmp_path))


def test_a_folder_without_rmb_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected RMB's Pairwise_set and BoN_set"):
        load_rmb(str(tmp_path))
    with pytest.raises(InputError, match="no such file or folder"):
        load_rmb(str(tmp_path / "nowhere"))


@pytest.fixture
def served(folder, tmp_path, monkeypatch):
    """A server of the archive, and the requests that it had."""
    archive = tmp_path / "HEAD.zip"
    with zipfile.ZipFile(archive, "w") as files:
        for path in folder.rglob("*.json"):
            files.write(path, path.relative_to(folder.parent))
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(archive.read_bytes())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(rmb, "ARCHIVE", f"http://127.0.0.1:{server.server_port}/archive/HEAD.zip")
    monkeypatch.setattr(rmb.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(rmb.constants, "HF_HUB_OFFLINE", False)
    yield requests, archive
    server.shutdown()
    server.server_close()
    thread.join()


def test_it_is_downloaded_once(served, folder, tmp_path):
    requests, archive = served
    local = load_rmb(str(folder))
    archive.write_bytes(archive.read_bytes()[:-400])  # what a broken connection leaves
    with pytest.raises(InputError, match=r"rmb: http.* cannot be downloaded"):
        load_rmb()
    with zipfile.ZipFile(archive, "w") as files:
        for path in folder.rglob("*.json"):
            files.write(path, path.relative_to(folder.parent))
    assert [load_rmb().version for _ in range(2)] == [local.version] * 2
    assert len(requests) == 2
    assert [path.name for path in (tmp_path / "home" / "idrm").iterdir()] == ["rmb"]


def test_no_download_offline_and_one_line_without_a_network(served, tmp_path, monkeypatch):
    requests, _ = served
    monkeypatch.setattr(rmb.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids"):
        load_rmb()
    assert requests == []
    monkeypatch.setattr(rmb.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(rmb, "ARCHIVE", "http://127.0.0.1:9/HEAD.zip")
    with pytest.raises(InputError, match="cannot be downloaded"):
        load_rmb()
    assert not any((tmp_path / "home" / "idrm").iterdir())
    shutil.rmtree(tmp_path / "home")
