"""Docstrings of the public names: every section, every argument, and examples that run."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import captum_llm_ext
from captum_llm_ext import TextTokenInput, explain

OURS = {
    name: getattr(captum_llm_ext, name)
    for name in captum_llm_ext.__all__
    if getattr(captum_llm_ext, name).__module__.startswith("captum_llm_ext")
}
CLASSES = {name: kind for name, kind in OURS.items() if inspect.isclass(kind)}
# Inputs, layers and models: no method of a paper, and no tensor goes in or out.
NO_METHODS = {
    "Comparison",
    "aggregate",
    "compare",
    "BatchRecord",
    "BatchReport",
    "TextTemplateInput",
    "TextTokenInput",
    "Provenance",
    "batch",
    "chat_input",
    "compare_methods",
    "find_layers",
    "load_demo_model",
    "load_model",
    "qa_input",
    "read_batch",
    "segment_input",
}
# Their models would have to be somewhere; docs/tasks/large_models.md runs the first.
NOT_RUN = {"load_model", "qa_input"}
RESULTS = {name for name in CLASSES if name.endswith("Result")} | {"Aggregate"}

METHODS = {
    f"{name}.{method}": value
    for name, kind in CLASSES.items()
    for method, value in inspect.getmembers(kind)
    if not method.startswith("_")
    and callable(value)
    and value.__module__.startswith("captum_llm_ext")
}


def section(docstring: str, name: str) -> str:
    """The indented lines under a heading, "" where there is none."""
    found = re.search(rf"^{name}:\n((?:[ ]+.*\n|\n)+)", docstring + "\n", re.MULTILINE)
    return found[1] if found else ""


def parameters(function: Callable[..., Any]) -> list[str]:
    signature = inspect.signature(function).parameters
    stars: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    return [stars.get(p.kind, "") + name for name, p in signature.items() if name != "self"]


def documented(docstring: str) -> list[str]:
    arguments = inspect.cleandoc(section(docstring, "Args"))
    return re.findall(r"^(\*{0,2}\w+): ", arguments, re.MULTILINE)


@pytest.mark.parametrize("name", OURS)
def test_sections(name: str) -> None:
    docstring = inspect.getdoc(OURS[name]) or ""
    assert re.match(r"[A-Z].+[.:]$", docstring.splitlines()[0])
    assert sorted(documented(docstring)) == sorted(parameters(OURS[name]))
    assert section(docstring, "Raises")
    assert ">>> " in section(docstring, "Example")
    assert bool(section(docstring, "Returns")) == (name not in CLASSES)


@pytest.mark.parametrize("name", sorted(set(OURS) - NO_METHODS))
def test_shapes(name: str) -> None:
    """The shapes of what it takes and gives: of a wrapper, where `attribute` says it."""
    attribute = getattr(OURS[name], "attribute", None)
    docstrings = (inspect.getdoc(OURS[name]) or "") + (inspect.getdoc(attribute) or "")
    assert re.search(r"\((n_\w+|batch), ?(n_\w+|sequence|hidden)?", docstrings)


@pytest.mark.parametrize("name", sorted(set(OURS) - NO_METHODS - RESULTS))
def test_source(name: str) -> None:
    assert re.search(r"https?://|arXiv:\d", inspect.getdoc(OURS[name]) or "")


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    docstring = inspect.getdoc(METHODS[name]) or ""
    assert docstring
    if section(docstring, "Args"):
        assert documented(docstring) == parameters(METHODS[name])
    else:
        assert len(parameters(METHODS[name])) < 2 or "arguments are those of" in docstring
    if name.endswith("Attribution.attribute"):
        assert section(docstring, "Returns")
        assert section(docstring, "Raises")


@pytest.mark.real_model
@pytest.mark.parametrize("name", OURS)
def test_examples(name: str, demo_model: Any) -> None:
    model, tokenizer = demo_model
    inp = TextTokenInput("The capital of France is", tokenizer)
    known = {public: getattr(captum_llm_ext, public) for public in captum_llm_ext.__all__} | {
        "load_demo_model": lambda: demo_model,
        "model": model,
        "tokenizer": tokenizer,
        "inp": inp,
        "result": explain(model, tokenizer, inp, " Paris"),
    }
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for found in doctest.DocTestFinder().find(OURS[name], name, extraglobs=known):
        runner.run(found)
    assert runner.summarize(verbose=False) == (0, runner.tries)
    assert (name in NOT_RUN) == (runner.tries == 0)
