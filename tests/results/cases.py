"""Results of any content, for tests of their storage and display."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from captum_llm_ext.results import LLMAttributionResult, LLMLayerAttributionResult
from captum_llm_ext.results.provenance import Provenance

NORM = st.sampled_from([None, "l1", "l2", "linf"])
TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=6)  # lone surrogates too
FLOATS = st.floats(width=32)  # also subnormal, infinite and not-a-number


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
PROVENANCE = st.builds(
    Provenance,
    method=st.none() | TEXT,
    options=st.dictionaries(TEXT, JSON_VALUES, max_size=2),
    baseline=JSON_VALUES,
    model=st.none() | TEXT,
    target_ids=st.none() | st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
    versions=st.dictionaries(TEXT, TEXT, max_size=2),
    evaluations=st.none() | st.integers(0, 10**6),
    seconds=st.none() | st.floats(0, 1e6),
)


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    size = int(np.prod(shape))
    values = draw(st.lists(FLOATS, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


@st.composite
def single_results(draw: st.DrawFn) -> LLMAttributionResult:
    n_output, n_input = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rows = draw(st.sampled_from([1, n_output]))
    optional = _optional(
        draw,
        token_attr=tensors(n_output, n_input),
        output_probs=tensors(n_output),
        convergence_delta=tensors(rows),
        hidden_attr=tensors(rows, n_input, 2),
        n_evaluations=st.integers(0, 10**6),
        converged=st.booleans(),
        output_labels=st.lists(TEXT, min_size=n_output, max_size=n_output),
        starts_prompt=st.booleans(),
        provenance=PROVENANCE,
        spread=tensors(n_input),
    )
    return LLMAttributionResult(
        **_tokens(draw, n_input, n_output),
        seq_attr=draw(tensors(n_input)),
        norm=draw(NORM),
        **optional,
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
    optional = _optional(
        draw,
        layer_token_attr=tensors(len(names), n_output, n_input),
        output_probs=tensors(n_output),
        convergence_delta=tensors(*([len(names)] if mode == "independent" else []), rows),
        hidden_attr=st.fixed_dictionaries({}, optional=hidden),
        layer_n_evaluations=_each(st.integers(0, 10**6), names),
        layer_converged=_each(st.booleans(), names),
        output_labels=st.lists(TEXT, min_size=n_output, max_size=n_output),
        starts_prompt=st.booleans(),
        provenance=PROVENANCE,
        spread=tensors(n_input),
    )
    return LLMLayerAttributionResult(
        **_tokens(draw, n_input, n_output),
        layer_names=names,
        layer_mode=mode,
        layer_seq_attr=draw(tensors(len(names), n_input)),
        norm=draw(NORM),
        **optional,
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


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "\"'><img src=x onerror=window.hacked=1>",
    "</div></style></script><script>window.hacked=1</script>",
    "<!--",
    "]]>",
    "&lt;",
    "{{script}}",
    "\u202eevil\u202c",
    "\u2066",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "x" * 10_000,
    "\n" * 10_000,
    " مر",
    "حبا",
    "日本",
    "ĠðŁ",
    "ĺ",
    "Ģ",
    "Ċ",
    "ĉ",
    "Ġ",
    "",
]


def random_values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Cubes of normal values: large and small values of both signs."""
    return torch.tensor(np.random.default_rng(seed).normal(size=shape) ** 3, dtype=torch.float32)


def result_of(input_tokens: list[str], output_tokens: list[str]) -> LLMAttributionResult:
    rows = random_values(len(output_tokens), len(input_tokens))
    return LLMAttributionResult(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        seq_attr=rows.sum(0),
        token_attr=rows,
    )


def layered_result_of(n_layers: int, n_input: int, n_output: int) -> LLMLayerAttributionResult:
    """Layers that differ by orders of magnitude."""
    sizes = 10.0 ** torch.linspace(0, 3, n_layers)
    rows = random_values(n_layers, n_output, n_input) * sizes[:, None, None]
    return LLMLayerAttributionResult(
        input_tokens=[f"Ġin{i}" for i in range(n_input)],
        output_tokens=[f"Ġout{i}" for i in range(n_output)],
        layer_names=[f"model.layers.{i}.mlp" for i in range(n_layers)],
        layer_seq_attr=rows.sum(1),
        layer_token_attr=rows,
    )
