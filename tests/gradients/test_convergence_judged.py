"""Whether sums miss score differences is judged of each path, target and the sequence by itself."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captum.attr import LayerConductance, LayerIntegratedGradients
from torch import Tensor

from captum_llm_ext import LLMGradientAttribution, TextTemplateInput, explain
from tests.models.families import PROMPT, CausalToy, tiny_model, tiny_tokenizer
from tests.oracles.cases import differentiating, prompt_input, target_ids

SHORT = TextTemplateInput("{} lives in Palm Coast and", ["Dave"], baselines=["His"])


def attributed(model: Any, layer: Any, inp: Any = None, **options: Any) -> Any:
    """The result, and how often it was said not to have converged."""
    method = options.pop("kind", LayerIntegratedGradients)(model, layer)
    attr_target = options.pop("attr_target", "log_prob")
    attribution = LLMGradientAttribution(method, tiny_tokenizer(), attr_target=attr_target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = attribution.attribute(
            inp or prompt_input(), **{"target": target_ids(2), **options}
        )
    return result, sum("have not converged" in str(w.message) for w in caught)


def path_scores(model: Any, baseline: int, target: Tensor, product: bool) -> Tensor:
    """The sequence score at the baseline and at the input, by hand."""
    ids = torch.cat([prompt_input().inp_tensor[0], target[:-1]])
    absent = ids.clone()
    absent[: prompt_input().inp_tensor.size(1)] = baseline
    logits = model(torch.stack([absent, ids])).logits[:, -len(target) :].log_softmax(-1)
    scores = logits.gather(-1, target.expand(2, -1)[..., None])[..., 0].sum(1).detach()
    return scores.exp() if product else scores


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("baseline", [5, 25, 40])
def test_small_probabilities_have_a_difference_of_their_own(baseline: int, per_token: bool) -> None:
    """Of 10 tokens their product is far below any fixed floor."""
    model, target = tiny_model("llama"), target_ids(10)
    start, end = path_scores(model, baseline, target, product=True).tolist()
    assert max(start, end) < 1e-6
    options = {"attr_target": "prob", "target": target, "baselines": baseline}
    result, said = attributed(
        model, "model.embed_tokens", method="adaptive", include_per_token_attr=per_token, **options
    )
    missed = abs(float(result.seq_attr.sum()) - (end - start))
    if result.converged:
        assert missed <= 0.06 * max(abs(end - start), 1e-3 * max(start, end))
        assert said == 0
    else:
        assert said == 1
    assert attributed(model, "model.embed_tokens", n_steps=1, **options)[1] == 1


@pytest.mark.parametrize("n_steps", [30, 50, 80])
@pytest.mark.parametrize("baseline", [12, 16, 35, 41])
def test_the_sequence_is_judged_beside_its_tokens(baseline: int, n_steps: int) -> None:
    """Errors of tokens within 10 % of theirs can be more of their sum, where that cancels."""
    model, options = tiny_model("llama"), {"target": target_ids(4), "baselines": baseline}
    result, said = attributed(model, "model.embed_tokens", n_steps=n_steps, **options)
    delta = result.convergence_delta
    difference = result.token_attr.sum(1) - delta
    missed = [*(delta / difference).tolist(), float(delta.sum() / difference.sum())]
    assert said == (max(map(abs, missed)) > 0.10)


@pytest.mark.parametrize("kind", [LayerIntegratedGradients, LayerConductance])
def test_several_baselines_are_judged_one_by_one(kind: Any) -> None:
    """Errors of opposite sign cancel in their mean, and are errors all the same."""
    model, options = tiny_model("llama"), {"kind": kind, "include_per_token_attr": False}
    layer = "model.embed_tokens" if kind is LayerIntegratedGradients else "model.layers.1"
    runs = {b: attributed(model, layer, baselines=b, n_steps=6, **options) for b in (4, 29)}
    both, said = attributed(model, layer, baselines=[4, 29], n_steps=6, **options)
    assert said == max(one for _, one in runs.values()) == 1
    mean = torch.stack([result.seq_attr for result, _ in runs.values()]).mean(0)
    torch.testing.assert_close(both.seq_attr, mean)
    delta = torch.stack([result.convergence_delta for result, _ in runs.values()]).mean(0)
    torch.testing.assert_close(both.convergence_delta, delta)


@pytest.mark.parametrize("order", [["wte", "wpe"], ["wpe", "wte"]])
def test_a_joint_layer_that_sees_no_tokens_leaves_the_delta_alone(order: list[str]) -> None:
    model = tiny_model("gpt2")
    layers = [f"transformer.{name}" for name in order]
    joint, said = attributed(model, layers, layer_mode="joint", n_steps=200)
    alone, _ = attributed(model, "transformer.wte", n_steps=200)
    torch.testing.assert_close(joint.convergence_delta, alone.convergence_delta, atol=1e-4, rtol=0)
    assert said == 0


class Twice(CausalToy):
    """Its layer runs twice."""

    def forward(self, ids: Tensor) -> SimpleNamespace:
        hidden = 2 * self.embedding(ids)
        for _ in range(2):
            hidden = torch.tanh(2 * self.layer(self.mix(hidden)))
        return SimpleNamespace(logits=2 * self.head(self.mix(hidden)))


@pytest.mark.parametrize("forward", [True, False])
def test_a_layer_that_runs_twice_is_refused(forward: bool) -> None:
    inp = TextTemplateInput("{}", ["Dave lives"], baselines=["Dave golf"])
    with differentiating(forward), pytest.raises(ValueError, match="runs more than once"):
        attributed(Twice(), "layer", inp, target=target_ids(8))


@pytest.mark.parametrize("forward", [True, False])
def test_the_points_taken_are_those_of_the_path(forward: bool) -> None:
    model = tiny_model("llama")
    with differentiating(forward):
        result, _ = attributed(model, "model.embed_tokens", SHORT, target=target_ids(8), n_steps=9)
    assert result.n_evaluations == 9
    assert result.score_path.shape == (2, 9 + 3)  # both ends, and next to the start
    conductance, _ = attributed(model, "model.layers.1", kind=LayerConductance, n_steps=3)
    assert conductance.n_evaluations == 4


@pytest.mark.parametrize("n_steps", [3, None])
def test_the_progress_bar_ends_at_its_total(n_steps: int | None, capsys: Any) -> None:
    layers = ["model.layers.0.mlp", "model.layers.1.mlp"]
    model = tiny_model("llama")
    attributed(model, layers, kind=LayerConductance, n_steps=n_steps, show_progress=True)
    assert "100%" in capsys.readouterr().err


def test_a_leap_takes_none_of_the_budget_beyond_it() -> None:
    class Normalising(CausalToy):
        def mix(self, hidden: Tensor) -> Tensor:
            mixed = super().mix(hidden)
            return mixed / (mixed.norm(dim=-1, keepdim=True) + 1e-6)

    result, _ = attributed(
        Normalising(), "embedding", baselines="zero", method="adaptive", max_rows=24
    )
    assert result.n_evaluations == 24


def test_words_of_generated_features_stay_apart() -> None:
    result = explain(
        tiny_model("llama"), tiny_tokenizer(), PROMPT, target_ids(4), include_generated=True
    )
    words = result.merge("word").input_tokens
    given = tiny_tokenizer().decode(target_ids(4))
    assert "".join(words) == f"<s>{PROMPT}{given}"
    assert " and" in words
    assert " plays" in words
