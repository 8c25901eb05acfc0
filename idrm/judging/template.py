"""What a judge that reads text is asked, and how its answer is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from idrm.errors import InputError
from idrm.judging.judge import Message, Preference

DEFAULT_TEMPLATE = Path(__file__).with_name("judge_prompt.txt")
# What follows an answer that could not be read.
REMINDER = (
    "Your answer did not end with a verdict. Reply with nothing but one line, exactly one of these three:\n"
    "Verdict: 1\nVerdict: 2\nVerdict: tie"
)

_FIELD = re.compile(r"\{(prompt|first|second)\}")
_VERDICT = re.compile(r"verdict: (1|2|tie)", flags=re.IGNORECASE)
_PREFERENCES: dict[str, Preference] = {"1": "first", "2": "second", "tie": "tie"}


def load_template(path: str | Path = DEFAULT_TEMPLATE) -> str:
    """The text of a template, which holds {prompt}, {first} and {second}; other braces stand for themselves.

    Raises:
        InputError: the file cannot be read, or lacks one of the three.
    """
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--judge_template {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--judge_template {path}: is not UTF-8: {error.reason}") from error
    missing = [f"{{{name}}}" for name in ("prompt", "first", "second") if f"{{{name}}}" not in template]
    if missing:
        raise InputError(f"--judge_template {path}: expected {{prompt}}, {{first}} and {{second}}, lacks {missing[0]}")
    return template


def fill_template(template: str, prompt: Sequence[Message], first: str, second: str) -> str:
    """The template with its fields filled; braces in the texts put in stay as they are."""
    texts = {"prompt": render_prompt(prompt), "first": first, "second": second}
    return _FIELD.sub(lambda match: texts[match[1]], template)


def render_prompt(prompt: Sequence[Message]) -> str:
    """A prompt as text: one user message by itself, several messages below their roles."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in prompt)


def read_verdict(answer: str) -> Preference | None:
    """The verdict in an answer, None where there is none to rely on.

    The last line that is not blank has to be "Verdict: 1", "Verdict: 2" or "Verdict: tie", letter case, white space
    around it and Markdown's asterisks aside, and no other line may be another verdict.
    """
    lines = [line.strip().strip("*").strip() for line in answer.strip().splitlines()]
    verdicts = [match and match[1].lower() for match in map(_VERDICT.fullmatch, lines)]
    if not verdicts or verdicts[-1] is None or len({verdict for verdict in verdicts if verdict is not None}) > 1:
        return None
    return _PREFERENCES[verdicts[-1]]
