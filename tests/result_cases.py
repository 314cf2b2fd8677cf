"""Results of any content, for tests of how they are stored and shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from captum_llm_ext.result import LLMAttributionResult, LLMLayerAttributionResult

NORM = st.sampled_from([None, "l1", "l2", "linf"])
TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=6)  # lone surrogates too
FLOATS = st.floats(width=32)  # subnormal, infinite and not-a-number ones too


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    size = int(np.prod(shape))
    values = draw(st.lists(FLOATS, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


@st.composite
def single_results(draw: st.DrawFn) -> LLMAttributionResult:
    n_output, n_input = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rows = draw(st.sampled_from([1, n_output]))
    given = _optional(
        draw,
        token_attr=tensors(n_output, n_input),
        output_probs=tensors(n_output),
        convergence_delta=tensors(rows),
        hidden_attr=tensors(rows, n_input, 2),
        n_evaluations=st.integers(0, 10**6),
        converged=st.booleans(),
    )
    return LLMAttributionResult(
        **_tokens(draw, n_input, n_output),
        seq_attr=draw(tensors(n_input)),
        norm=draw(NORM),
        **given,
    )


@st.composite
def layered_results(draw: st.DrawFn) -> LLMLayerAttributionResult:
    n_output, n_input = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    names = draw(st.lists(TEXT, min_size=1, max_size=3, unique=True))
    mode, rows = (
        draw(st.sampled_from(["independent", "joint"])),
        draw(st.sampled_from([1, n_output])),
    )
    hidden = {name: tensors(rows, n_input, width) for width, name in enumerate(names, 1)}
    given = _optional(
        draw,
        layer_token_attr=tensors(len(names), n_output, n_input),
        output_probs=tensors(n_output),
        convergence_delta=tensors(*([len(names)] if mode == "independent" else []), rows),
        hidden_attr=st.fixed_dictionaries({}, optional=hidden),
        layer_n_evaluations=_each(st.integers(0, 10**6), names),
        layer_converged=_each(st.booleans(), names),
    )
    return LLMLayerAttributionResult(
        **_tokens(draw, n_input, n_output),
        layer_names=names,
        layer_mode=mode,
        layer_seq_attr=draw(tensors(len(names), n_input)),
        norm=draw(NORM),
        **given,
    )


def _each(values: st.SearchStrategy, names: list[str]) -> st.SearchStrategy:
    return st.lists(st.none() | values, min_size=len(names), max_size=len(names))


def _optional(draw: st.DrawFn, **strategies: st.SearchStrategy) -> dict[str, Any]:
    return {name: draw(st.none() | values) for name, values in strategies.items()}


def _tokens(draw: st.DrawFn, n_input: int, n_output: int) -> dict[str, list[str]]:
    return {
        "input_tokens": draw(st.lists(TEXT, min_size=n_input, max_size=n_input)),
        "output_tokens": draw(st.lists(TEXT, min_size=n_output, max_size=n_output)),
    }
