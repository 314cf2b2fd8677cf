"""The small real model in 4 and 8 bits: right gradients after `generate()`, nothing changed.

The reference is a float32 copy whose weights are decoded by hand from the stored bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    TextTokenInput,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from captum_llm_ext import (
    LayerRelevance,
    LayerSaliency,
    LLMAttribution,
    LLMGradientAttribution,
    load_model,
)
from captum_llm_ext.model.loading import DEMO_FOLDER, _cache_folder
from tests.models.quantized import is_packed, layout, stored_weights, with_weights
from tests.oracles.cases import assert_close, captum_attribution

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.filterwarnings("ignore:integrated gradients have not converged"),
    pytest.mark.filterwarnings("ignore:8-bit layers round"),
    pytest.mark.filterwarnings("ignore:Multiple layers provided"),
    pytest.mark.filterwarnings("ignore:a path at the embeddings"),
]

PROMPT, TARGET = "The capital of France is", " Paris."
Q_PROJ = "model.layers.15.self_attn.q_proj"
LAYERS = ["model.embed_tokens", "model.layers.15", Q_PROJ, "model.layers.15.mlp"]
LOADED = {
    "nf4 in float32": ("nf4", torch.float32),
    "nf4 in bfloat16": ("nf4", torch.bfloat16),
    "int8": ("int8", torch.float32),
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "saliency": (LayerSaliency, {}),
    "gradient_x_activation": (LayerGradientXActivation, {}),
    "integrated_gradients": (LayerIntegratedGradients, {"n_steps": 4}),
    "relevance": (partial(LayerRelevance, rules="attnlrp"), {}),
}


@dataclass
class Loaded:
    """A quantised model after `generate()`, its float copy, and its state before the tests."""

    name: str
    model: nn.Module
    tokenizer: Any
    reference: nn.Module
    before: dict[Any, Any]
    logits: Tensor

    @property
    def inp(self) -> TextTokenInput:
        return TextTokenInput(PROMPT, self.tokenizer)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids).logits
    return logits


@pytest.fixture(scope="module", params=LOADED, ids=lambda name: name.replace(" ", "-"))
def loaded(request: Any, demo_model: Any) -> Iterator[Loaded]:
    kind, dtype = LOADED[request.param]
    model, tokenizer = load_model(_cache_folder() / DEMO_FOLDER, kind, dtype=dtype)
    weights = {rounded: stored_weights(model, rounded) for rounded in (False, True)}
    ids = TextTokenInput(PROMPT, tokenizer).inp_tensor
    model.generate(ids, max_new_tokens=2, do_sample=False)
    reference = with_weights(demo_model[0], weights[is_packed(model)], model)
    case = Loaded(request.param, model, tokenizer, reference, layout(model), logits_of(model, ids))
    yield case
    check_unchanged(case)  # after whichever tests ran


def attribute(case: Loaded, model: nn.Module, method: str, layers: Any) -> Any:
    kind, options = METHODS[method]
    wrapper = LLMGradientAttribution(kind(model, layers), case.tokenizer)
    return wrapper.attribute(case.inp, target=TARGET, **options)


def bar(name: str, method: str, layer: str) -> float | None:
    """The least cosine: of 16 bits, a path is even enough only at the projection."""
    if name != "nf4 in bfloat16":
        return 0.999
    if method == "integrated_gradients":
        return 0.98 if layer == Q_PROJ else None
    return {"saliency": 0.99, "gradient_x_activation": 0.9, "relevance": 0.9}[method]


@pytest.mark.parametrize("method", METHODS)
def test_close_to_the_dequantised_float_copy(loaded: Loaded, method: str) -> None:
    result = attribute(loaded, loaded.model, method, LAYERS)
    expected = attribute(loaded, loaded.reference, method, LAYERS)
    for layer in LAYERS:
        assert result[layer].token_attr.dtype == torch.float32
        assert (result[layer].token_attr != 0).any(1).all(), layer
        least = bar(loaded.name, method, layer)
        if least is None:
            continue
        for attr, truth in (
            (result[layer].token_attr, expected[layer].token_attr),
            (result[layer].seq_attr, expected[layer].seq_attr),
        ):
            cosine = cosine_similarity(attr.flatten(), truth.flatten(), dim=0)
            assert cosine >= least, (layer, float(cosine))


def test_close_to_captum_on_the_float_copy(loaded: Loaded) -> None:
    """Captum is the oracle here, and the quantised projection is alone, not in a list."""
    if loaded.name != "nf4 in float32":
        pytest.skip("one model shows that the reference is Captum's too")
    layer = loaded.reference.get_submodule(Q_PROJ)
    options: dict[str, Any] = {"target": TARGET, "tokenizer": loaded.tokenizer, "n_steps": 3}
    expected = captum_attribution(
        LayerIntegratedGradients, loaded.reference, layer, loaded.inp, **options
    )
    wrapper = LLMGradientAttribution(
        LayerIntegratedGradients(loaded.model, loaded.model.get_submodule(Q_PROJ)),
        loaded.tokenizer,
    )
    result = wrapper.attribute(loaded.inp, target=TARGET, n_steps=3)
    assert_close(result.token_attr, expected.token_attr, tolerance=1e-3)


@pytest.mark.parametrize("method", [LayerGradientXActivation, LayerIntegratedGradients])
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_captum_itself_gets_no_gradient_where_the_processor_packs(
    loaded: Loaded, method: Any
) -> None:
    """Only the last token has some, since it reaches the score past all linear layers."""
    if not is_packed(loaded.model):
        pytest.skip("these weights are not packed, so Captum's gradients are not cut off")
    embedding = loaded.model.get_input_embeddings()
    options: dict[str, Any] = {"target": " Paris", "tokenizer": loaded.tokenizer}
    options |= {"n_steps": 2} if method is LayerIntegratedGradients else {}
    result = captum_attribution(method, loaded.model, embedding, loaded.inp, **options)
    assert (result.token_attr[:, :-1] == 0).all()


def test_attributions_sum_to_the_difference_of_the_float_copys_scores(loaded: Loaded) -> None:
    if loaded.name == "nf4 in bfloat16":
        pytest.skip("sums of 16-bit products are as coarse as their dtype")
    method = LayerIntegratedGradients(loaded.model, "model.layers.28")
    result = LLMGradientAttribution(method, loaded.tokenizer).attribute(
        loaded.inp, target=" Paris", method="adaptive", tol=0.01
    )
    prompt = loaded.inp.inp_tensor[0]
    target = torch.tensor(loaded.tokenizer.encode(" Paris", add_special_tokens=False))
    end, start = (
        direct_scores(loaded.reference, ids, target) for ids in (prompt, torch.zeros_like(prompt))
    )
    assert result.converged
    difference = result.token_attr.sum(1) - result.convergence_delta
    torch.testing.assert_close(difference, end - start, rtol=2e-3, atol=2e-3)
    assert_close(result.token_attr.sum(1), end - start, 0.02)


def test_ablation_equals_direct_computation(loaded: Loaded) -> None:
    """The kernels of bitsandbytes score each prompt by itself."""
    wrapper = LLMAttribution(FeatureAblation(loaded.model), loaded.tokenizer)
    result = wrapper.attribute(loaded.inp, target=TARGET)
    prompt = loaded.inp.inp_tensor[0]
    target = torch.tensor(loaded.tokenizer.encode(TARGET, add_special_tokens=False))
    whole = direct_scores(loaded.model, prompt, target)
    rows = []
    for i in range(len(prompt)):
        absent = prompt.clone()
        absent[i] = 0
        rows.append(whole - direct_scores(loaded.model, absent, target))
    # Packed 4-bit products and those in bfloat16 round by the shape of the batch. 8-bit layers
    # round by all that is in the pass, so there each prompt must have had its own pass.
    exact = loaded.name == "int8"
    truth = torch.stack(rows, dim=1)
    assert_close(result.token_attr, truth, 1e-6 if exact else 5e-2)
    assert_close(result.seq_attr, truth.sum(0), 1e-6 if exact else 5e-2)


def direct_scores(model: nn.Module, prompt: Tensor, target: Tensor) -> Tensor:
    """log p of the target's tokens (n_output,), from one pass over the prompt and the target."""
    logits = logits_of(model, torch.cat([prompt, target[:-1]])[None])[0, -len(target) :]
    return logits.float().log_softmax(-1)[torch.arange(len(target)), target]


def test_the_model_is_as_before(loaded: Loaded) -> None:
    attribute(loaded, loaded.model, "saliency", LAYERS)
    check_unchanged(loaded)


def check_unchanged(case: Loaded) -> None:
    """Bytes, packing, flags, forwards and the logits' last bits are as before."""
    assert layout(case.model) == case.before
    assert torch.equal(logits_of(case.model, case.inp.inp_tensor), case.logits)
