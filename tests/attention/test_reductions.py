"""Reductions of attention: rollout by its recurrence, value norms by the paper's definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from captum_llm_ext.attention.maps import rollouts
from captum_llm_ext.results.attention import OVER_LAYERS
from tests.attention.test_wrapper import COUNT, fed, near, read
from tests.models.families import FAMILIES, tiny_model
from tests.oracles.attention import (
    eager_weights,
    family_model,
    norms_by_hand,
    skip_before_its_first_version,
    weights_by_hand,
)
from tests.oracles.cases import pairwise, target_ids

VALUE_FAMILIES = ["llama", "gemma3", "gpt2", "gpt_neox", "phi3", "mistral"]


def test_rollout_worked_out_by_hand() -> None:
    """A = (W + 1) / 2; then A2 A1 row by row, e.g. 0.2 · (1, 0, 0) + 0.8 · (0.25, 0.75, 0)."""
    first = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
    second = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.5, 0.3, 0.2]])
    one, two = rollouts([first, second])
    torch.testing.assert_close(
        one, torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.1, 0.1, 0.8]])
    )
    torch.testing.assert_close(
        two, torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.3475, 0.1725, 0.48]])
    )


def test_rollout_of_rows_that_sinks_leave_short() -> None:
    """Rows sum to 1 again: (0.5 + 1) / 2 = 0.75 becomes 1; 0.125, 0.625 become 1/6, 5/6."""
    (rolled,) = rollouts([torch.tensor([[0.5, 0.0], [0.25, 0.25]])])
    torch.testing.assert_close(rolled, torch.tensor([[1.0, 0.0], [1 / 6, 5 / 6]]))


@pytest.mark.parametrize(
    ("family", "layers", "heads"),
    list(
        pairwise(
            {
                "family": ["llama", "gpt2"],
                "layers": [None, (0, 1), (2,)],
                "heads": [(0, 1, 2, 3), (3, 1)],
            }
        )
    ),
)
def test_rollout_of_a_model(family: str, layers: Any, heads: tuple[int, ...]) -> None:
    model = tiny_model(family)
    weights = eager_weights(model, fed()).double().numpy()[:, list(heads)].mean(1)
    rolled = np.eye(len(fed()))
    expected = []
    for layer in range(4) if layers is None else layers:
        step = 0.5 * weights[layer] + 0.5 * np.eye(len(fed()))
        rolled = np.matmul(step / step.sum(-1, keepdims=True), rolled)
        expected.append(torch.tensor(rolled[-COUNT:]).float())
    settings = {"layers": layers, "heads": heads, "reduction": "rollout"}
    result = read(model, **settings, include_generated=True)
    assert near(result.layer_token_attr[..., :-1], torch.stack(expected))
    assert near(result.token_attr[..., :-1], expected[-1])
    assert near(result.seq_attr[:-1], expected[-1].mean(0))
    torch.testing.assert_close(result.token_attr.sum(-1), torch.ones(COUNT))


@pytest.mark.parametrize("reduction", OVER_LAYERS)
def test_the_sequence_is_the_same_without_rows_per_token(reduction: str) -> None:
    """A maximum over layers is taken for each token, before the mean over tokens."""
    model = tiny_model("llama")
    rows = read(model, reduction=reduction)
    without = read(model, reduction=reduction, include_per_token_attr=False)
    assert near(without.seq_attr, rows.seq_attr)
    assert without.token_attr is None
    spans = [(0, 2), (2, 4)]
    assert near(without.merge(spans).seq_attr, rows.merge(spans).seq_attr)
    assert without.merge(spans).token_attr is None
    if reduction == "max":
        assert near(rows.seq_attr, eager_rows(model).amax((0, 1)).mean(0))


def eager_rows(model: Any) -> torch.Tensor:
    """The weights (n_layers, n_heads, n_output, n_input) of the rows that predict the target."""
    return eager_weights(model, fed())[:, :, -COUNT:, : len(fed()) + 1 - COUNT]


@pytest.mark.parametrize("family", VALUE_FAMILIES)
def test_value_norm_is_attention_times_the_norm_of_what_it_carries(family: str) -> None:
    """Fused projections, shared values and layers with a sliding window among them."""
    model = tiny_model(family)
    expected = torch.stack(
        [
            weights_by_hand(model, family, layer, fed())[:, -COUNT:]
            * norms_by_hand(model, family, layer, fed())[:, None]
            for layer in range(4)
        ]
    )
    result = read(model, reduction="value_norm", include_generated=True)
    assert near(result.layer_token_attr[..., :-1], expected.mean(1))
    assert near(result.token_attr[..., :-1], expected.mean((0, 1)))
    assert near(result.seq_attr[:-1], expected.mean((0, 1, 2)))
    assert near(result.attention, read(model, include_generated=True).attention)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "jamba", "bloom", "gptj", "gpt_neo"])
def test_value_norm_is_homogeneous_in_the_output_projection(family: str) -> None:
    """In the last layer nothing else depends on it; also for families without a formula here."""
    skip_before_its_first_version(family)
    model = FAMILIES[family]() if family in FAMILIES else family_model(family)
    before = read(model, reduction="value_norm").layer_token_attr[-1]
    names = ("o_proj", "out_proj", "dense", "c_proj", "attention.out_proj")
    last = model.get_submodule(read(model).layer_names[-1])
    projection = next(getattr(last, name) for name in names if hasattr(last, name))
    with torch.no_grad():
        projection.weight.mul_(3.0)
    after = read(model, reduction="value_norm").layer_token_attr[-1]
    torch.testing.assert_close(after, 3 * before)


@pytest.mark.parametrize("family", ["qwen3_next", "bitnet", "diffllama"])
def test_value_norm_is_refused_where_the_output_is_not_the_sum_of_values(family: str) -> None:
    skip_before_its_first_version(family)
    model = family_model(family)
    with pytest.raises(ValueError, match=r"'value_norm'.* not defined for .*Attention"):
        read(model, reduction="value_norm")
    assert read(model, reduction="rollout").token_attr.isfinite().all()


def test_value_norm_in_bfloat16() -> None:
    model = tiny_model("llama", fresh=True)
    expected = read(model, reduction="value_norm").token_attr
    low = read(model.to(torch.bfloat16), reduction="value_norm").token_attr
    assert (low - expected).abs().max() < 0.1 * expected.max()


def test_maximum_over_heads_and_layers() -> None:
    result = read(tiny_model("llama"), reduction="max")
    assert torch.equal(result.layer_token_attr, result.attention.amax(1))
    assert torch.equal(result.token_attr, result.attention.amax((0, 1)))
    assert near(result.seq_attr, result.token_attr.mean(0))
    assert len(result.output_tokens) == len(target_ids(COUNT))
