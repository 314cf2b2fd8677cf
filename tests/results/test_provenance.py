"""Results say where they come from, the same by every way to call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import captum
import pytest
import torch
import transformers

import captum_llm_ext
from captum_llm_ext import (
    LayerSaliency,
    LLMAttribution,
    LLMAttributionResult,
    LLMGradientAttribution,
    Provenance,
    TextTemplateInput,
    TextTokenInput,
    TwoStageAblation,
    explain,
)
from captum_llm_ext.registry import METHODS
from tests.models.families import tiny_model, tiny_tokenizer

TEXT, TARGET = "the cat", " on"
LAYER = "model.layers.0.mlp"

pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients have not converged")


@pytest.fixture(scope="module")
def pair():
    return tiny_model("llama"), tiny_tokenizer()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_says_its_name_its_target_and_its_score(pair, method):
    model, tokenizer = pair
    if method in ("lime", "kernelshap"):
        pytest.importorskip("sklearn")
    options = {"n_steps": 2} if "quadrature" in METHODS[method].renamed else {}
    prompt: Any = TEXT
    expected: Any = 0 if METHODS[method].takes_baselines else None
    if METHODS[method].wrapper == "perturbation":
        prompt = TextTemplateInput("{} {}", ["the", "cat"], baselines=["a", "b"])
        expected = ["a", "b"]
    known = explain(model, tokenizer, prompt, TARGET, method, **options).provenance
    assert known.method == method
    assert list(known.target_ids) == tokenizer.encode(TARGET, add_special_tokens=False)
    assert known.score == (None if METHODS[method].wrapper == "attention" else "log_prob")
    assert known.baseline == expected
    assert (known.model_class, known.dtype, known.quantization) == (
        "LlamaForCausalLM",
        "float32",
        None,
    )
    assert known.versions == {
        "captum_llm_ext": captum_llm_ext.__version__,
        "captum": captum.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert known.evaluations >= 1
    assert known.seconds > 0


def test_a_wrapper_and_explain_say_the_same_and_options_without_effect_are_left_out(pair):
    model, tokenizer = pair
    wrapper = LLMGradientAttribution(LayerSaliency(model, LAYER, norm="l2"), tokenizer, "logit")
    one = wrapper.attribute(TextTokenInput(TEXT, tokenizer), TARGET, include_per_token_attr=False)
    other = explain(
        model,
        tokenizer,
        TextTokenInput(TEXT, tokenizer),
        TARGET,
        layers=LAYER,
        method="saliency",
        norm="l2",
        attr_target="logit",
        include_per_token_attr=False,
        internal_batch_size=2,
        show_progress=False,
    )
    assert one.provenance == other.provenance
    assert one.provenance.options == {
        "layers": [LAYER],
        "norm": "l2",
        "include_per_token_attr": False,
    }


def test_evaluations_are_prompts_scored_or_path_points(pair):
    model, tokenizer = pair
    ig = explain(model, tokenizer, TEXT, TARGET, "ig", n_steps=7, baselines=["mean", 0])
    assert ig.provenance.evaluations == 14
    assert ig.provenance.baseline == ["mean", 0]
    inp = TextTemplateInput("{} {}", ["the", "cat"])
    ablation = explain(model, tokenizer, inp, TARGET, "ablation")
    assert ablation.provenance.evaluations == 3


def test_a_method_without_a_row_has_the_name_of_its_class(pair):
    class Ours(TwoStageAblation):
        pass

    model, tokenizer = pair
    wrapper = LLMAttribution(Ours(model), tokenizer)
    result = wrapper.attribute(TextTemplateInput("{} cat", ["the"]), TARGET)
    assert result.method == "Ours"


def test_seconds_and_provenance_do_not_count_when_results_are_compared(pair):
    known = Provenance(method="ig", seconds=1.0)
    assert known == replace(known, seconds=2.0)
    assert known != replace(known, method="saliency")
    one = LLMAttributionResult(
        input_tokens=["a"], output_tokens=["b"], seq_attr=[1.0], provenance=known
    )
    other = LLMAttributionResult(input_tokens=["a"], output_tokens=["b"], seq_attr=[1.0])
    assert one == other
    assert one.merge([(0, 1)]).provenance == known


def test_a_page_and_the_repr_say_it():
    known = Provenance("ig", {"n_steps": 50}, "<pad>", "log_prob", "small", seconds=1.5)
    result = LLMAttributionResult(
        input_tokens=["a"], output_tokens=["b"], seq_attr=[1.0], provenance=known
    )
    assert "ig, log_prob of small" in repr(result)
    page = result.to_html()
    assert "ig of log_prob, baseline &lt;pad&gt;, n_steps 50" in page
    assert "seconds 1.5" in page


@pytest.mark.parametrize(
    "fields",
    [{"method": 1}, {"target_ids": (1.5,)}, {"options": {"a": object()}}, {"seconds": True}],
)
def test_what_cannot_be_stored_is_refused(fields):
    with pytest.raises((TypeError, ValueError), match="expected"):
        Provenance(**fields)
