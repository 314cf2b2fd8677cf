"""Models in 16 bits: results in float32, near those of the float32 model, and plots of them."""

from __future__ import annotations

import warnings
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    TextTokenInput,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from captum_llm_ext import LayerSaliency, LLMAttribution, LLMGradientAttribution
from tests.models.families import MinimalTokenizer, tiny_model, tiny_tokenizer
from tests.oracles.cases import (
    captum_attribution,
    in_pairs,
    our_attribution,
    prompt_input,
    target_ids,
)

matplotlib.use("Agg")
pytestmark = [
    pytest.mark.filterwarnings("ignore:integrated gradients have not converged"),
    pytest.mark.filterwarnings("ignore:Multiple layers provided"),
    pytest.mark.filterwarnings("ignore:a path at the embeddings"),
]

DTYPES = [torch.bfloat16, torch.float16]
LAYERS = ["model.embed_tokens", "model.layers.1.self_attn.q_proj", "model.layers.2"]
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "saliency": (LayerSaliency, {}),
    "gradient_x_activation": (LayerGradientXActivation, {}),
    "integrated_gradients": (LayerIntegratedGradients, {"n_steps": 3}),
    "adaptive": (LayerIntegratedGradients, {"n_steps": None, "method": "adaptive"}),
    "gradient_shap": (LayerGradientShap, {"n_samples": 2}),
}
WARNED = "a path at the embeddings computed in bfloat16 is not reliable"


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with smaller weights than the other tests' model, so that 16 bits can be near 32."""
    model = tiny_model("llama", fresh=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.bfloat16())  # both dtypes then hold the same numbers
            if "layers" in name and parameter.dim() > 1:
                parameter.mul_(0.5)
    return model.to(dtype)


def attribute(model: nn.Module, method: str, layers: Any = LAYERS[1], **more: Any) -> Any:
    kind, options = METHODS[method]
    torch.manual_seed(0)
    options = {"target": target_ids(3), **options, **more}
    return our_attribution(kind, model, layers, prompt_input(), **options)


def cosine(result: Tensor, expected: Tensor) -> float:
    return float(cosine_similarity(result.flatten(), expected.flatten(), dim=0))


def test_saliency_of_a_bfloat16_model_is_float32_and_near_the_float32_models() -> None:
    result = attribute(small_model(torch.bfloat16), "saliency")
    assert result.token_attr.dtype == torch.float32
    assert cosine(result.token_attr, attribute(small_model(), "saliency").token_attr) > 0.98


@in_pairs(method=list(METHODS), dtype=DTYPES, layer=LAYERS)
def test_float32_and_near_the_float32_model(method: str, dtype: torch.dtype, layer: str) -> None:
    result = attribute(small_model(dtype), method, layer)
    expected = attribute(small_model(), method, layer)
    for name in ("seq_attr", "token_attr", "convergence_delta"):
        if getattr(expected, name) is not None:
            assert getattr(result, name).dtype == torch.float32
    assert cosine(result.token_attr, expected.token_attr) > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_and_hidden_units_are_float32(dtype: torch.dtype) -> None:
    result = attribute(small_model(dtype), "saliency", LAYERS, include_hidden_attr=True)
    assert result.layer_token_attr.dtype == result.layer_seq_attr.dtype == torch.float32
    assert {value.dtype for value in result.hidden_attr.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_plots_and_tables(dtype: torch.dtype) -> None:
    """Captum's own plots refuse bfloat16."""
    result = attribute(small_model(dtype), "saliency", LAYERS)
    single = result[LAYERS[0]]
    for plot in (result.plot_layer_attr, single.plot_token_attr, single.plot_seq_attr):
        figure, _ = plot()
        figure.canvas.draw()
        plt.close(figure)
    assert "golf" in single.to_text(color=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attr_target", ["log_prob", "prob", "logit", "rank"])
def test_perturbation_is_float32(dtype: torch.dtype, attr_target: str) -> None:
    results = []
    for model in (small_model(dtype), small_model()):
        wrapper = LLMAttribution(FeatureAblation(model), tiny_tokenizer(), attr_target)
        results.append(wrapper.attribute(prompt_input(), target=target_ids(3)))
    assert results[0].token_attr.dtype == torch.float32
    assert cosine(results[0].token_attr, results[1].token_attr) > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_the_softmax_in_float32(dtype: torch.dtype) -> None:
    """log p of the model's 16-bit logits, the softmax and the difference in float32."""
    model, target = small_model(dtype), target_ids(1)
    prompt = prompt_input().inp_tensor[0]
    wrapper = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    result = wrapper.attribute(prompt_input(), target=target)

    @torch.no_grad()
    def score(ids: Tensor) -> Tensor:
        return model(ids[None]).logits[0, -1].float().log_softmax(-1)[target[0]]

    absent = prompt.clone()
    absent[3] = 0
    expected = score(prompt) - score(absent)
    assert abs(result.token_attr[0, 3] - expected) < 2e-2
    # A softmax in 16 bits would give a number that 16 bits hold.
    assert result.token_attr[0, 3] != result.token_attr[0, 3].to(dtype)


class Steps(nn.Module):
    """A logit that is linear in the embeddings, so that its gradient is the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        with torch.no_grad():
            self.embedding.weight.zero_()
            self.embedding.weight[1:] = 1
            self.head.weight.copy_(torch.arange(32).reshape(8, 4) / 32)

    def forward(self, ids: Tensor) -> Any:
        hidden = self.embedding(ids)
        return type("Output", (), {"logits": self.head(hidden.cumsum(1))})()


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_steps_add_up_in_float32(dtype: torch.dtype) -> None:
    """300 equal parts of one number: their sum in bfloat16 stops growing at 256 of them."""
    model = Steps().to(dtype).eval()
    tokenizer = MinimalTokenizer()
    inp = TextTokenInput(" ".join(tokenizer.words[1:4]), tokenizer)
    method = LayerIntegratedGradients(model, model.embedding)
    wrapper = LLMGradientAttribution(method, tokenizer, attr_target="logit")
    result = wrapper.attribute(
        inp,
        target=torch.tensor([5]),
        n_steps=300,
        method="riemann_middle",
        internal_batch_size=1,
    )
    expected = model.head.weight[5].float().sum().expand(3)  # the logit is linear
    torch.testing.assert_close(result.token_attr[0], expected, rtol=1e-4, atol=1e-5)


# --- the dtype of the passes ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["saliency", "gradient_x_activation", "integrated_gradients"])
def test_passes_in_another_dtype(method: str, dtype: torch.dtype) -> None:
    model, seen = small_model(), set()
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _, __, output: seen.add(output.dtype)
    )
    result = attribute(model, method, LAYERS, dtype=dtype)
    hook.remove()
    assert dtype in seen
    expected = attribute(model, method, LAYERS)
    for layer in LAYERS:
        assert result[layer].token_attr.dtype == torch.float32
        assert cosine(result[layer].token_attr, expected[layer].token_attr) > 0.98
        assert not torch.equal(result[layer].token_attr, expected[layer].token_attr)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_ends_with_an_exception() -> None:
    model = small_model()
    model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attribute(model, "saliency", dtype=torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, "bfloat16"])
def test_an_unknown_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16, torch\.float16 or None"):
        attribute(small_model(), "saliency", dtype=dtype)


# --- overflow and warnings -----------------------------------------------------------------------


def test_scores_that_overflow_are_refused() -> None:
    model = small_model(torch.float16)
    with torch.no_grad():
        model.lm_head.weight *= 60000
    for method in ("saliency", "integrated_gradients"):
        with pytest.raises(ValueError, match=r"scores are not finite in torch\.float16"):
            attribute(model, method)
    with pytest.raises(ValueError, match=r"scores are not finite in torch\.float16"):
        LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(
            prompt_input(), target=target_ids(2)
        )


def test_gradients_that_overflow_are_refused() -> None:
    """The scores are finite, and the gradients are not."""
    model = small_model(torch.float16)
    model.model.norm.register_forward_hook(
        lambda _, __, output: (
            output.register_hook(lambda g: g * 1e6) and None if output.requires_grad else None
        )
    )
    with pytest.raises(ValueError, match="is not finite: gradients overflow in float16"):
        attribute(model, "gradient_x_activation")


PATHS = ["integrated_gradients", "adaptive", "gradient_shap"]


@in_pairs(how=["model", "dtype"], layer=LAYERS, method=list(METHODS))
@pytest.mark.filterwarnings("default:a path at the embeddings")
def test_a_path_at_the_embeddings_is_warned_of(how: str, layer: str, method: str) -> None:
    model = small_model(torch.bfloat16 if how == "model" else torch.float32)
    options = {"dtype": torch.bfloat16} if how == "dtype" else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attribute(model, method, layer, **options)
    warned = [w for w in caught if WARNED in str(w.message)]
    assert len(warned) == (method in PATHS and layer == LAYERS[0])
    assert all(w.filename.endswith("cases.py") for w in warned)  # where attribute() was called


@pytest.mark.filterwarnings("default:a path at the embeddings")
def test_float32_is_not_warned_of() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attribute(small_model(), "integrated_gradients", LAYERS[0])
    assert not [w for w in caught if "a path at the embeddings" in str(w.message)]


def test_captum_itself_gives_16_bit_results_that_it_cannot_plot() -> None:
    model = small_model(torch.bfloat16)
    layer = model.get_submodule(LAYERS[2])
    result = captum_attribution(
        LayerGradientXActivation, model, layer, prompt_input(), target=target_ids(2)
    )
    assert result.token_attr.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="BFloat16"):
        result.plot_token_attr()
