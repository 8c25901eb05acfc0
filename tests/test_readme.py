"""What the README promises: its Python runs, its commands parse, its data loads, its tables are complete."""

import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from idrm.arguments import (
    DataArguments,
    EmbeddedArguments,
    InteractionArguments,
    ModelArguments,
    ObjectiveArguments,
    RewardTrainingArguments,
    parse_arguments,
)
from idrm.cli import COMMANDS, usage
from idrm.evaluation.catalogue import benchmark_sources
from idrm.evaluation.command import make_parser as evaluation_parser
from idrm.evaluation.comparison_command import make_parser as comparison_parser
from idrm.metrics import BOTTLENECK_METRICS, INTERACTION_METRICS, PREFERENCE_METRICS
from idrm.nli import arguments as nli_arguments
from idrm.nli import load_nli
from idrm.preference import convert_record, drop_reason

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
OWN_ARGUMENTS = (ModelArguments, DataArguments, InteractionArguments, ObjectiveArguments, EmbeddedArguments)
TEACHER_ARGUMENTS = (
    nli_arguments.EncoderArguments,
    nli_arguments.NliDataArguments,
    nli_arguments.CheckArguments,
)
# The help flag, and flags of the other commands shown: DeepSpeed's launcher, pip, the compile report, benchmarks.
OTHER_FLAGS = {"help", "num_accelerators", "no-build-isolation", "arch", "dtype", "full"}


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(*patterns: str) -> list[list[str]]:
    """The flags of every command in the README's shell blocks that one of the patterns finds."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(match[1]) for line in lines for pattern in patterns for match in re.finditer(pattern, line)]


def training_commands() -> list[list[str]]:
    return commands(r"idrm/train\.py (.*)", r"idrm train (.*)", r'make train ARGS="(.*)"')


def teacher_commands() -> list[list[str]]:
    return commands(r"idrm/teacher\.py (.*)", r"idrm teacher (.*)")


def own_defaults(kinds: tuple[type, ...] = OWN_ARGUMENTS) -> dict[str, object]:
    fields = [field for kind in kinds for field in dataclasses.fields(kind)]
    return {field.name: field.default for field in fields}


def flag_table(title: str) -> dict[str, str]:
    """The flags of a section's table with their defaults."""
    return dict(re.findall(r"^\| `--(\w+)` \| (?:`(.*?)`)? *\|", section(title), flags=re.MULTILINE))


def as_shown(defaults: dict[str, object]) -> dict[str, str]:
    return {name: "" if default is None else str(default).lower() for name, default in defaults.items()}


@pytest.fixture
def reward_model_folder(tmp_path: Path) -> Path:
    """A folder with a trained model's kinds of files, named as the README names it."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "Is": 3, "it": 4, "far": 5, "Ten": 6, "minutes": 7}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        num_labels=1,
    )
    folder = tmp_path / "idrm-output"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_fused_loss_block_runs():
    block = next(block for block in blocks("python") if "attention_map_loss" in block)
    assert len(block.splitlines()) == 5
    names: dict[str, object] = {}
    exec(block, names)
    for tensor in (names["student"].q, names["student"].k):
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().max() > 0


def test_loading_block_runs(reward_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(reward_model_folder.parent)
    block = next(block for block in blocks("python") if "from_pretrained" in block)
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["reward"], float)
    assert names["tokenizer"].unk_token_id not in names["inputs"]["input_ids"][0, :2]


def test_every_python_block_is_run_here():
    assert len(blocks("python")) == 2


@pytest.mark.parametrize("flags", training_commands(), ids=lambda flags: " ".join(flags)[:60])
def test_training_commands_parse(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The commands are run from the repository's root; where they name a run.yaml, there is one."""
    (tmp_path / "run.yaml").write_text("alpha: 0.8\n")
    for name in ("ds_zero2.json", "ds_zero3.json"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    monkeypatch.chdir(tmp_path)
    config = parse_arguments(flags)
    assert config.interaction.alpha == (0.8 if "--config" in flags else 1.0)


@pytest.mark.parametrize("flags", teacher_commands(), ids=lambda flags: " ".join(flags)[:60])
def test_teacher_commands_parse(flags: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    config = nli_arguments.parse_arguments(flags)
    assert config.examination.check == ("--check" in flags)


@pytest.mark.parametrize("flags", commands(r"idrm eval (.*)"), ids=lambda flags: " ".join(flags)[:60])
def test_evaluation_commands_parse(flags: list[str]):
    arguments = evaluation_parser().parse_args(flags)
    assert arguments.models
    assert benchmark_sources(arguments.benchmark)


@pytest.mark.parametrize("flags", commands(r"idrm compare (.*)"), ids=lambda flags: " ".join(flags)[:60])
def test_comparison_commands_parse(flags: list[str]):
    assert comparison_parser().parse_args(flags).output_dir == "difference"


def test_commands_are_found():
    assert len(commands(r"idrm eval (.*)")) == 2
    assert len(commands(r"idrm compare (.*)")) == 1
    assert len(training_commands()) >= 5
    assert len(teacher_commands()) >= 4
    assert set(re.findall(r"idrm (\w+) \[", usage())) == COMMANDS.keys()


def test_flags_exist():
    known = {*own_defaults(), *own_defaults(TEACHER_ARGUMENTS), "config"}
    known |= {"benchmark", "implicit_reward"}  # of idrm eval, whose commands are parsed above
    for kind in (RewardTrainingArguments, nli_arguments.TeacherTrainingArguments):
        known |= {field.name for field in dataclasses.fields(kind)}
    mentioned = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README))
    assert mentioned - known - OTHER_FLAGS == set()


def test_flag_table_is_complete_and_has_the_defaults():
    expected = as_shown(own_defaults())
    # Shown with ours because transformers does not have it; letting a repository run its code is not advertised.
    expected["center_rewards_coefficient"] = ""
    expected.pop("trust_remote_code", None)
    assert flag_table("Training") == expected


def test_teacher_flag_table_is_complete_and_has_the_defaults():
    training = {field.name: field.default for field in dataclasses.fields(nli_arguments.TeacherTrainingArguments)}
    # Shown with ours: transformers does not have the one, and means something else by the other.
    shown = {name: training[name] for name in ("early_stopping_patience", "label_names")}
    assert flag_table("A teacher") == as_shown({**own_defaults(TEACHER_ARGUMENTS), **shown})


def test_metric_table_is_complete():
    logged = README.split("### What is logged")[1].split("###")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", logged, flags=re.MULTILINE)) == {
        *PREFERENCE_METRICS,
        *INTERACTION_METRICS,
        *BOTTLENECK_METRICS,
    }


def test_data_examples_are_one_pair_each():
    records = [json.loads(line) for block in blocks("json", section("Training")) for line in block.splitlines()]
    assert len(records) == 4
    pairs = [convert_record(record) for record in records]
    assert [drop_reason(pair) for pair in pairs] == [None] * 4
    assert [pair["chosen"][-1]["content"].strip() for pair in pairs] == ["Ten minutes."] * 3 + ["They walked."]
    assert [pair["margin"] for pair in pairs] == [None, 0.5, None, None]


def test_teacher_data_examples_are_one_pair_each(tmp_path: Path):
    lines = [line for block in blocks("json", section("A teacher")) for line in block.splitlines()]
    assert len(lines) == 2
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.jsonl").write_text(line + "\n")
        # One label alone would be no NLI data.
        pairs, _, _ = load_nli(str(tmp_path / f"{number}.jsonl"), labels=("entailment", "neutral", "contradiction"))
        assert list(pairs) == [{"premise": "Two dogs run.", "hypothesis": "Animals move.", "label": 0}]


def test_figures_of_benchmarks_are_rows_of_the_results():
    results = "".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("benchmarks/results/*/report.md"))
    rows = [line for line in section("Benchmarks").splitlines() if line.startswith("| c")]
    assert len(rows) >= 8
    assert [row for row in rows if row not in results.splitlines()] == []


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str):
    """Links, and paths in backticks or at the start of a line of a picture, lead somewhere."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    folder = (REPOSITORY / page).parent
    links = [(folder / link).resolve() for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    paths = re.findall(r"`((?:idrm|idrm_kernels|tests|docs|csrc|benchmarks|recipes)/[\w./*-]*)`", text)
    missing = [str(path) for path in links if not path.exists()]
    missing += [path for path in paths if not any(itertools.islice(REPOSITORY.glob(path.rstrip("/")), 1))]
    assert missing == []
