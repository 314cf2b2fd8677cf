"""Template inputs: checks, drawn baselines, and the span of each value in the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

from captum_llm_ext.compat import CaptumTextTemplateInput, InterpretableInput

# Marks around values are code points of Unicode's supplementary private use areas.
FIRST_MARK, N_MARKS = 0xF0000, 0x20000


class TextTemplateInput(CaptumTextTemplateInput):
    """A template whose values are the features; Captum's class, with checked arguments.

    Args:
        template: a format string, or a function of the values that gives the text.
        values: a list of str, or a dict for named fields.
        baselines: what stands for each absent value, of the same form as the values; or a function
            that draws them. Default: empty strings.
        mask: an id per value, of the same form; values of one id are one feature.

    Raises:
        ValueError: baselines or mask that do not fit the values.

    Example:
        >>> inp = TextTemplateInput("{} lives in {}", ["Dave", "Palm Coast"])
        >>> inp.to_model_input()
        'Dave lives in Palm Coast'
    """

    def __init__(self, template: Any, values: Any, baselines: Any = None, mask: Any = None) -> None:
        if not isinstance(values, list | dict):
            raise ValueError(f"values must be a list or a dict, got {type(values).__name__}")
        for name, argument in (("baselines", baselines), ("mask", mask)):
            if argument is not None and not callable(argument):
                _check_form(name, argument, values)
        super().__init__(template, values, baselines, mask)


def with_drawn_baselines(inp: InterpretableInput) -> InterpretableInput:
    """The input with its callable baseline drawn once, so that all perturbations share it."""
    if not (isinstance(inp, CaptumTextTemplateInput) and callable(inp.baselines)):
        return inp
    baselines: Any = inp.baselines()
    if inp.dict_keys:
        _check_keys("baselines", baselines, inp.dict_keys)
        baselines = [baselines[key] for key in inp.dict_keys]
    _check_baselines(baselines, inp)
    drawn = copy(inp)
    drawn.baselines = baselines
    return drawn


def check_template(inp: CaptumTextTemplateInput) -> None:
    """Refuse baselines, a mask or a template that do not fit the values."""
    _check_strings("value", inp.values)
    if not callable(inp.baselines):
        _check_baselines(inp.baselines, inp)
    if inp.mask is not None:
        _check_count("mask", inp.mask, inp)
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
    """The text that `render` makes of the values, and the span of each in it, in characters.

    A second rendering, with a mark on each side of every value, shows the spans. An empty value
    has no mark, since a template may leave out what is empty, and its span is empty.

    Raises:
        ValueError: a value comes twice, not at all, or changed; the message names it.
    """
    text = render(list(values))
    first = _first_mark(text, 2 * len(values))
    marked = render([_marked(i, value, first) for i, value in enumerate(values)])
    clean, marks = _unmark(marked, first, 2 * len(values))
    spans: list[tuple[int, int]] = []
    for i, value in enumerate(values):
        starts, stops = marks.get(2 * i, []), marks.get(2 * i + 1, [])
        if value and not (len(starts) == len(stops) == 1):
            problem = "leaves out" if not starts else "uses more than once"
            raise ValueError(f"the template {problem} value {i}, {value!r}")
        spans.append((starts[0], stops[0]) if value else (0, 0))
        if value and clean[slice(*spans[-1])] != value:
            raise ValueError(f"the template changes value {i}, {value!r}")
    if clean != text:
        raise ValueError(f"the template changes {_sensitive_value(render, values, text, first)}")
    return text, spans


def render_template(inp: CaptumTextTemplateInput) -> Callable[[list[str]], str]:
    """The template as a function of the values in their order."""

    def render(values: list[str]) -> str:
        if inp.dict_keys:
            return inp.format_fn(**dict(zip(inp.dict_keys, values, strict=True)))
        return inp.format_fn(*values)

    return render


def _first_mark(text: str, count: int) -> int:
    """The first of `count` successive code points that the text does not contain."""
    used = sorted(ord(c) for c in set(text) if FIRST_MARK <= ord(c) < FIRST_MARK + N_MARKS)
    first = FIRST_MARK
    for code in used:
        if code - first >= count:
            break
        first = code + 1
    if first + count > FIRST_MARK + N_MARKS:
        raise ValueError("the text uses up the private characters that mark its values")
    return first


def _marked(i: int, value: str, first: int) -> str:
    return f"{chr(first + 2 * i)}{value}{chr(first + 2 * i + 1)}" if value else value


def _unmark(text: str, first: int, count: int) -> tuple[str, dict[int, list[int]]]:
    """The text without marks, and the positions of each mark in it."""
    clean: list[str] = []
    marks: dict[int, list[int]] = {}
    for character in text:
        mark = ord(character) - first
        if 0 <= mark < count:
            marks.setdefault(mark, []).append(len(clean))
        else:
            clean.append(character)
    return "".join(clean), marks


def _sensitive_value(
    render: Callable[[list[str]], str], values: Sequence[str], text: str, first: int
) -> str:
    """The value that the template renders differently with marks around it."""
    for i, value in enumerate(values):
        marked = [_marked(i, v, first) if i == j else v for j, v in enumerate(values)]
        if _unmark(render(marked), first, 2 * len(values))[0] != text:
            return f"value {i}, {value!r}"
    return "its values"


def _check_baselines(baselines: Any, inp: CaptumTextTemplateInput) -> None:
    _check_count("baselines", baselines, inp)
    _check_strings("baseline", baselines)


def _check_count(name: str, argument: Any, inp: CaptumTextTemplateInput) -> None:
    if not isinstance(argument, list) or len(argument) != len(inp.values):
        count = len(argument) if isinstance(argument, list) else repr(argument)
        raise ValueError(f"{name} must be a list of {len(inp.values)}, one per value; got {count}")


def _check_form(name: str, argument: Any, values: list[str] | dict[str, str]) -> None:
    if isinstance(values, dict):
        _check_keys(name, argument, list(values))
    elif not isinstance(argument, list):
        raise ValueError(f"{name} must be a list, since the values are a list; got {argument!r}")
    elif len(argument) != len(values):
        raise ValueError(
            f"{name} must be a list of {len(values)}, one per value; "
            f"got {len(argument)}: {argument!r}"
        )


def _check_keys(name: str, argument: Any, keys: Sequence[str]) -> None:
    missing = [key for key in keys if not isinstance(argument, Mapping) or key not in argument]
    if missing:
        raise ValueError(f"{name} must be a dict with a value for each key; missing {missing}")


def _check_strings(name: str, items: Sequence[Any]) -> None:
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise ValueError(f"{name} {i} of the template must be a str, got {item!r}")
