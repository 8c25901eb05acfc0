"""Win rates in a table, from what `idrm judge` itself leaves."""

import json

from idrm.embedded.generator import Generator
from idrm.embedded.judge import MODEL, serve
from idrm.judging.command import main as judge
from idrm.pipeline.specification import read_pipeline
from idrm.pipeline.tables import write_tables

PIPELINE = """
title: Win rates
steps:
  judged: {command: judge, inputs: [a.jsonl, b.jsonl], flags: {endpoint: x, judge_model: y}}
tables:
  - {title: A against, judged: {B: judged}}
"""


def test_a_row_has_the_shares_and_the_interval(tmp_path, capsys):
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    with files[0].open("w") as a, files[1].open("w") as b:
        for index, pair in enumerate(Generator(5).preference_pairs(10, 0.5)):
            prompt, chosen = pair["chosen"].removeprefix("\n\nHuman: ").split("\n\nAssistant: ")
            rejected = pair["rejected"].rpartition("\n\nAssistant: ")[2]
            # Six won, three lost, one the same text.
            for file, response in ((a, chosen if index < 7 else rejected), (b, rejected if index < 6 else chosen)):
                file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
    with serve() as address:
        flags = ["--endpoint", address, "--judge_model", MODEL, "--output_dir", str(tmp_path / "steps" / "judged")]
        judge([*map(str, files), *flags])
    write_tables(tmp_path, read_pipeline(tmp_path / "pipeline.yaml"))
    low, high = json.loads((tmp_path / "steps" / "judged" / "judge.json").read_text())["interval"]
    row = f"| B (10 prompts) | 60.0 | 10.0 | 30.0 | 0.0 | 66.7 | {100 * low:.1f} to {100 * high:.1f} |"
    assert row in (tmp_path / "tables.md").read_text()
    assert "A against" in capsys.readouterr().out
