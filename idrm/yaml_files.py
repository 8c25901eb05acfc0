"""YAML files that describe several runs: reading them, and filling in names that stand in braces."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from idrm.errors import InputError

_PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; InputError where there is none, with the line that is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{path}{f':{mark.line + 1}' if mark else ''}: is not valid YAML") from error


def require_mapping(value: Any, where: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """The value, which is a mapping of no other keys than these; InputError otherwise."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a mapping, found {type(value).__name__}")
    unknown = [key for key in value if keys is not None and key not in keys]
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(keys)}")
    return value


def filled(content: Any, values: Mapping[str, str], where: str) -> Any:
    """YAML content with {name} in its strings, keys aside, replaced by values; other braces stay as they are.

    Raises:
        InputError: a name without a value.
    """
    if isinstance(content, Mapping):
        return {key: filled(value, values, where) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [filled(value, values, where) for value in content]
    if not isinstance(content, str):
        return content
    for name in names_in_braces(content):
        if name not in values:
            raise InputError(f"{where}: {{{name}}} has no value: give it by --values {name}=...")
    return _PLACEHOLDER.sub(lambda match: values[match[1]], content)


def strings_in(content: Any) -> Iterator[str]:
    """Every string in YAML content, keys aside."""
    if isinstance(content, Mapping):
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        for entry in content:
            yield from strings_in(entry)
    elif isinstance(content, str):
        yield content


def names_in_braces(content: Any) -> Iterator[str]:
    """Every {name} in the strings of YAML content, keys aside."""
    for text in strings_in(content):
        yield from _PLACEHOLDER.findall(text)
