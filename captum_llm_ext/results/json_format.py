"""Results as JSON text and back.

`FIELDS` lists the stored attributes of each class of result; a new class is one more row.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_llm_ext.results.provenance import Provenance

SCHEMA, VERSION = "captum_llm_ext.results", 2
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # stored as strings: JSON has no such numbers
_LONGEST_QUOTE = 60  # characters of a damaged value in an error message


@dataclass(frozen=True)
class Field:
    """How an attribute is stored: `read(name, write(name, value))` equals the value.

    `read` raises ValueError and `write` raises TypeError, with the name of the attribute. added:
    whether earlier texts may lack it, and then mean None.
    """

    write: Callable[[str, Any], Any]
    read: Callable[[str, Any], Any]
    added: bool = False


def _damaged(name: str, expected: str, stored: object) -> ValueError:
    quote = repr(stored)
    quote = quote if len(quote) <= _LONGEST_QUOTE else quote[:_LONGEST_QUOTE] + "…"
    return ValueError(f"{name}: expected {expected}, got {quote}; the JSON text is damaged")


def _plain(kind: type, expected: str) -> Field:
    """A value that JSON has as it is."""

    def read(name: str, stored: Any) -> Any:
        if type(stored) is not kind:
            raise _damaged(name, expected, stored)
        return stored

    def write(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {value!r}; it cannot be stored")
        return value

    return Field(write, read)


def _list_of(item: Field) -> Field:
    def read(name: str, stored: Any) -> list[Any]:
        if not isinstance(stored, list):
            raise _damaged(name, "a list", stored)
        return [item.read(name, value) for value in stored]

    return Field(lambda name, values: [item.write(name, value) for value in values], read)


def _dict_of(item: Field) -> Field:
    def read(name: str, stored: Any) -> dict[str, Any]:
        if not isinstance(stored, dict):
            raise _damaged(name, "an object", stored)
        return {key: item.read(f"{name}[{key!r}]", value) for key, value in stored.items()}

    return Field(lambda name, values: {k: item.write(name, v) for k, v in values.items()}, read)


def _optional(field: Field) -> Field:
    return Field(
        lambda name, value: None if value is None else field.write(name, value),
        lambda name, stored: None if stored is None else field.read(name, stored),
    )


def _write_tensor(_: str, tensor: Tensor) -> Any:
    return _each(_write_number, tensor.detach().cpu().tolist())


def _read_tensor(name: str, stored: Any) -> Tensor:
    """A float32 tensor; a number too large for float32 is damage, not infinity."""
    try:
        numbers = np.array(_each(_read_number, stored), dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise _damaged(name, "numbers in lists of equal lengths", stored) from None
    with np.errstate(over="ignore"):
        values = numbers.astype(np.float32)
    if not np.array_equal(np.isinf(values), np.isinf(numbers)):
        raise _damaged(name, "numbers within the range of float32", stored)
    return torch.from_numpy(values)


def _each(convert: Callable[[Any], Any], values: Any) -> Any:
    return [_each(convert, v) for v in values] if isinstance(values, list) else convert(values)


def _write_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _read_number(stored: Any) -> float:
    if stored not in _NOT_FINITE and (type(stored) not in (int, float) or math.isinf(stored)):
        raise TypeError
    return float(stored)


def _number(name: str, stored: Any) -> float:
    try:
        return _read_number(stored)
    except TypeError:
        raise _damaged(name, "a number or null", stored) from None


_TEXT = _plain(str, "a string")
_TEXTS = _list_of(_TEXT)
_COUNT = _optional(_plain(int, "an integer or null"))
_FLAG = _optional(_plain(bool, "true, false or null"))
_FLAGS = Field(
    lambda name, flags: flags.tolist(),
    lambda name, stored: torch.tensor(_list_of(_plain(bool, "true or false")).read(name, stored)),
)
_NUMBER = Field(
    lambda name, value: _write_number(value), lambda name, stored: _number(name, stored)
)
_TENSOR = Field(_write_tensor, _read_tensor)
_MAYBE_TENSOR = _optional(_TENSOR)


def _read_provenance(name: str, stored: Any) -> Provenance:
    try:
        return Provenance(**stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}; the JSON text is damaged") from None


_PROVENANCE = Field(lambda _, value: asdict(value), _read_provenance)
_ADDED = {
    "provenance": replace(_optional(_PROVENANCE), added=True),
    "output_labels": replace(_optional(_TEXTS), added=True),
    "starts_prompt": replace(_FLAG, added=True),
}
_OF_EVERY_RESULT = {
    "input_tokens": _TEXTS,
    "output_tokens": _TEXTS,
    "seq_attr": _TENSOR,
    "token_attr": _MAYBE_TENSOR,
    "output_probs": _MAYBE_TENSOR,
    "convergence_delta": _MAYBE_TENSOR,
    "norm": _optional(_TEXT),
    "spread": replace(_MAYBE_TENSOR, added=True),
} | _ADDED
_OF_ONE_LAYER = _OF_EVERY_RESULT | {
    "hidden_attr": _MAYBE_TENSOR,
    "score_path": _MAYBE_TENSOR,
    "n_evaluations": _COUNT,
    "converged": _FLAG,
    "measured": replace(_optional(_FLAGS), added=True),
    "lds": replace(_optional(_NUMBER), added=True),
}

FIELDS: dict[str, dict[str, Field]] = {
    # class of result → attribute → how it is stored
    "LLMAttributionResult": _OF_ONE_LAYER,
    "LLMLayerAttributionResult": _OF_EVERY_RESULT
    | {
        "layer_names": _TEXTS,
        "layer_mode": _TEXT,
        "layer_seq_attr": _TENSOR,
        "layer_token_attr": _MAYBE_TENSOR,
        "hidden_attr": _optional(_dict_of(_MAYBE_TENSOR)),
        "layer_n_evaluations": _list_of(_COUNT),
        "layer_converged": _list_of(_FLAG),
        "layer_score_paths": _list_of(_MAYBE_TENSOR),
    },
    "LLMAttentionAttributionResult": {
        "input_tokens": _TEXTS,
        "output_tokens": _TEXTS,
        "layer_names": _TEXTS,
        "layer_token_attr": _MAYBE_TENSOR,
        "layer_seq_attr": replace(_MAYBE_TENSOR, added=True),
        "attention": _TENSOR,
        "sink_attention": _TENSOR,
        "reduction": _TEXT,
        "heads": _list_of(_plain(int, "an integer")),
        "prompt_attention": _MAYBE_TENSOR,
        "prompt_tokens": _optional(_TEXTS),
        "output_probs": _MAYBE_TENSOR,
    }
    | _ADDED,
}


def fields_of(result: Any) -> dict[str, Field]:
    """The stored attributes of a result.

    Raises:
        TypeError: the class of the result has no row in `FIELDS`.
    """
    kind = type(result).__name__
    if kind not in FIELDS:
        raise TypeError(f"expected a result of one of {', '.join(FIELDS)}; got {kind}")
    return FIELDS[kind]


def write_json(result: Any) -> str:
    """A result as one line of JSON text in ASCII."""
    head = {"schema": SCHEMA, "version": VERSION, "kind": type(result).__name__}
    fields = fields_of(result).items()
    values = {name: field.write(name, getattr(result, name)) for name, field in fields}
    return json.dumps(head | values, allow_nan=False)


def read_json(source: str | Path) -> tuple[str, dict[str, Any]]:
    """The name of the class of the stored result, and its attributes."""
    document = _document(source)
    kind = document.pop("kind", None)
    if not isinstance(kind, str) or kind not in FIELDS:
        raise _damaged("kind", " or ".join(FIELDS), kind)
    fields = FIELDS[kind]
    if "method" in document:  # as schema 1 had it
        document["provenance"] = {"method": document.pop("method")}
    document = {name: None for name, field in fields.items() if field.added} | document
    for name in sorted(document.keys() ^ fields.keys()):
        state = "missing" if name in fields else "unknown"
        raise ValueError(f"the field {name!r} is {state}; the JSON text is damaged")
    return kind, {name: field.read(name, document[name]) for name, field in fields.items()}


def _document(source: str | Path) -> dict[str, Any]:
    """The JSON object of a result, in a version that can be read."""
    expected = "expected the JSON text of a result, or the path of a file that holds it"
    if not isinstance(source, str | Path):
        raise TypeError(f"{expected}; got {type(source).__name__}")
    if isinstance(source, str) and not source.lstrip().startswith("{"):
        if not os.path.isfile(source):
            quote = source if len(source) <= _LONGEST_QUOTE else source[:_LONGEST_QUOTE] + "…"
            raise ValueError(f"{expected}; {quote!r} is no file, and no JSON or damaged JSON")
        source = Path(source)
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected}; this is no JSON, or damaged JSON: {error}") from error
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
        raise ValueError(f'{expected}; this JSON has no "schema": "{SCHEMA}"')
    version = document.pop("version", None)
    if type(version) is not int or version < 1:
        raise _damaged("version", f"an integer from 1 to {VERSION}", version)
    if version > VERSION:
        raise ValueError(
            f"this result was stored by a newer captum_llm_ext (version {version} of the schema; "
            f"this one reads up to {VERSION}): upgrade captum_llm_ext"
        )
    return document
