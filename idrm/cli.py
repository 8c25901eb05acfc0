"""The console script `idrm`."""

from __future__ import annotations

import sys

USAGE = """usage: idrm train [flags]
       idrm teacher [flags]

  train    train a reward model; `idrm train --help` lists the flags. With neither a model nor data named, the embedded
           demonstration runs. On several devices: deepspeed idrm/train.py --deepspeed ds_zero3.json [flags]
  teacher  fine-tune an encoder on NLI, or examine one with --check; `idrm teacher --help` lists the flags. On several
           devices: deepspeed idrm/teacher.py --deepspeed ds_zero3.json [flags]"""


def main() -> None:
    """Runs the subcommand; anything else prints the usage, with exit status 2 unless help was asked for."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["train"]:
        # Imported here: torch and transformers take seconds, which asking for help should not.
        from idrm.train import main as train

        train(arguments[1:])
    elif arguments[:1] == ["teacher"]:
        from idrm.teacher import main as teacher

        teacher(arguments[1:])
    elif arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
    else:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
