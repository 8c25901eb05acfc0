"""The entry point of `idrm policy`: sft, dpo, rloo and ppo train a policy, generate has one answer prompts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module

from idrm.errors import InputError
from idrm.processes import command

# What each is for, and the module whose `run` takes its flags.
ACTIONS = {
    "sft": ("idrm.policy.training", "supervised fine-tuning on the chosen responses of preference pairs"),
    "dpo": ("idrm.policy.training", "direct preference optimisation on preference pairs"),
    "rloo": ("idrm.policy.training", "reinforcement learning (REINFORCE leave-one-out) with a reward model"),
    "ppo": ("idrm.policy.training", "reinforcement learning (proximal policy optimisation) with a reward model"),
    "generate": ("idrm.policy.generation", "responses to the prompts of preference pairs, as `idrm judge` reads them"),
}
EXTRA = "pip install 'idrm[policy]'"


def usage() -> str:
    """What `idrm policy --help` prints."""
    width = max(map(len, ACTIONS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in ACTIONS.items()]
    return "\n".join(
        ["usage: idrm policy ACTION [flags]", "", *lines, "", "`idrm policy ACTION --help` lists the flags of one."]
    )


def require_extra(action: str) -> None:
    """Raises InputError for an action that needs TRL where it is not installed, or not in a release that has PPO."""
    if action == "generate":
        return
    try:
        found = importlib.util.find_spec("trl.experimental.ppo")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise InputError(f"idrm policy {action}: needs TRL, in the release of this project's extra: {EXTRA}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the action; bad input and an interruption are one line on stderr, status 2 and 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The launcher of DeepSpeed puts its own flag before what it was given.
    launched = [argument for argument in arguments[:1] if argument.startswith("--local_rank")]
    action, flags = (arguments[len(launched) :] or [""])[0], arguments[len(launched) + 1 :]
    if action in ("-h", "--help"):
        print(usage())
        return
    with command():
        if action not in ACTIONS:
            raise InputError(f"{f'idrm policy {action}'.strip()}: expected one of {', '.join(ACTIONS)}")
        require_extra(action)
        import_module(ACTIONS[action][0]).run(action, [*flags, *launched])
