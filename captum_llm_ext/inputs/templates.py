"""Template inputs: checked, their baselines drawn, and where each value stands in the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

from captum_llm_ext.compat import InterpretableInput, TextTemplateInput

FIRST_MARK = 0xF0000  # of Unicode's supplementary private use area, which no text contains


def drawn(inp: InterpretableInput) -> InterpretableInput:
    """The input with its callable baseline drawn once, so that all perturbations share it."""
    if not (isinstance(inp, TextTemplateInput) and callable(inp.baselines)):
        return inp
    fixed = copy(inp)
    baselines: Any = inp.baselines()
    if inp.dict_keys:
        _check_keys(baselines, inp.dict_keys, "baselines")
        baselines = [baselines[key] for key in inp.dict_keys]
    fixed.baselines = baselines
    _check_count(baselines, inp, "baselines")
    return fixed


def check_template(inp: TextTemplateInput) -> None:
    """Refuse baselines, a mask or a template that do not fit the values."""
    for i, value in enumerate(inp.values):
        if not isinstance(value, str):
            raise ValueError(f"value {i} of the template must be a str, got {value!r}")
    if not callable(inp.baselines):
        _check_count(inp.baselines, inp, "baselines")
    if inp.mask is not None:
        _check_count(inp.mask, inp, "mask")
    try:
        text = inp.to_model_input()
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"the template does not take the {len(inp.values)} values ({error!r}): it needs one "
            "{} or {name} for each, and literal braces doubled, {{ and }}"
        ) from error
    if not isinstance(text, str):
        raise ValueError(f"the template must give a str, got {type(text).__name__}")


def value_spans(
    render: Callable[[list[str]], str], values: Sequence[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The text that `render` makes of the values, and where each stands in it, in characters.

    Found by rendering once more with a mark on each side of every value. An empty value is not
    marked, since a template may leave out what is empty, and has an empty span.

    Raises:
        ValueError: a value comes twice, not at all, or not as it is; the message names it.
    """
    text = render(list(values))
    clean, found = _unmark(render([_marked(i, value) for i, value in enumerate(values)]))
    spans: list[tuple[int, int]] = []
    for i, value in enumerate(values):
        opened, closed = found.get(2 * i, []), found.get(2 * i + 1, [])
        if value and not (len(opened) == len(closed) == 1):
            problem = "leaves out" if not opened else "uses more than once"
            raise ValueError(f"the template {problem} value {i}, {value!r}")
        spans.append((opened[0], closed[0]) if value else (0, 0))
        if value and clean[slice(*spans[-1])] != value:
            raise ValueError(f"the template changes value {i}, {value!r}")
    if clean != text:
        raise ValueError(f"the template changes {_sensitive_value(render, values, text)}")
    return text, spans


def render_template(inp: TextTemplateInput) -> Callable[[list[str]], str]:
    """The template as a function of the values in their order."""

    def render(values: list[str]) -> str:
        if inp.dict_keys:
            return inp.format_fn(**dict(zip(inp.dict_keys, values, strict=True)))
        return inp.format_fn(*values)

    return render


def _marked(i: int, value: str) -> str:
    return f"{chr(FIRST_MARK + 2 * i)}{value}{chr(FIRST_MARK + 2 * i + 1)}" if value else value


def _unmark(text: str) -> tuple[str, dict[int, list[int]]]:
    """The text without marks, and where each mark stood in it."""
    clean: list[str] = []
    found: dict[int, list[int]] = {}
    for character in text:
        mark = ord(character) - FIRST_MARK
        if mark < 0:
            clean.append(character)
        else:
            found.setdefault(mark, []).append(len(clean))
    return "".join(clean), found


def _sensitive_value(render: Callable[[list[str]], str], values: Sequence[str], text: str) -> str:
    """The value that the template treats otherwise when it is marked."""
    for i, value in enumerate(values):
        marked = [_marked(i, v) if i == j else v for j, v in enumerate(values)]
        if _unmark(render(marked))[0] != text:
            return f"value {i}, {value!r}"
    return "its values"


def _check_count(given: Any, inp: TextTemplateInput, what: str) -> None:
    if not isinstance(given, list) or len(given) != len(inp.values):
        count = len(given) if isinstance(given, list) else repr(given)
        raise ValueError(f"{what} must be a list of {len(inp.values)}, one per value; got {count}")


def _check_keys(given: Any, keys: Sequence[str], what: str) -> None:
    missing = [key for key in keys if not isinstance(given, Mapping) or key not in given]
    if missing:
        raise ValueError(f"{what} must be a dict with a value for each key; missing {missing}")
