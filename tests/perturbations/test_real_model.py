"""The small real model: the figures of Captum's right road, which its default gets wrong."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch

from captum_llm_ext import LLMAttribution
from tests.gradients.test_real_model import PROMPT
from tests.oracles.cases import assert_close
from tests.perturbations.cases import (
    ORACLE,
    ablation,
    filled_template,
    game,
    rows,
    template_input,
)

pytestmark = pytest.mark.real_model

TEMPLATE = "{} lives in {}, {} and is a {}. {} personal interests include"
VALUES = ["Dave", "Palm Coast", "FL", "lawyer", "His"]
TARGET = " playing golf, hiking"
RIGHT = [0.98, -0.08, 1.06, -0.71, 0.71]
CAPTUMS_DEFAULT = [-1.44, -1.16, 0.51, 0.06, 0.04]


def attribute(wrapper: Any, demo: Any, inp: Any, method: Any = None, **kwargs: Any) -> Any:
    model, tokenizer = demo
    method = method or captum.attr.FeatureAblation
    kwargs.setdefault("target", TARGET)
    return wrapper(method(model), tokenizer).attribute(inp, **kwargs)


def test_the_known_figures_of_five_values(demo_model: Any) -> None:
    """Dave, Palm Coast, FL, lawyer and His: signs flip between right and wrong."""
    model, tokenizer = demo_model
    inp = template_input(TEMPLATE, list(VALUES))
    assert inp.to_model_input() == PROMPT
    ids = torch.tensor(tokenizer.encode(TARGET, add_special_tokens=False))
    prompt_of = filled_template(TEMPLATE, VALUES, [""] * 5, tokenizer)
    truth = ablation(game(model, prompt_of, ids), 5)
    assert truth[0].tolist() == pytest.approx(RIGHT, abs=0.01)

    assert_close(rows(attribute(LLMAttribution, demo_model, inp)), truth)
    wrong = attribute(captum.attr.LLMAttribution, demo_model, inp)
    assert wrong.seq_attr.tolist() == pytest.approx(CAPTUMS_DEFAULT, abs=0.01)


def test_tokens_equal_captums(demo_model: Any) -> None:
    inp = captum.attr.TextTokenInput(PROMPT, demo_model[1])
    expected = attribute(captum.attr.LLMAttribution, demo_model, inp, **ORACLE)
    result = attribute(LLMAttribution, demo_model, inp)
    assert result.output_tokens == expected.output_tokens
    assert result.input_tokens == expected.input_tokens
    assert_close(rows(result), rows(expected))


@pytest.mark.parametrize("settings", [{}, {"internal_batch_size": 2}, {"reuse_prefix": False}])
def test_shapley_sampling_equals_captums(demo_model: Any, settings: dict[str, Any]) -> None:
    inp = template_input(TEMPLATE, list(VALUES), ["He", "Tokyo", "Japan", "cook", "books"])
    given = {"method": captum.attr.ShapleyValueSampling, "n_samples": 2, "target": " playing golf"}
    torch.manual_seed(0)
    expected = attribute(captum.attr.LLMAttribution, demo_model, inp, **given, **ORACLE)
    torch.manual_seed(0)
    result = attribute(LLMAttribution, demo_model, inp, **given, **settings)
    assert_close(rows(result), rows(expected))


@pytest.mark.parametrize(("country", "capital"), [("France", " Paris"), ("Japan", " Tokyo")])
def test_ablation_finds_the_country(demo_model: Any, country: str, capital: str) -> None:
    inp = template_input("{} {} of {} is", ["The", "capital", country])
    result = attribute(LLMAttribution, demo_model, inp, target=capital)
    assert result.input_tokens[int(result.seq_attr.argmax())] == country
