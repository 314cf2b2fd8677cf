"""Quantised models: perturbation by their own products, and a package without bitsandbytes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    ShapleyValues,
    TextTemplateInput,
)
from torch import Tensor, nn

from captum_llm_ext import LLMAttribution
from tests.models.families import tiny_tokenizer
from tests.models.quantized import (
    Pair,
    layout,
)
from tests.oracles.cases import (
    assert_close,
    prompt_input,
    target_ids,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:8-bit layers round"),
]


@torch.no_grad()
def direct_score(model: nn.Module, prompt: Tensor, target: Tensor) -> Tensor:
    """log p of the target's tokens, from one pass over this prompt alone."""
    logits = model(torch.cat([prompt, target[:-1]])[None]).logits[0, -len(target) :]
    return logits.float().log_softmax(-1)[torch.arange(len(target)), target]


def test_a_quantised_model_has_every_row() -> None:
    wrapper = LLMAttribution(FeatureAblation(Pair("nf4", ran=True).model), tiny_tokenizer())
    result = wrapper.attribute(prompt_input(), target=target_ids(2))
    assert result.token_attr.shape == (2, prompt_input().inp_tensor.size(1))
    assert result.seq_attr.abs().max() > 0


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4", "int8"])
def test_ablation_equals_direct_computation(kind: str) -> None:
    model, target = Pair(kind, ran=True).model, target_ids(3)
    result = LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(
        prompt_input(), target=target
    )
    prompt = prompt_input().inp_tensor[0]
    whole, rows = direct_score(model, prompt, target), []
    for i in range(len(prompt)):
        absent = prompt.clone()
        absent[i] = 0
        rows.append(whole - direct_score(model, absent, target))
    exact = kind == "int8"  # others are packed, in bfloat16, and round by the batch's shape
    assert_close(result.token_attr, torch.stack(rows, dim=1), 1e-6 if exact else 2e-2)


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_shapley_values_equal_direct_computation(kind: str) -> None:
    """φ_i is the mean over the orders of all features of what i adds to those before it."""
    model, target = Pair(kind, ran=True).model, target_ids(2)
    values, absent = ["Dave", "Palm"], ["friends", "Japan"]
    inp = TextTemplateInput("{} lives in {} and", values, baselines=absent)
    result = LLMAttribution(ShapleyValues(model), tiny_tokenizer()).attribute(inp, target=target)

    def score(first: bool, second: bool) -> Tensor:
        words = [values[0] if first else absent[0], values[1] if second else absent[1]]
        text = "{} lives in {} and".format(*words)
        return direct_score(model, torch.tensor(tiny_tokenizer().encode(text)), target)

    alone = [score(True, False) - score(False, False), score(False, True) - score(False, False)]
    last = [score(True, True) - score(False, True), score(True, True) - score(True, False)]
    expected = torch.stack([(a + b) / 2 for a, b in zip(alone, last, strict=True)], dim=1)
    assert_close(result.token_attr, expected, 1e-5 if kind == "int8" else 2e-2)


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_perturbation_does_not_replace_the_products(kind: str) -> None:
    model = Pair(kind, ran=True).model
    before = layout(model)
    LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(
        prompt_input(), target=target_ids(2)
    )
    assert layout(model) == before


# --- without bitsandbytes ------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None  # so that importing it fails
from tests.oracles.cases import our_attribution, prompt_input, target_ids
from tests.models.families import tiny_model
from captum_llm_ext import LayerSaliency
found = our_attribution(
    LayerSaliency, tiny_model("llama"), "model.layers.1", prompt_input(), target=target_ids(2)
)
print(tuple(found.token_attr.shape))
"""


def test_works_where_bitsandbytes_is_not_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    count = prompt_input().inp_tensor.size(1)
    assert done.stdout.strip() == f"(2, {count})", done.stderr[-500:]


def test_the_wrapper_never_imports_bitsandbytes() -> None:
    """Where no model has its layers, nobody pays for its import."""
    code = WITHOUT.replace('sys.modules["bitsandbytes"] = None', "pass") + (
        "\nprint('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1] == "False", done.stderr[-500:]
