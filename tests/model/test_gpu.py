"""On a GPU: `python -m pytest -m gpu` runs these alone. Skipped where there is none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from captum_llm_ext import LayerSaliency, LLMAttribution, load_model
from tests.models.families import layer_names, tiny_model, tiny_tokenizer
from tests.oracles.cases import (
    assert_close,
    captum_attribution,
    in_pairs,
    our_attribution,
    prompt_input,
    target_ids,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:integrated gradients have not converged"),
    pytest.mark.filterwarnings("ignore:8-bit layers round"),
    pytest.mark.filterwarnings("ignore:a path at the embeddings"),
    pytest.mark.filterwarnings("ignore:Multiple layers provided"),
]

LAYERS = ["model.embed_tokens", "model.layers.1.self_attn.q_proj", "model.layers.2"]
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "saliency": (LayerSaliency, {}),
    "gradient_x_activation": (LayerGradientXActivation, {}),
    "integrated_gradients": (LayerIntegratedGradients, {"n_steps": 3}),
    "gradient_shap": (LayerGradientShap, {"n_samples": 3}),
}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TensorFloat32, whose products are as coarse as float16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(family: str = "llama") -> nn.Module:
    return deepcopy(tiny_model(family)).to("cuda")


def attribute(model: nn.Module, method: str, layers: Any, **more: Any) -> Any:
    kind, options = METHODS[method]
    torch.manual_seed(0)
    options = {"target": target_ids(3), **options, **more}
    return our_attribution(kind, model, layers, prompt_input(), **options)


# --- parity --------------------------------------------------------------------------------------


def test_ablation_equals_the_processor() -> None:
    result, expected = (
        LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(
            prompt_input(), target=target_ids(3)
        )
        for model in (on_gpu(), tiny_model("llama"))
    )
    assert_close(result.token_attr.cpu(), expected.token_attr, 1e-3)


@in_pairs(
    family=["llama", "gpt2", "gemma2"],
    method=[LayerIntegratedGradients, LayerGradientXActivation],
    kind=["embedding", "block", "attention_projection", "mlp"],
)
def test_equals_captum(family: str, method: Any, kind: str) -> None:
    model = on_gpu(family)
    layer = model.get_submodule(layer_names(family)[kind])
    expected = captum_attribution(method, model, layer, prompt_input(), target=target_ids(3))
    result = our_attribution(method, model, layer, prompt_input(), target=target_ids(3))
    assert_close(result.token_attr.cpu(), expected.token_attr.cpu(), 1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_processor(family: str, method: str) -> None:
    layers = [layer_names(family)[kind] for kind in ("embedding", "block", "mlp")]
    result = attribute(on_gpu(family), method, layers)
    expected = attribute(tiny_model(family), method, layers)
    assert_close(result.layer_token_attr.cpu(), expected.layer_token_attr, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_float32(dtype: torch.dtype) -> None:
    model = on_gpu()
    expected = attribute(model, "saliency", LAYERS[2])
    for result in (
        attribute(model, "saliency", LAYERS[2], dtype=dtype),
        attribute(model.to(dtype), "saliency", LAYERS[2]),
    ):
        assert result.token_attr.dtype == torch.float32
        assert cosine(result.token_attr, expected.token_attr) > 0.9


def cosine(result: Tensor, expected: Tensor) -> float:
    return float(cosine_similarity(result.flatten().cpu(), expected.flatten().cpu(), dim=0))


# --- quantisation --------------------------------------------------------------------------------

KINDS = ("nf4", "nf4 double", "fp4", "fp4 double", "int8")


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_layers_equal_the_float_copy(kind: str, ran: bool) -> None:
    from tests.models.quantized import layout, quantized, stored_weights, tiny_float_model
    from tests.models.quantized import with_weights as float_copy

    model = quantized(tiny_float_model(), kind, "cuda")
    reference = float_copy(tiny_float_model().to("cuda"), stored_weights(model), model)
    ids = prompt_input().inp_tensor.to("cuda")
    if ran:
        model.generate(ids, max_new_tokens=2, do_sample=False)
        with torch.no_grad():
            logits = model(ids).logits
    before = layout(model)
    for method in METHODS:
        result = attribute(model, method, LAYERS).layer_token_attr
        assert_close(result, attribute(reference, method, LAYERS).layer_token_attr, 2e-3)
    assert layout(model) == before
    if ran:
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_loaded_model(quantization: str, tmp_path: Any) -> None:
    """As a notebook loads it: on the GPU that accelerate chooses, computing in bfloat16."""
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    from tests.models.quantized import tiny_float_model

    tiny_float_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, quantization, dtype=torch.bfloat16, device_map="auto")
    assert next(model.parameters()).device.type == "cuda"
    result = attribute(model, "saliency", LAYERS)
    assert result.layer_token_attr.dtype == torch.float32
    assert (result.layer_token_attr > 0).all()


# --- several devices and memory ------------------------------------------------------------------


@pytest.mark.parametrize("second", ["cpu", "cuda:1"])
@pytest.mark.parametrize("method", METHODS)
def test_spread_over_devices(method: str, second: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate")
    if second == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    place: Any = 1 if second == "cuda:1" else "cpu"
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.rotary_emb": 0}
    places |= {f"model.layers.{i}": 0 if i < 2 else place for i in range(4)}
    places |= {"model.norm": place, "lm_head": place}
    model = accelerate.dispatch_model(deepcopy(tiny_model("llama")), places, main_device=0)
    result = attribute(model, method, LAYERS)
    expected = attribute(tiny_model("llama"), method, LAYERS)
    for name in LAYERS:
        assert_close(result[name].token_attr.cpu(), expected[name].token_attr, 1e-3)


@pytest.mark.parametrize("kind", [None, "nf4 double", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_no_memory_is_kept(method: str, kind: str | None) -> None:
    model = on_gpu()
    if kind is not None:
        from tests.models.quantized import quantized, tiny_float_model

        model = quantized(tiny_float_model(), kind, "cuda")
    attribute(model, method, LAYERS)  # workspaces of the libraries stay
    before = allocated()
    for _ in range(3):
        attribute(model, method, LAYERS)
    assert allocated() <= before


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
