"""The picture of the curves, and what is refused."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from captum_llm_ext import (
    LayerSaliency,
    LLMGradientAttribution,
    TextTokenInput,
)
from captum_llm_ext.metrics import faithfulness
from tests.metrics.cases import (
    ATTRIBUTIONS,
    judged,
    result_of,
    tokens,
)
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import target_ids


def test_another_target_is_refused() -> None:
    result = result_of(tokens()[0], ATTRIBUTIONS[:5], target_ids(2))
    with pytest.raises(ValueError, match="pass the target that was attributed"):
        faithfulness(tiny_model("llama"), tiny_tokenizer(), result, target_ids(1))


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_plot_shows_both_curves_and_random_order(given: bool) -> None:
    found = judged(tiny_model("llama"), tokens()[0], ATTRIBUTIONS[:5], n_random=3)
    axes = plt.subplots()[1] if given else None
    figure, ax = found.plot(axes)
    assert axes is None or ax is axes
    lines = {line.get_label(): torch.tensor(line.get_ydata()) for line in ax.get_lines()}
    torch.testing.assert_close(lines["deletion"], found.curves.deletion[0])
    torch.testing.assert_close(lines["insertion, random order"], found.random.insertion.mean(0))
    plt.close(figure)


# --- errors --------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "target": ({"target": torch.tensor([9, 9])}, ValueError, "pass the target that was"),
    "shorter target": ({"target": target_ids(1)}, ValueError, "pass the target that was"),
    "input": ({"inp": TextTokenInput("Dave", tiny_tokenizer())}, ValueError, "2 features"),
    "kind of input": ({"inp": "Dave lives in"}, TypeError, "got str"),
    "no random": ({"n_random": 0}, ValueError, "n_random must be an int of at least 1"),
    "no steps": ({"n_steps": 0}, ValueError, "n_steps must be"),
    "no rows": ({"internal_batch_size": 0}, ValueError, "internal_batch_size must be"),
    "no fractions": ({"fractions": ()}, ValueError, "fractions must be"),
    "fraction": ({"fractions": (0.5, 1.5)}, ValueError, "fractions must be"),
    "score": ({"attr_target": "odds"}, ValueError, "attr_target must be one of"),
    "embedding baseline": ({"baselines": "mean"}, ValueError, "expected a baseline of tokens"),
    "contrast": ({"contrast_target": torch.tensor([1, 2, 3])}, ValueError, "contrast_target"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_what_was_expected(wrong: str) -> None:
    options, kind, message = WRONG[wrong]
    target = target_ids(2)
    result = result_of(tokens()[0], ATTRIBUTIONS[:5], target)
    given = {"target": target, **options}
    with pytest.raises(kind, match=message):
        faithfulness(tiny_model("llama"), tiny_tokenizer(), result, **given)


def test_a_result_must_know_its_input_and_have_numbers() -> None:
    model, target = tiny_model("llama"), target_ids(2)
    result = result_of(tokens()[0], [float("nan")] * 5, target)
    with pytest.raises(ValueError, match="not finite"):
        faithfulness(model, tiny_tokenizer(), result, target)
    result.inp = None
    with pytest.raises(ValueError, match="pass inp="):
        faithfulness(model, tiny_tokenizer(), result, target)


def test_generated_tokens_are_no_features() -> None:
    model, inp, target = tiny_model("llama"), tokens()[0], target_ids(2)
    method = LayerSaliency(model, model.get_input_embeddings())
    attribution = LLMGradientAttribution(method, tiny_tokenizer())
    result = attribution.attribute(inp, target, include_generated=True)
    with pytest.raises(ValueError, match="no attribution to generated tokens"):
        faithfulness(model, tiny_tokenizer(), result, target)
