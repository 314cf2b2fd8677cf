"""Captum's Llama-2 tutorial (https://captum.ai/tutorials/Llama2_LLM_Attribution), written anew.

Each cell takes the module that the tutorial's one import line names. With this package every cell
runs as it stands, on the small real model; with `captum.attr` the cells that Captum can run give
the same numbers, once it is kept from its cache, which goes wrong with transformers 5.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import captum.attr
import matplotlib.pyplot as plt
import pytest
import torch

import captum_llm_ext
from tests.oracles.cases import assert_close
from tests.perturbations.cases import ORACLE

pytestmark = pytest.mark.real_model

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
TARGET = " playing golf, hiking"
SKIP = [1]  # the tutorial's id of <s>
BLANKS = "{} lives in {}, {} and is a {}. {} personal interests include"
NAMED = "{name} lives in {city}, {state} and is a {job}. {pronoun} personal interests include"
VALUES = ["Dave", "Palm Coast", "FL", "lawyer", "His"]
NAMES = ["name", "city", "state", "job", "pronoun"]
GROUPS = {"name": 0, "city": 1, "state": 1, "job": 2, "pronoun": 0}
REVIEWS = [
    "'The movie was ok, the actors weren't great' Negative",
    "'I loved it, it was an amazing story!' Positive",
    "'Total waste of time!!' Negative",
]
QUESTION = "Decide if this movie review is Positive or Negative: 'I really liked the Avengers!'"


def few_shot_prompt(*examples: str) -> str:
    given = [example for example in examples if example]
    start = "Here are some classified reviews:\n" + " \n".join(given) + "\n " if given else ""
    return f"[INST] {start}{QUESTION}[/INST]"


def ablation(package: ModuleType, model: Any, tokenizer: Any) -> Any:
    return package.LLMAttribution(package.FeatureAblation(model), tokenizer)


def shapley(package: ModuleType, model: Any, tokenizer: Any) -> Any:
    return package.LLMAttribution(package.ShapleyValues(model), tokenizer)


def gradients(package: ModuleType, model: Any, tokenizer: Any) -> Any:
    method = package.LayerIntegratedGradients(model, model.model.embed_tokens)
    return package.LLMGradientAttribution(method, tokenizer)


def tokens(package: ModuleType, tokenizer: Any) -> Any:
    return package.TextTokenInput(PROMPT, tokenizer, skip_tokens=SKIP)


def template(package: ModuleType, _: Any) -> Any:
    return package.TextTemplateInput(template=BLANKS, values=list(VALUES))


def with_baselines(package: ModuleType, _: Any) -> Any:
    others = ["Sarah", "Seattle", "WA", "doctor", "Her"]
    return package.TextTemplateInput(template=BLANKS, values=list(VALUES), baselines=others)


def with_product_baselines(package: ModuleType, _: Any) -> Any:
    baselines = package.ProductBaselines(
        {
            ("name", "pronoun"): [("Sarah", "her"), ("John", "His"), ("Rachel", "Her")],
            ("city", "state"): [("Seattle", "WA"), ("Boston", "MA")],
            "job": ["doctor", "engineer", "teacher", "technician", "plumber"],
        }
    )
    values = dict(zip(NAMES, VALUES, strict=True))
    return package.TextTemplateInput(NAMED, values=values, baselines=baselines, mask=GROUPS)


def prompt_function(package: ModuleType, _: Any) -> Any:
    return package.TextTemplateInput(few_shot_prompt, values=list(REVIEWS))


Part = Callable[..., Any]
# cell: (wrapper, input, how `attribute` is called, features)
CELLS: dict[str, tuple[Part, Part, dict[str, Any], int]] = {
    "tokens": (ablation, tokens, {"target": TARGET}, 17),
    "template": (ablation, template, {"target": TARGET}, 5),
    "baselines": (ablation, with_baselines, {"target": TARGET}, 5),
    "product": (ablation, with_product_baselines, {"target": TARGET, "num_trials": 3}, 5),
    "shapley": (shapley, with_product_baselines, {"target": TARGET, "num_trials": 3}, 5),
    "few-shot": (shapley, prompt_function, {"gen_args": {"max_new_tokens": 3}}, 3),
    "gradients": (gradients, tokens, {"target": " playing"}, 17),
}


def run(cell: str, package: ModuleType, demo: Any, **changed: Any) -> Any:
    wrapper, make, given, _ = CELLS[cell]
    inp = changed.pop("inp", None) or make(package, demo[1])
    return wrapper(package, *demo).attribute(inp, **{**given, **changed})


@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.mark.filterwarnings("ignore:integrated gradients")  # 50 steps miss: not the cell's concern
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_runs_with_the_import_line_changed(demo_model: Any, cell: str) -> None:
    result = run(cell, captum_llm_ext, demo_model, skip_tokens=SKIP)
    n_input = CELLS[cell][3]
    assert isinstance(result, captum.attr.LLMAttributionResult)
    assert result.seq_attr.shape == (n_input,)
    assert result.token_attr.shape == (len(result.output_tokens), n_input)
    assert_close(result.token_attr.sum(0), result.seq_attr)  # log p of a sequence is a sum
    result.plot_token_attr(show=True)
    result.plot_seq_attr(show=True)


@pytest.mark.parametrize("cell", ["tokens", "baselines"])
def test_a_cell_of_ablation_gives_captums_numbers(demo_model: Any, cell: str) -> None:
    expected = run(cell, captum.attr, demo_model, **ORACLE)
    result = run(cell, captum_llm_ext, demo_model)
    assert result.output_tokens == expected.output_tokens
    assert result.input_tokens == expected.input_tokens
    assert_close(result.token_attr, expected.token_attr)


@pytest.mark.parametrize(("cell", "num_trials"), [("product", 2), ("shapley", 1)])
def test_product_baselines_are_captums_of_each_draw(
    demo_model: Any, cell: str, num_trials: int
) -> None:
    """The mean of Captum's attributions with each draw held fixed: it draws at every prompt."""
    inp = with_product_baselines(captum.attr, None)
    draws = inp.baselines
    random.seed(0)
    trials = []
    for _ in range(num_trials):
        drawn = draws()
        inp.baselines = [drawn[name] for name in NAMES]
        fixed = run(cell, captum.attr, demo_model, inp=inp, num_trials=1, **ORACLE)
        trials.append(fixed.token_attr)
    random.seed(0)
    result = run(cell, captum_llm_ext, demo_model, num_trials=num_trials)
    assert_close(result.token_attr, torch.stack(trials).mean(0))


def test_the_gradient_cell_gives_captums_numbers(demo_model: Any) -> None:
    """Of fewer steps than its 50: Captum runs the model once for each step and target token."""
    few = {"n_steps": 2, "target": " playing golf"}
    expected = run("gradients", captum.attr, demo_model, **few)
    with pytest.warns(UserWarning, match="adaptive"):
        result = run("gradients", captum_llm_ext, demo_model, **few)
    assert_close(result.token_attr, expected.token_attr)


def test_skipped_tokens_are_left_out_of_the_target(demo_model: Any) -> None:
    """`attribute(skip_tokens=...)` is Captum 0.8's, and in its published tutorial."""
    comma = demo_model[1].encode(",")
    result = run("template", captum_llm_ext, demo_model, skip_tokens=[*comma, "Ġgolf"])
    assert result.output_tokens == ["playing", "hiking"]
