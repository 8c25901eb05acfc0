"""What a comparison is told: every flag of `idrm judge` with its default and meaning."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from idrm.command_line import FlagParser, fields_of, require_at_least
from idrm.errors import InputError

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass
class JudgeArguments:
    """The judge, and where what comes out goes."""

    endpoint: str | None = field(
        default=None,
        metadata={
            "help": "Base URL of an OpenAI-compatible API, such as https://api.openai.com/v1 or "
            "http://localhost:8000/v1; prompts and responses are sent there."
        },
    )
    judge_model: str | None = field(default=None, metadata={"help": "The judge's name at the endpoint."})
    output_dir: str = field(
        default="idrm-judge", metadata={"help": "Folder for judge.json, judge.md and verdicts.jsonl."}
    )
    judge_template: str | None = field(
        default=None,
        metadata={
            "help": "Text file with {prompt}, {first} and {second} that replaces the built-in question; it has to ask "
            "for a last line of Verdict: 1, Verdict: 2 or Verdict: tie."
        },
    )
    api_key_variable: str = field(
        default=DEFAULT_KEY_VARIABLE,
        metadata={"help": "Environment variable that holds the API key; where it is not set, no key is sent."},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for answers, which are not asked for again; runs may share it. Default: answers, in "
            "--output_dir."
        },
    )
    concurrency: int = field(default=4, metadata={"help": "Requests under way at once."})
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Longest answer in tokens, sent as max_tokens. Default: not sent, the endpoint decides."},
    )
    max_reminders: int = field(
        default=2,
        metadata={
            "help": "How often a judge is reminded to end with a verdict before its answer counts as unparseable."
        },
    )
    max_retries: int = field(
        default=6,
        metadata={
            "help": "How often a request is sent again, after growing waits, when the endpoint is busy, fails, times "
            "out or cannot be reached."
        },
    )
    timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for an answer."})


@dataclass(frozen=True)
class JudgeConfiguration:
    """A comparison as its user described it.

    Attributes:
        responses: the two response files, A's and B's.
        arguments: the flags.
        key: what the environment variable holds; None where no key is to be sent.
    """

    responses: tuple[str, str]
    arguments: JudgeArguments
    key: str | None = field(repr=False)

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir).expanduser()

    @property
    def cache_dir(self) -> Path:
        return self.output_dir / "answers" if self.arguments.cache_dir is None else Path(self.arguments.cache_dir)


def parse_arguments(argv: Sequence[str] | None = None) -> JudgeConfiguration:
    """Parses the command line and the YAML file that it may name; the command line wins.

    Raises:
        InputError: an unknown flag or YAML key, a value of the wrong kind, not two files, or a variable without a key.
    """
    parser = FlagParser((JudgeArguments,), "idrm judge")
    parser.add_argument(
        "responses",
        nargs="*",
        metavar="RESPONSES.jsonl",
        help="Two response files, A's and B's: JSON lines with prompt and response, matched by prompt, or by id where "
        "every line has one. The win rate is A's.",
    )
    values, given = parser.values(argv)
    responses = values["responses"]
    if len(responses) != 2:
        raise InputError(f"expected two response files, idrm judge A.jsonl B.jsonl ..., got {len(responses)}")
    arguments = JudgeArguments(**fields_of(JudgeArguments, values))
    for flag, meaning in (("endpoint", "the base URL of an API"), ("judge_model", "the judge's name there")):
        if not values[flag]:
            raise InputError(f"--{flag} is missing: give {meaning}")
    require_at_least(values, {"concurrency": 1, "max_tokens": 1, "max_reminders": 0, "max_retries": 0})
    if not 0 < arguments.timeout < math.inf:
        raise InputError(f"--timeout: expected more than 0 seconds, got {arguments.timeout:g}")
    key = os.environ.get(arguments.api_key_variable, "").strip() or None
    if key is None and "api_key_variable" in given:
        raise InputError(f"--api_key_variable {arguments.api_key_variable}: the environment has no such variable")
    return JudgeConfiguration(responses=tuple(responses), arguments=arguments, key=key)
