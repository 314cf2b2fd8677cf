"""CONTRIBUTING.md, walked: one of each kind added where its table says and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import captum.attr
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_llm_ext import LLMGradientAttribution, TextTemplateInput, explain
from captum_llm_ext.attention.maps import LAYER_MAPS, ByFeature, LayerAttention
from captum_llm_ext.compat import GradientAttribution, LayerAttribution
from captum_llm_ext.display.figures import label_style, open_figure
from captum_llm_ext.explaining import GRADIENT_METHODS
from captum_llm_ext.gradients.methods import RULES, PointRule
from captum_llm_ext.inputs.baselines import EMBEDDING_BASELINES
from captum_llm_ext.inputs.segments import template_of_spans
from captum_llm_ext.inputs.token_text import readable_tokens
from captum_llm_ext.results.attention import OVER_LAYERS
from tests.models import families
from tests.models.families import PROMPT, tiny_model, tiny_tokenizer
from tests.oracles.cases import (
    assert_close,
    captum_attribution,
    our_attribution,
    problem,
    prompt_columns,
    prompt_input,
    target_ids,
)
from tests.oracles.gradients import gradients

ROOT = Path(__file__).parent.parent
BLOCK = "model.layers.1"


def test_every_place_it_names_is_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"`([\w./]+\.(?:py|md|cff|txt|toml)|[\w/]+/)`", page))
    assert len(names) > 15
    assert [name for name in names if not (ROOT / name).exists()] == []


class LayerGradient(LayerAttribution, GradientAttribution):
    """The gradient itself, with its sign."""

    def __init__(self, forward_func: Any, layer: Any) -> None:
        LayerAttribution.__init__(self, forward_func, layer)
        GradientAttribution.__init__(self, forward_func)


def test_a_gradient_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, LayerGradient, (lambda _: PointRule(norm="sum"), {}))
    monkeypatch.setattr(LLMGradientAttribution, "SUPPORTED_METHODS", tuple(RULES))  # as on import
    monkeypatch.setitem(GRADIENT_METHODS, "gradient", LayerGradient)
    model = tiny_model("llama")
    result = explain(
        model, tiny_tokenizer(), PROMPT, target_ids(3), method="gradient", layers=BLOCK
    )
    expected = prompt_columns(prompt_input(), gradients(problem(model, BLOCK))[0])
    assert result.token_attr is not None
    assert_close(result.token_attr, expected)


@pytest.mark.filterwarnings("ignore:integrated gradients")  # three steps
def test_a_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is a token's embedding equals that token as the baseline."""

    def seven(model: Any) -> Tensor:
        weight: Tensor = model.get_input_embeddings().weight[7]
        return weight

    monkeypatch.setitem(EMBEDDING_BASELINES, "seven", seven)
    request = (captum.attr.LayerIntegratedGradients, tiny_model("llama"), BLOCK, prompt_input())
    result = our_attribution(*request, target=target_ids(3), baselines="seven")
    expected = our_attribution(*request, target=target_ids(3), baselines=7)
    assert_close(result.token_attr, expected.token_attr)


def test_a_reduction_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def least(layers: Sequence[LayerAttention], by_feature: ByFeature) -> list[Tensor]:
        return [by_feature(layer.targets).amin(0) for layer in layers]

    monkeypatch.setitem(LAYER_MAPS, "min", least)
    monkeypatch.setitem(OVER_LAYERS, "min", lambda values: values.amin(0))
    request = {"method": "attention", "reduction": "min", "target": target_ids(3)}
    result: Any = explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, **request)
    assert_close(result.token_attr, result.attention.amin((0, 1)))


def quoted_input(text: str) -> TextTemplateInput:
    """A text whose features are what stands in quotation marks."""
    return template_of_spans(text, [match.span(1) for match in re.finditer(r'"([^"]+)"', text)])


@pytest.mark.filterwarnings("ignore:integrated gradients")  # of random weights
@pytest.mark.parametrize("method", ["saliency", "ig", "ablation", "shapley", "attention"])
def test_a_kind_of_input(method: str) -> None:
    inp = quoted_input('In "Palm Coast" Dave "plays"')
    result = explain(tiny_model("llama"), tiny_tokenizer(), inp, " golf", method=method)
    assert result.input_tokens == ["Palm Coast", "plays"]
    assert result.seq_attr.shape == (2,)
    assert bool(result.seq_attr.abs().min() > 0)


def draw_ranked(values: Any, tokens: Sequence[str], label: str, ax: Any = None) -> tuple[Any, Any]:
    """The largest values in order."""
    figure, ax = open_figure(ax, 4.0, 0.3 * len(tokens))
    order = np.argsort(np.abs(values))
    ax.barh(range(len(tokens)), np.asarray(values)[order])
    ax.set_yticks(range(len(tokens)), [readable_tokens(tokens)[i] for i in order], **label_style())
    ax.set_xlabel(label)
    return figure, ax


def test_a_plot() -> None:
    result = explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, " golf")
    drawn, ax = draw_ranked(result.seq_attr.numpy(), result.input_tokens, "L1 saliency")
    given, axes = plt.subplots()
    assert draw_ranked(result.seq_attr.numpy(), result.input_tokens, "", axes) == (given, axes)
    drawn.canvas.draw()
    assert len(ax.patches) == len(result.input_tokens)
    assert ax.patches[-1].get_width() == pytest.approx(float(result.seq_attr.max()))
    plt.close("all")


def test_a_model_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        families.FAMILIES, "olmo2", lambda: families._model("Olmo2", **families._GROUPED)
    )
    model: nn.Module = tiny_model("olmo2", fresh=True)
    layer = model.get_submodule(families.layer_names("olmo2")["block"])
    request = (captum.attr.LayerGradientXActivation, model, layer, prompt_input())
    expected = captum_attribution(*request, target=target_ids(3))
    result = our_attribution(*request, target=target_ids(3))
    assert_close(result.token_attr, expected.token_attr)
    blocks = explain(model, tiny_tokenizer(), PROMPT, " golf", layers="model.layers.?")
    assert torch.isfinite(blocks.seq_attr).all()
