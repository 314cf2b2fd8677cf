"""Requests that several test files make: prompts, targets, and both wrappers called alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

from captum_llm_ext import LLMGradientAttribution
from captum_llm_ext.gradients import forward_mode
from tests.models.families import PROMPT, tiny_tokenizer
from tests.oracles.gradients import Problem, gradient_x_activation, integrated_gradients

METHODS = {
    "integrated_gradients": captum.attr.LayerIntegratedGradients,
    "gradient_x_activation": captum.attr.LayerGradientXActivation,
}
STEPS = 3
SKIPPED = ["<s>", "Ġin"]
BASELINE = 5


def target_ids(count: int) -> Tensor:
    ids = tiny_tokenizer().encode(" plays golf, hiking with friends", add_special_tokens=False)
    return torch.tensor(ids[:count])


def prompt_input(kind: str = "default") -> captum.attr.TextTokenInput:
    forms: dict[str, dict[str, Any]] = {
        "default": {},
        "skip_tokens": {"skip_tokens": SKIPPED},
        "baselines": {"baselines": BASELINE},
    }
    settings = forms[kind]
    return captum.attr.TextTokenInput(PROMPT, tiny_tokenizer(), **settings)


def modules(model: nn.Module, *names: str) -> list[nn.Module]:
    return [model.get_submodule(name) for name in names]


def arguments(method: Any) -> dict[str, Any]:
    return {"n_steps": STEPS} if method is captum.attr.LayerIntegratedGradients else {}


def captum_attribution(
    method: Any, model: nn.Module, layer: Any, inp: Any, /, **kwargs: Any
) -> Any:
    wrapper = captum.attr.LLMGradientAttribution(
        method(model, layer), kwargs.pop("tokenizer", tiny_tokenizer())
    )
    return wrapper.attribute(inp, **{**arguments(method), **kwargs})


def our_attribution(
    method: Any,
    model: nn.Module,
    layer: Any,
    inp: Any,
    /,
    attr_target: str = "log_prob",
    tokenizer: Any = None,
    **kwargs: Any,
) -> Any:
    wrapper = LLMGradientAttribution(
        method(model, layer), tokenizer or tiny_tokenizer(), attr_target=attr_target
    )
    return wrapper.attribute(inp, **{**arguments(method), **kwargs})


@contextmanager
def differentiating(forward: bool) -> Iterator[None]:
    """Forward mode wherever it gives the attributions, or nowhere: the package chooses by cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_mode, "COST", 0.0 if forward else float("inf"))
        yield


def assert_close(ours: Tensor, reference: Tensor, tolerance: float = 1e-4) -> None:
    """max |ours - reference| <= tolerance · max |reference|, which must not itself be zero."""
    assert ours.shape == reference.shape
    largest = reference.abs().max().item()
    assert largest > 1e-4, "the reference is zero: this case tests nothing"
    assert (ours - reference).abs().max().item() <= tolerance * largest


def pairwise(factors: dict[str, Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Few combinations in which every pair of values of two factors still occurs (greedy)."""
    missing = {
        ((i, a), (j, b))
        for (i, first), (j, second) in combinations(enumerate(factors.values()), 2)
        for a, b in product(first, second)
    }
    rows = list(product(*factors.values()))
    while missing:
        best = max(rows, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(best)
        yield best


def in_pairs(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test over `pairwise` combinations: a grid that is there for breadth alone."""
    indices = pairwise({name: range(len(values)) for name, values in factors.items()})
    rows = [[values[i] for i, values in zip(row, factors.values(), strict=True)] for row in indices]
    return pytest.mark.parametrize(tuple(factors), rows)


def _pairs(row: tuple[Any, ...]) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    return set(combinations(enumerate(row), 2))


def problem(model: nn.Module, *names: str, inp: Any = None, count: int = 3, **more: Any) -> Problem:
    """The input's own baseline and the first `count` target tokens, unless `more` differs."""
    inp = inp or prompt_input()
    prompt = inp.inp_tensor[0]
    kept = torch.ones_like(prompt, dtype=torch.bool) if inp.itp_mask is None else inp.itp_mask[0]
    more.setdefault("baseline", torch.where(kept, inp.baselines, prompt))
    return Problem(model, modules(model, *names), prompt, target_ids(count), **more)


def prompt_columns(inp: Any, rows: Tensor) -> Tensor:
    """(T, width, hidden) → (T, n_input): sum over hidden, the input's own tokens alone."""
    columns = rows.sum(-1)[:, : inp.inp_tensor.shape[1]]
    return columns if inp.itp_mask is None else columns[:, inp.itp_mask[0]]


def formula(method: str, inp: Any, question: Problem) -> Tensor:
    if method == "integrated_gradients":
        return prompt_columns(inp, integrated_gradients(question, STEPS).attributions[0])
    return prompt_columns(inp, gradient_x_activation(question)[0])
