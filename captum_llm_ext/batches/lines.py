"""The lines of a file of prompts, and the request that each line makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs.features import prompt_ids
from captum_llm_ext.inputs.prompts import requested_input


@dataclass(frozen=True)
class Line:
    """A line that is not blank, and its number in the file, counted from 1."""

    number: int
    text: bytes


@dataclass(frozen=True)
class PromptLine:
    """The request of a line: its input, its target (None: generated) and its options."""

    inp: InterpretableInput
    target: str | None
    options: Mapping[str, Any]


def read_lines(prompts: str | Path | Sequence[str | Mapping[str, Any]]) -> list[Line]:
    """The lines of a JSONL file, or the lines that a list of prompts and dicts would fill.

    Raises:
        ValueError: there is no line.
        TypeError: the prompts are neither a path nor a list of str and dict.
        OSError: the file cannot be read.
    """
    if isinstance(prompts, str | Path):
        texts = Path(prompts).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    else:
        texts = [_as_line(item) for item in prompts]
    lines = [Line(number, text) for number, text in enumerate(texts, 1) if text.strip()]
    if not lines:
        raise ValueError(f"expected at least one prompt, but there is none in {prompts!r}")
    return lines


def read_fields(line: Line) -> dict[str, Any]:
    """The checked fields of a line, without those that are null.

    Raises:
        ValueError: the line is no JSON object, or a field is unknown or has a wrong value.
    """
    fields = json.loads(line.text.decode("utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object with a prompt, got {type(fields).__name__}")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r}; the fields are {', '.join(FIELDS)}")
        expected, is_valid = FIELDS[name]
        if not is_valid(value):
            raise ValueError(f"{name}: expected {expected}, got {shortened(ascii(value))}")
    return fields


def read_prompt(
    line: Line, tokenizer: Any, by: str, roles: Sequence[str], target: str | None
) -> PromptLine:
    """The request of a line; `target` is for a line without a target.

    Raises:
        ValueError: as `read_fields`, or the input has no meaning.
    """
    fields = read_fields(line)
    inp = requested_input(
        tokenizer,
        by="token" if "template" in fields else by,
        roles=roles,
        **{name: fields[name] for name in INPUT_FIELDS if name in fields},
    )
    options = {name: fields[name] for name in OPTION_FIELDS if name in fields}
    return PromptLine(inp, fields.get("target", target), options)


def number_of_tokens(line: Line, tokenizer: Any, by: str, roles: Sequence[str]) -> int:
    """The length of a line's prompt in tokens; 0 where the line is malformed."""
    try:
        inp = read_prompt(line, tokenizer, by, roles, None).inp
        return len(prompt_ids(inp, None, tokenizer, "cpu"))
    except Exception:  # the record of the line will say what is wrong
        return 0


def identity(line: Line) -> str | int | None:
    """The `id` of a line or None, also where the line is malformed in other ways."""
    try:
        fields = json.loads(line.text)
    except (ValueError, RecursionError):
        return None
    value = fields.get("id") if isinstance(fields, dict) else None
    return value if isinstance(value, str | int) else None


def readable(text: str) -> str:
    """The text with "?" for each lone half of a surrogate pair, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def shortened(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else text[:longest] + "…"


def _as_line(item: str | Mapping[str, Any]) -> bytes:
    if not isinstance(item, str | Mapping):
        raise TypeError(
            "expected the path of a JSONL file, or a list of prompts and of dicts with a prompt or "
            f"messages; got {type(item).__name__} in it"
        )
    fields = {"prompt": item} if isinstance(item, str) else dict(item)
    return json.dumps(fields).encode()


def _is_text(value: Any) -> bool:
    """Whether it is a text that UTF-8 can hold."""
    return isinstance(value, str) and value == readable(value)


def _are_texts(value: Any) -> bool:
    items = list(value.values()) if isinstance(value, dict) else value
    return isinstance(items, list) and all(_is_text(item) for item in items)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and _are_texts(m) for m in value)


_TEXT = ("a string", _is_text)
_TEXTS = ("a list of strings, or an object of them", _are_texts)
INPUT_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    # field: (what is expected, whether a value is that)
    "prompt": _TEXT,
    "messages": ("a list of objects with 'role' and 'content'", _are_messages),
    "template": _TEXT,
    "values": _TEXTS,
    "baselines": _TEXTS,
    "context": _TEXT,
}
OPTION_FIELDS = {"contrast_target": _TEXT}
FIELDS = {
    **INPUT_FIELDS,
    "target": _TEXT,
    **OPTION_FIELDS,
    "id": ("a string or an integer", lambda value: isinstance(value, str | int)),
}
