"""The same numbers as Captum 0.9.0, or as the formula written out where Captum has none."""

from __future__ import annotations

import warnings
from typing import Any

import captum.attr
import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn

from tests.models.families import (
    FAMILIES,
    BidirectionalToy,
    CausalToy,
    MinimalTokenizer,
    layer_names,
    tiny_model,
)
from tests.oracles.cases import (
    BASELINE,
    METHODS,
    SKIPPED,
    STEPS,
    assert_close,
    captum_attribution,
    formula,
    our_attribution,
    pairwise,
    problem,
    prompt_input,
    target_ids,
)

# Few steps are enough to compare; that they do not converge is another file's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KINDS = ("embedding", "block", "attention_projection", "mlp", "final_norm")
GRID = list(
    pairwise(
        {
            "method": list(METHODS),
            "kind": KINDS,
            "count": (1, 2, 7),
            "inp": ("default", "skip_tokens", "baselines"),
        }
    )
)
# Captum fails here: Falcon's blocks return a tuple, and it adds into the output of its mlp.
CAPTUM_FAILS = {("falcon", "block"), ("falcon", "mlp")}
# A norm follows directly, so that scaling the output changes nothing: gradient · output is zero.
VANISHES = {
    ("qwen3", "attention_projection"),
    ("gemma3", "attention_projection"),
    ("gemma2", "mlp"),
    ("gemma3", "mlp"),
}


def reference(family: str, method: str, kind: str, inp: Any, target: Tensor) -> Tensor:
    model, name = tiny_model(family), layer_names(family)[kind]
    if (family, kind) in CAPTUM_FAILS:
        return formula(method, inp, problem(model, name, inp=inp, count=len(target)))
    layer = model.get_submodule(name)
    return captum_attribution(METHODS[method], model, layer, inp, target=target).token_attr


def test_the_grid_holds_every_pair_of_values() -> None:
    assert {(row[0], row[1]) for row in GRID} == {(m, k) for m in METHODS for k in KINDS}
    assert len({(row[1], row[2]) for row in GRID}) == 15
    assert len({(row[2], row[3]) for row in GRID}) == 9


@pytest.mark.parametrize(("method", "kind", "count", "form"), GRID)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_captum(family: str, method: str, kind: str, count: int, form: str) -> None:
    inp, target = prompt_input(form), target_ids(count)
    expected = reference(family, method, kind, inp, target)
    model = tiny_model(family)
    layer = model.get_submodule(layer_names(family)[kind])
    result = our_attribution(METHODS[method], model, layer, inp, target=target)

    assert result.input_tokens == inp.values
    assert isinstance(result, captum.attr.LLMAttributionResult)
    if method == "gradient_x_activation" and (family, kind) in VANISHES:
        assert max(result.token_attr.abs().max(), expected.abs().max()) < 1e-5
        return
    assert_close(result.token_attr, expected)
    assert (result.seq_attr - expected.sum(0)).abs().max() <= 1e-4 * count * expected.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["block", "mlp", "attention_projection"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3", "gemma2"])
def test_layer_input_equals_captum(family: str, kind: str, method: str) -> None:
    inp, target, model = prompt_input(), target_ids(2), tiny_model(family)
    layer = model.get_submodule(layer_names(family)[kind])
    both = {"target": target, "attribute_to_layer_input": True}
    expected = captum_attribution(METHODS[method], model, layer, inp, **both).token_attr
    assert_close(our_attribution(METHODS[method], model, layer, inp, **both).token_attr, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_module_whose_output_is_a_tuple(family: str, method: str) -> None:
    inp, target, model = prompt_input(), target_ids(2), tiny_model(family)
    name = layer_names(family)["attention"]
    expected = formula(method, inp, problem(model, name, inp=inp, count=len(target)))
    result = our_attribution(METHODS[method], model, model.get_submodule(name), inp, target=target)
    if expected.abs().max() < 1e-5:  # a norm follows directly, as in VANISHES
        assert result.token_attr.abs().max() < 1e-5
    else:
        assert_close(result.token_attr, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("toy", [CausalToy, BidirectionalToy])
def test_plain_module_and_minimal_tokenizer(toy: type[CausalToy], method: str) -> None:
    tokenizer = MinimalTokenizer()
    model = toy(len(tokenizer.words))
    inp = captum.attr.TextTokenInput("Dave lives in Palm Coast and", tokenizer)
    for layer in (model.embedding, model.layer):
        both = {"target": "plays golf, hiking", "tokenizer": tokenizer}
        expected = captum_attribution(METHODS[method], model, layer, inp, **both)
        result = our_attribution(METHODS[method], model, layer, inp, **both)
        assert_close(result.token_attr, expected.token_attr)
        assert result.output_tokens == expected.output_tokens


def test_string_target_and_generated_target_are_captums() -> None:
    inp, model = prompt_input(), tiny_model("llama")
    layer = model.get_submodule("model.layers.1.mlp")
    for request in ({"target": " plays golf"}, {"gen_args": {"max_new_tokens": 3}}, {}):
        if not request:
            request = {"gen_args": {"max_new_tokens": 2, "do_sample": False}}
        expected = captum_attribution(LayerGradientXActivation, model, layer, inp, **request)
        result = our_attribution(LayerGradientXActivation, model, layer, inp, **request)
        assert result.output_tokens == expected.output_tokens
        assert_close(result.token_attr, expected.token_attr)


@pytest.mark.parametrize(
    "rule",
    ["gausslegendre", "riemann_right", "riemann_left", "riemann_middle", "riemann_trapezoid"],
)
def test_every_integration_rule_of_captum(rule: str) -> None:
    inp, target, model = prompt_input(), target_ids(2), tiny_model("qwen2")
    layer = model.get_submodule("model.layers.1")
    both = {"target": target, "method": rule, "n_steps": 4}
    expected = captum_attribution(LayerIntegratedGradients, model, layer, inp, **both).token_attr
    result = our_attribution(LayerIntegratedGradients, model, layer, inp, **both)
    assert_close(result.token_attr, expected)


@pytest.mark.parametrize("method", METHODS)
def test_sequence_alone_equals_the_sequence_row(method: str) -> None:
    inp, target, model = prompt_input("skip_tokens"), target_ids(7), tiny_model("gpt2")
    for name in ("transformer.wte", "transformer.h.1"):
        layer = model.get_submodule(name)
        full = captum_attribution(METHODS[method], model, layer, inp, target=target)
        result = our_attribution(
            METHODS[method], model, layer, inp, target=target, include_per_token_attr=False
        )
        assert result.token_attr is None
        assert_close(result.seq_attr, full.seq_attr)


@pytest.mark.parametrize("internal_batch_size", [1, 2, 5, None])
def test_batch_size_changes_nothing(internal_batch_size: int | None) -> None:
    inp, target, model = prompt_input(), target_ids(2), tiny_model("mistral")
    layer = model.get_submodule("model.layers.1.mlp")
    expected = captum_attribution(
        LayerIntegratedGradients, model, layer, inp, target=target, n_steps=4
    )
    result = our_attribution(
        LayerIntegratedGradients,
        model,
        layer,
        inp,
        target=target,
        n_steps=4,
        internal_batch_size=internal_batch_size,
    )
    assert_close(result.token_attr, expected.token_attr)


def test_gradients_without_the_multiplier() -> None:
    inp, target, model = prompt_input(), target_ids(2), tiny_model("llama")
    layer = model.get_submodule("model.layers.1")

    def local(forward: nn.Module, of: nn.Module) -> LayerIntegratedGradients:
        return LayerIntegratedGradients(forward, of, multiply_by_inputs=False)

    expected = captum_attribution(local, model, layer, inp, target=target, n_steps=STEPS)
    result = our_attribution(local, model, layer, inp, target=target, n_steps=STEPS)
    assert_close(result.token_attr, expected.token_attr)


def test_skipped_tokens_have_no_column() -> None:
    inp, model = prompt_input("skip_tokens"), tiny_model("llama")
    result = our_attribution(
        LayerGradientXActivation, model, model.model.embed_tokens, inp, target=target_ids(2)
    )
    assert result.token_attr.shape == (2, inp.inp_tensor.shape[1] - len(SKIPPED))
    assert inp.baselines != BASELINE
    assert not set(SKIPPED) & set(result.input_tokens)


@pytest.mark.parametrize("method", METHODS)
def test_input_given_by_keyword_equals_the_output_before_it(method: str) -> None:
    """`self_attn` is called with keywords; what it reads is what the norm before it puts out."""
    inp, target, model = prompt_input(), target_ids(2), tiny_model("llama")
    block = model.get_submodule("model.layers.1")
    before = captum_attribution(METHODS[method], model, block.input_layernorm, inp, target=target)
    result = our_attribution(
        METHODS[method], model, block.self_attn, inp, target=target, attribute_to_layer_input=True
    )
    assert_close(result.token_attr, before.token_attr)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_rounding_is_not_taken_for_a_sight_of_later_tokens(family: str, dtype: torch.dtype) -> None:
    """A half precision model is as causal as a float32 one, and gives much the same numbers."""
    inp, target = prompt_input(), target_ids(3)
    model, exact = tiny_model(family, fresh=True).to(dtype), tiny_model(family)
    name = layer_names(family)["block"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*causal")
        result = our_attribution(LayerGradientXActivation, model, name, inp, target=target)
    layer = exact.get_submodule(name)
    expected = captum_attribution(LayerGradientXActivation, exact, layer, inp, target=target)
    both = torch.stack([result.token_attr.float().flatten(), expected.token_attr.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
