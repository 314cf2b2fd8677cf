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

from captum_llm_ext import TextTemplateInput, explain
from captum_llm_ext.attention.maps import REDUCTIONS, ByFeature, LayerAttention, Reduction
from captum_llm_ext.cli.entry import main
from captum_llm_ext.display.figures import label_style, open_figure
from captum_llm_ext.inputs.baselines import EMBEDDING_BASELINES
from captum_llm_ext.inputs.segments import template_of_spans
from captum_llm_ext.inputs.token_text import readable_tokens
from captum_llm_ext.perturbations.masked_prompts import MaskedPrompts
from captum_llm_ext.registry import GRADIENT, METHODS, PERTURBATION, Method
from captum_llm_ext.results.attention import OVER_LAYERS
from tests.contributed.random_halves import N_MASKS, RandomHalves
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
from tests.oracles.gradients import gradient_x_activation

ROOT = Path(__file__).parent.parent
BLOCK = "model.layers.1"


def test_every_place_it_names_is_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"`([\w./]+\.(?:py|md|cff|txt|toml)|[\w/]+/)`", page))
    assert len(names) > 15
    assert [name for name in names if not (ROOT / name).exists()] == []


ROWS = {
    "halved": Method("tests.contributed.halved_gradient:HalvedGradient", GRADIENT, "half of it"),
    "leave_one_out": Method(
        "tests.contributed.leave_one_out:LeaveOneOut", PERTURBATION, "without each feature"
    ),
    "random_halves": Method(
        "tests.contributed.random_halves:RandomHalves", PERTURBATION, "with and without each"
    ),
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in ROWS.items():
        monkeypatch.setitem(METHODS, name, method)


def explained(method: str, **options: Any) -> Any:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    return explain(model, tokenizer, PROMPT, target_ids(3), method=method, **options)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("method", ROWS)
def test_a_row_is_a_method_of_the_command_line(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    prompt = "Dave lives in Palm Coast and"
    assert main([prompt, "--target", " golf", "--model", str(tmp_path), "--method", method]) == 0
    assert "golf" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"{method}: {ROWS[method].help}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("rows")
def test_a_gradient_method_with_a_changed_backward() -> None:
    result = explained("halved", layers=BLOCK)
    expected = prompt_columns(
        prompt_input(), gradient_x_activation(problem(tiny_model("llama"), BLOCK))[0]
    )
    assert_close(result.token_attr, expected / 2)
    assert_close(explained("gradxact", layers=BLOCK).token_attr, expected)  # nothing is left of it


@pytest.mark.usefixtures("rows")
def test_a_perturbation_method_by_a_generator() -> None:
    result, expected = explained("leave_one_out"), explained("ablation")
    assert_close(result.token_attr, expected.token_attr)
    assert_close(result.seq_attr, expected.seq_attr)


@pytest.mark.usefixtures("rows")
def test_a_perturbation_method_of_captums_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve masks from a generator of its own are twelve prompts, each scored once."""
    prompts: list[Tensor] = []
    scores = MaskedPrompts.scores

    def counted(masked: MaskedPrompts, masks: Tensor) -> Tensor:
        prompts.extend(masks)
        return scores(masked, masks)

    monkeypatch.setattr(MaskedPrompts, "scores", counted)
    result = explained("random_halves", baselines=0)
    assert len(prompts) == len({tuple(p.tolist()) for p in prompts}) == N_MASKS
    model, method = tiny_model("llama"), RandomHalves(None)
    inp = prompt_input()

    def by_hand(mask: Tensor) -> Tensor:
        prompt = inp.to_model_input(mask)
        row = torch.cat([prompt[0], target_ids(3)])
        with torch.no_grad():
            log_p = model(row[None]).logits[0].log_softmax(-1)
        tokens = log_p[len(prompt[0]) - 1 : -1].gather(1, target_ids(3)[:, None])[:, 0]
        return torch.cat([tokens.sum()[None], tokens])[None]

    method.forward_func = by_hand
    expected = method.attribute(torch.ones(1, inp.n_itp_features))
    assert_close(result.seq_attr, expected[0])
    assert_close(result.token_attr, expected[1:])


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

    monkeypatch.setitem(REDUCTIONS, "min", Reduction(least))
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
