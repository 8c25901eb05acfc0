"""The console script `idrm`."""

from __future__ import annotations

import sys
import textwrap
from importlib import import_module

# What each command is for, and the module whose `main` takes its flags.
COMMANDS = {
    "train": (
        "idrm.train",
        "train a reward model, or without a model and data the embedded demonstration; idrm/train.py for deepspeed",
    ),
    "teacher": (
        "idrm.teacher",
        "fine-tune an encoder on NLI, or examine one with --check; idrm/teacher.py for deepspeed",
    ),
    "eval": ("idrm.evaluation.command", "score reward models on held-out pairs, RewardBench and RMB, side by side"),
    "compare": ("idrm.evaluation.comparison_command", "whether two models differ, by what idrm eval wrote of them"),
    "judge": ("idrm.judging.command", "win rates of responses against others, by a judge behind an endpoint"),
    "analyze": ("idrm.analysis.command", "the paper's figures 1, 2 and 5, of a reward model and of finished runs"),
    "margins": (
        "idrm.ensembles.margins_command",
        "preference pairs with the margins of several reward models beside them, mean and deviation",
    ),
    "average": ("idrm.ensembles.average_command", "one reward model that is the mean of several runs' weights (WARM)"),
    "policy": ("idrm.policy.command", "train a policy by SFT, DPO, RLOO or PPO with TRL, and have one answer prompts"),
    "grid": ("idrm.grid.command", "train and evaluate the rows of a table, several seeds each"),
    "pipeline": ("idrm.pipeline.command", "commands that stand on one another, run once each, and tables of them"),
    "study": ("idrm.study.command", "the study of docs/study.md: small reward models, cross-validated"),
}


def usage() -> str:
    """What `idrm --help` prints."""
    first = "usage: "
    lines = []
    for name in COMMANDS:
        lines.append(f"{first}idrm {name} [flags]")
        first = " " * len(first)
    width = max(map(len, COMMANDS))
    lines.append("")
    for name, (_, purpose) in COMMANDS.items():
        lines += textwrap.wrap(
            purpose, width=120, initial_indent=f"  {name:{width}}  ", subsequent_indent=" " * (width + 4)
        )
    lines += ["", "`idrm COMMAND --help` lists the flags of one."]
    return "\n".join(lines)


def main() -> None:
    """Runs the subcommand; anything else prints the usage, with exit status 2 unless help was asked for."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
    elif arguments and arguments[0] in COMMANDS:
        # Imported here: torch and transformers take seconds, which asking for help should not.
        import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    else:
        print(usage(), file=sys.stderr)
        sys.exit(2)
