"""Several layers in one call, each as alone or all together; layers by name and pattern."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn

from tests.models.families import tiny_model
from tests.oracles.cases import (
    METHODS,
    STEPS,
    assert_close,
    captum_attribution,
    modules,
    our_attribution,
    prompt_input,
    target_ids,
)

# Few steps are enough to compare; that they do not converge is another file's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def joint_with_captum(model: nn.Module, layers: list[nn.Module], inp: Any, target: Tensor) -> Any:
    """Captum's method called directly with the list, a forward function for each target token."""
    columns = len(inp.values)
    per_target = []
    for t in range(len(target)):

        def score(ids: Tensor, t: int = t) -> Tensor:
            return model(ids).logits[:, -1].log_softmax(-1)[:, target[t]]

        ids = torch.cat([inp.inp_tensor, target[None, :t]], dim=1)
        start = torch.cat([torch.full_like(inp.inp_tensor, inp.baselines), target[None, :t]], dim=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Captum's advice about layers that feed each other
            method = LayerIntegratedGradients(score, layers)
        rows = method.attribute(ids, baselines=start, n_steps=STEPS)
        rows = [row[0] if isinstance(row, tuple) else row for row in rows]
        per_target.append(torch.stack([row[0, :columns].sum(-1) for row in rows]))
    return torch.stack(per_target, dim=1)


JOINT = {
    "projections": [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"],
    "embedding and mlp": ["model.embed_tokens", "model.layers.2.mlp"],
}


@pytest.mark.parametrize("names", JOINT.values(), ids=JOINT)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_joint_layers_equal_captum_called_with_the_list(family: str, names: list[str]) -> None:
    inp, target, model = prompt_input("baselines"), target_ids(3), tiny_model(family)
    layers = modules(model, *names)
    expected = joint_with_captum(model, layers, inp, target)
    result = our_attribution(
        LayerIntegratedGradients, model, layers, inp, target=target, layer_mode="joint"
    )
    assert list(result.layer_names) == names
    assert_close(result.layer_token_attr, expected)
    assert_close(result.token_attr, expected.sum(0))
    assert_close(result.seq_attr, expected.sum((0, 1)))


LISTED = [
    "model.embed_tokens",
    "model.layers.0.mlp",
    "model.layers.1",
    "model.layers.2.self_attn.v_proj",
]


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_independent_layers_equal_each_layer_alone(
    family: str, method: str, per_token: bool
) -> None:
    inp, target, model = prompt_input("skip_tokens"), target_ids(2), tiny_model(family)
    layers = modules(model, *LISTED)
    result = our_attribution(
        METHODS[method], model, layers, inp, target=target, include_per_token_attr=per_token
    )
    single = [
        captum_attribution(METHODS[method], model, layer, inp, target=target) for layer in layers
    ]
    assert list(result.layer_names) == LISTED
    assert len(result) == len(LISTED)
    for number, (name, expected) in enumerate(zip(LISTED, single, strict=True)):
        if method == "gradient_x_activation":
            assert expected.token_attr.abs().max() > 1e-4
        assert_close(result.layer_seq_attr[number], expected.seq_attr)
        assert_close(result[name].seq_attr, expected.seq_attr)
        if per_token:
            assert_close(result.layer_token_attr[number], expected.token_attr)
            assert_close(result[name].token_attr, expected.token_attr)
    assert_close(result.seq_attr, torch.stack([s.seq_attr for s in single]).mean(0))
    if per_token:
        assert_close(result.token_attr, torch.stack([s.token_attr for s in single]).mean(0))


def test_order_of_a_list_is_kept() -> None:
    inp, target, model = prompt_input(), target_ids(2), tiny_model("llama")
    names = LISTED[::-1]
    result = our_attribution(
        LayerGradientXActivation, model, modules(model, *names), inp, target=target
    )
    assert list(result.layer_names) == names
    last = captum_attribution(
        LayerGradientXActivation, model, model.model.embed_tokens, inp, target=target
    )
    assert_close(result.layer_token_attr[-1], last.token_attr)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("model.layers.1.mlp", ["model.layers.1.mlp"]),
        ("model.layers.*.mlp", [f"model.layers.{i}.mlp" for i in range(4)]),
        ("v_proj", [f"model.layers.{i}.self_attn.v_proj" for i in range(4)]),
        (
            ["model.embed_tokens", "model.layers.*.mlp"],
            ["model.embed_tokens", *(f"model.layers.{i}.mlp" for i in range(4))],
        ),
    ],
)
def test_layers_by_name_and_pattern(layer: Any, names: list[str]) -> None:
    inp, target, model = prompt_input(), target_ids(2), tiny_model("llama")
    result = our_attribution(LayerGradientXActivation, model, layer, inp, target=target)
    expected = [
        captum_attribution(LayerGradientXActivation, model, of, inp, target=target).token_attr
        for of in modules(model, *names)
    ]
    if len(names) == 1:
        assert_close(result.token_attr, expected[0])
        return
    assert list(result.layer_names) == names
    assert_close(result.layer_token_attr, torch.stack(expected))
