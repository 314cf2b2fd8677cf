"""Tiny models with layers of bitsandbytes: every kind, method and state, against decoded weights.

The reference is the formula written out (tests/oracles/gradients.py) or our own class, which other
tests compare with Captum, on a float32 copy whose weights are decoded by hand from stored bytes.
"""

from __future__ import annotations

import gc
import warnings
from functools import cache
from itertools import count, product
from typing import Any

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    TextTemplateInput,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from captum_llm_ext import LayerSaliency, LLMAttribution
from tests.models.families import PROMPT, tiny_tokenizer
from tests.models.quantized import (
    KINDS,
    LOW_PRECISION_KINDS,
    Pair,
    bnb,
    is_packed,
    layout,
    quantized,
    stored_weights,
    tiny_float_model,
    with_weights,
)
from tests.oracles.cases import (
    STEPS,
    assert_close,
    differentiating,
    in_pairs,
    our_attribution,
    problem,
    prompt_columns,
    prompt_input,
    target_ids,
)
from tests.oracles.gradients import gradient_x_activation, gradients, integrated_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:8-bit layers round"),
    pytest.mark.filterwarnings("ignore:integrated gradients have not converged"),
    pytest.mark.filterwarnings("ignore:a path at the embeddings"),
    pytest.mark.filterwarnings("ignore:Multiple layers provided"),
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks"),
]

LAYERS = {
    "embedding": "model.embed_tokens",
    "block": "model.layers.1",
    "projection": "model.layers.1.self_attn.q_proj",
    "mlp": "model.layers.1.mlp",
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "saliency": (LayerSaliency, {}),
    "gradient_x_activation": (LayerGradientXActivation, {}),
    "integrated_gradients": (LayerIntegratedGradients, {"n_steps": STEPS}),
}


@cache
def shared_pair(kind: str, ran: bool) -> Pair:
    """Only for tests that leave the models as they were."""
    return Pair(kind, ran)


def attribute(model: nn.Module, method: str, layers: Any, **options: Any) -> Any:
    kind, defaults = METHODS[method]
    options = {"target": target_ids(3), **defaults, **options}
    return our_attribution(kind, model, layers, prompt_input(), **options)


def by_formula(method: str, model: nn.Module, layer: str) -> Tensor:
    question = problem(model, layer)
    if method == "saliency":
        rows = gradients(question)[0].abs().sum(-1)
        return rows[:, : len(question.prompt)]
    if method == "gradient_x_activation":
        return prompt_columns(prompt_input(), gradient_x_activation(question)[0])
    return prompt_columns(prompt_input(), integrated_gradients(question, STEPS).attributions[0])


def test_saliency_of_an_nf4_model_equals_the_formula_on_its_float_copy() -> None:
    pair = Pair("nf4", ran=False)
    result = attribute(pair.model, "saliency", LAYERS["embedding"])
    expected = by_formula("saliency", pair.reference, LAYERS["embedding"])
    assert_close(result.token_attr, expected, 1e-3)


# --- the weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])
def test_weights_decoded_by_hand_are_those_of_bitsandbytes(kind: str) -> None:
    """The reference of these tests is right, before and after packing."""
    model = quantized(tiny_float_model(), kind)
    weights = stored_weights(model)
    for name, weight in weights.items():
        packed = model.get_submodule(name).weight
        truth = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float()
        torch.testing.assert_close(weight, truth, rtol=1e-6, atol=1e-7)
    assert len(weights) == 4 * 7


def test_quantisation_is_coarse_but_near() -> None:
    """A test that compared with the unquantised weights would fail."""
    model = tiny_float_model()
    for kind in KINDS:
        for name, weight in stored_weights(quantized(model, kind)).items():
            difference = (weight - model.get_submodule(name).weight).norm()
            assert 1e-3 < difference / weight.norm() < 0.3


# --- gradients -----------------------------------------------------------------------------------


@in_pairs(kind=list(KINDS), ran=[False, True], method=list(METHODS), layer=list(LAYERS))
def test_equals_the_formula_on_the_float_copy(
    kind: str, ran: bool, method: str, layer: str
) -> None:
    pair, name = shared_pair(kind, ran), LAYERS[layer]
    result = attribute(pair.model, method, name)
    assert_close(result.token_attr, by_formula(method, pair.reference, name), 1e-3)


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_in_one_call_equal_each_alone(kind: str, method: str) -> None:
    model = Pair(kind, ran=True).model
    together = attribute(model, method, list(LAYERS.values()))
    for layer in LAYERS.values():
        alone = attribute(model, method, layer)
        assert_close(together[layer].token_attr, alone.token_attr)


OPTIONS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adaptive": (
        LayerIntegratedGradients,
        "embedding",
        {"method": "adaptive", "tol": 0.05, "n_steps": None},
    ),
    "forward mode": (LayerIntegratedGradients, "block", {"n_steps": 3}),
    "joint": (
        LayerIntegratedGradients,
        ["projection", "mlp"],
        {"layer_mode": "joint", "n_steps": 3},
    ),
    "gradient shap": (LayerGradientShap, "block", {"n_samples": 3, "stdevs": 0.1}),
    "input of the projection": (
        LayerGradientXActivation,
        "projection",
        {"attribute_to_layer_input": True},
    ),
    "mean baseline": (LayerIntegratedGradients, "mlp", {"baselines": "mean", "n_steps": 3}),
    "nearest baseline": (LayerIntegratedGradients, "mlp", {"baselines": "nearest", "n_steps": 3}),
    "generated": (LayerIntegratedGradients, "mlp", {"include_generated": True, "n_steps": 3}),
    "hidden": (LayerSaliency, "projection", {"include_hidden_attr": True}),
    "sequence alone": (LayerSaliency, "projection", {"include_per_token_attr": False}),
    "contrast": (LayerGradientXActivation, "block", {"contrast_target": target_ids(4)[-3:]}),
    "logit": (LayerGradientXActivation, "block", {"attr_target": "logit"}),
    "small batches": (LayerIntegratedGradients, "block", {"n_steps": 3, "internal_batch_size": 1}),
}


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_the_float_copy(option: str, kind: str) -> None:
    method, layer, options = OPTIONS[option]
    names = [LAYERS[x] for x in layer] if isinstance(layer, list) else LAYERS[layer]
    pair = Pair(kind, ran=True)
    options = {"target": target_ids(3), **options}
    if option == "forward mode":  # no formula for forward mode is in sdpa on a CPU
        for model in (pair.model, pair.reference):
            model.set_attn_implementation("eager")
    with differentiating(forward=option == "forward mode"):
        torch.manual_seed(0)
        result = our_attribution(method, pair.model, names, prompt_input(), **options)
        torch.manual_seed(0)
        expected = our_attribution(method, pair.reference, names, prompt_input(), **options)
    assert_close(result.seq_attr, expected.seq_attr, 2e-3)
    if expected.token_attr is not None:
        assert_close(result.token_attr, expected.token_attr, 2e-3)
    if expected.convergence_delta is not None:
        torch.testing.assert_close(
            result.convergence_delta, expected.convergence_delta, rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_fixed_prefix_comes_from_the_cache(kind: str) -> None:
    pair = Pair(kind, ran=True)
    inp = TextTemplateInput(f"{PROMPT} {PROMPT} {{}} in {{}}", ["golf", "Paris"])
    both = {"target": target_ids(2), "n_steps": 3, "baselines": "pad"}
    result = our_attribution(LayerIntegratedGradients, pair.model, LAYERS["mlp"], inp, **both)
    plain = our_attribution(
        LayerIntegratedGradients, pair.reference, LAYERS["mlp"], inp, reuse_prefix=False, **both
    )
    assert_close(result.token_attr, plain.token_attr, 1e-3)


@in_pairs(
    kind=["nf4 double", "int8"],
    family=["Llama", "OPT", "GPTNeoX", "Mistral"],
    ran=[False, True],
)
def test_families(kind: str, family: str, ran: bool) -> None:
    """OPT feeds its linear layers rows without a batch."""
    pair = Pair(kind, ran, family)
    for method in ("saliency", "integrated_gradients"):
        embedding = pair.model.get_input_embeddings()
        result = attribute(pair.model, method, embedding)
        name = next(n for n, m in pair.model.named_modules() if m is embedding)
        assert_close(result.token_attr, by_formula(method, pair.reference, name), 1e-3)


def least_cosine(model: nn.Module, reference: nn.Module) -> float:
    """Over saliency and gradient × activation at all layers."""
    cosines = []
    for method, layer in product(("saliency", "gradient_x_activation"), LAYERS.values()):
        result = attribute(model, method, layer).token_attr
        expected = attribute(reference, method, layer).token_attr
        assert result.dtype == torch.float32
        cosines.append(float(cosine_similarity(result.flatten(), expected.flatten(), dim=0)))
    return min(cosines)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", LOW_PRECISION_KINDS)
def test_products_in_16_bits_are_near(kind: str, ran: bool) -> None:
    pair = Pair(kind, ran)
    assert least_cosine(pair.model, pair.reference) > 0.99


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 0.95), (torch.float16, 0.99)])
@pytest.mark.parametrize("kind", ["nf4 double", "nf4 of the input's dtype", "int8"])
def test_16_bit_models_are_near(kind: str, dtype: torch.dtype, bar: float) -> None:
    model = quantized(tiny_float_model().to(dtype), kind)
    reference = with_weights(tiny_float_model(), stored_weights(model), model)
    assert least_cosine(model, reference) > bar


def test_8_bit_layers_for_training_keep_their_gradients() -> None:
    """With `has_fp16_weights` the weights are floats, and quantised in every pass."""
    model = tiny_float_model()
    reference = tiny_float_model()
    for block in model.model.layers:
        linear = block.mlp.down_proj
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False)
        layer.load_state_dict(linear.state_dict())
        block.mlp.down_proj = layer.requires_grad_(False)
    model.eval()
    assert least_cosine(model, reference) > 0.99


def test_layers_that_were_never_moved_are_refused() -> None:
    model = tiny_float_model()
    linear = model.model.layers[0].mlp.down_proj
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False)
    model.model.layers[0].mlp.down_proj = layer
    with pytest.raises(ValueError, match="Linear4bit is not quantised yet: move the model"):
        attribute(model, "saliency", LAYERS["embedding"])


# --- the model is as before ----------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    logits: Tensor = model(prompt_input().inp_tensor).logits
    return logits


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_leave_the_model_as_before(kind: str, ran: bool) -> None:
    """Packed models stay packed, others stay unpacked, and nothing else changes either."""
    model = shared_pair(kind, ran).model
    before, packed = layout(model), is_packed(model)
    for method in METHODS:
        attribute(model, method, list(LAYERS.values()))
    assert layout(model) == before
    assert is_packed(model) == packed


@pytest.mark.parametrize("kind", KINDS)
def test_logits_after_are_those_before(kind: str) -> None:
    model = quantized(tiny_float_model(), kind)
    before = logits_of(model)
    for method in METHODS:
        attribute(model, method, list(LAYERS.values()))
    assert torch.equal(logits_of(model), before)
    never_ran = quantized(tiny_float_model(), kind)
    attribute(never_ran, "saliency", LAYERS["block"])
    assert torch.equal(logits_of(never_ran), before)


@in_pairs(kind=["nf4 double", "int8"], call=range(1, 9), error=[RuntimeError, KeyboardInterrupt])
def test_after_an_exception(kind: str, call: int, error: type[BaseException]) -> None:
    model = Pair(kind, ran=True).model
    calls = count(1)

    def stop(*_: Any) -> None:
        if next(calls) == call:
            raise error("stopped by the test")

    model.model.norm.register_forward_hook(stop)
    before = layout(model)
    with pytest.raises(error, match="stopped by the test"):
        attribute(model, "integrated_gradients", LAYERS["block"], n_steps=4, internal_batch_size=1)
    assert layout(model) == before


def test_a_forward_that_the_owner_set_is_put_back() -> None:
    model = Pair("nf4", ran=False).model
    layer = model.get_submodule(LAYERS["projection"])
    inner = layer.forward
    layer.forward = wrapped = lambda x: inner(x)
    attribute(model, "saliency", LAYERS["block"])
    assert vars(layer)["forward"] is wrapped


def test_trainable_biases_stay_trainable() -> None:
    model = Pair("nf4", ran=False).model
    bias = model.get_submodule(LAYERS["projection"]).bias.requires_grad_()
    attribute(model, "saliency", LAYERS["block"])
    assert bias.requires_grad
    assert bias.grad is None


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_repeated_calls_keep_no_tensors(kind: str) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    model = Pair(kind, ran=True).model
    attribute(model, "integrated_gradients", list(LAYERS.values()))
    before = tensors()
    for _ in range(3):
        attribute(model, "integrated_gradients", list(LAYERS.values()))
    assert tensors() <= before


# --- targets, scores and warnings ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_the_target_is_generated_by_the_kernels_of_bitsandbytes(kind: str) -> None:
    model = Pair(kind, ran=True).model
    ids = prompt_input().inp_tensor
    gen_args = {"max_new_tokens": 4, "do_sample": False}
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), **gen_args)
    generated = rows[0, ids.size(1) :]
    result = attribute(model, "saliency", LAYERS["block"], target=None, gen_args=gen_args)
    expected = attribute(model, "saliency", LAYERS["block"], target=generated)
    assert result.output_tokens == expected.output_tokens
    assert_close(result.token_attr, expected.token_attr, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("default:8-bit layers round")
def test_one_warning_names_8_bit_layers(kind: str) -> None:
    model = Pair(kind, ran=False).model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attribute(model, "integrated_gradients", list(LAYERS.values()))
    named = [w for w in caught if "8-bit layers round their input" in str(w.message)]
    assert len(named) == (kind == "int8")
    assert not any("not causal" in str(w.message) for w in caught)


def test_notes_of_bitsandbytes_are_held_back(caplog: Any) -> None:
    model = Pair("int8", ran=False).model
    attribute(model, "saliency", LAYERS["block"], target=None, gen_args={"max_new_tokens": 2})
    LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(
        prompt_input(), target=target_ids(2)
    )
    assert "inputs will be cast" not in caplog.text
