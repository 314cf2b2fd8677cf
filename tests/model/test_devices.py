"""Models on other devices than the processor, and over several: no tensor is left behind.

Without a GPU: on the `meta` device, which has shapes and no values, and spread by accelerate over
memory and disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    ShapleyValueSampling,
    TextTemplateInput,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from captum_llm_ext import LayerSaliency, LLMAttribution
from captum_llm_ext.gradients import path, trace
from captum_llm_ext.gradients import wrapper as gradient
from captum_llm_ext.inputs.baselines import PathStart
from captum_llm_ext.inputs.features import Features
from captum_llm_ext.model import hooks
from captum_llm_ext.model.layers import input_device
from captum_llm_ext.perturbations import scorer
from captum_llm_ext.perturbations.captum_methods import CaptumMethod
from captum_llm_ext.perturbations.masked_prompts import MaskedPrompts
from captum_llm_ext.perturbations.method import Outcome
from captum_llm_ext.scoring import checks, preparation, tasks
from captum_llm_ext.scoring import teacher_forcing as model_pass
from captum_llm_ext.scoring.target_scores import Target
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, our_attribution, prompt_input, target_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:integrated gradients have not converged"),
    pytest.mark.filterwarnings("ignore:Multiple layers provided"),
]

LAYERS = ["model.embed_tokens", "model.layers.1.self_attn.q_proj", "model.layers.2", "model.norm"]
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "saliency": (LayerSaliency, {}),
    "gradient_x_activation": (LayerGradientXActivation, {}),
    "integrated_gradients": (LayerIntegratedGradients, {"n_steps": 3}),
    "joint": (LayerIntegratedGradients, {"n_steps": 3, "layer_mode": "joint"}),
    "mean baseline": (LayerIntegratedGradients, {"n_steps": 3, "baselines": "mean"}),
    "gradient_shap": (LayerGradientShap, {"n_samples": 2, "stdevs": 0.1}),
}


# --- every tensor on the meta device -------------------------------------------------------------


class OneDevice(TorchDispatchMode):
    """Refuses operations on a tensor of the device together with one that was left on the CPU."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # A copy moves a tensor; positions on the CPU index tensors of every device.
        moves = function in (
            torch.ops.aten._to_copy.default,
            torch.ops.aten.copy_.default,
            torch.ops.aten.index.Tensor,
            torch.ops.aten.index_put.default,
            torch.ops.aten._unsafe_index_put.default,
        )
        devices = {x.device.type for x in tensors if x.dim()}
        assert moves or len(devices) < 2, f"{function} mixes {devices}"
        kwargs = kwargs or {}
        to_cpu = str(kwargs.get("device")) == "cpu"  # such as the target's ids, which results keep
        if function is torch.ops.aten._to_copy.default and to_cpu and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        return function(*args, **kwargs)


def start_of_zeros(
    spec: Any, ids: Tensor, replaced: Tensor, tokenizer: Any, model: Any
) -> PathStart:
    """A path's start by token ids, or by embeddings for a baseline that has a name."""
    width = model.get_input_embeddings().embedding_dim
    named = isinstance(spec, str)
    embeddings = torch.zeros(len(replaced), width, device=ids.device) if named else None
    return PathStart(torch.zeros_like(ids), replaced, embeddings)


def prompts_of_masks(masked: MaskedPrompts, masks: Tensor) -> list[scorer.Prompt]:
    """Prompts as long as the whole one."""
    return [(0,) * len(masked.scorer.reference)] * len(masks)


def scores_of_all(method: CaptumMethod, masked: MaskedPrompts, **options: Any) -> Outcome:
    """What Captum's method does with its scores, but for its own sums."""
    n_features = masked.inp.n_itp_features
    return Outcome(masked.scores(torch.ones(n_features, n_features, device="meta")).T)


class OfNoInput(dict[Any, Any]):
    """Totals as what a wrapper hands back, whose provenance is recorded."""

    inp = provenance = n_evaluations = None


@pytest.fixture
def valueless(monkeypatch: Any) -> Iterator[nn.Module]:
    """A model on the meta device; what reads values is told what it would find."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setattr(preparation, "check_vocabulary", lambda model, ids: None)
    monkeypatch.setattr(preparation, "check_ids", lambda forcing: None)
    monkeypatch.setattr(preparation, "warn_of_ended_prompt", lambda inp, prompt, tokenizer: None)
    monkeypatch.setattr(tasks, "output_labels", lambda prompt, ids, tokenizer: ["?"] * len(ids))
    monkeypatch.setattr(checks, "check_finite", lambda probe: None)
    monkeypatch.setattr(model_pass.TeacherForcing, "is_causal", lambda forcing, scored: True)
    monkeypatch.setattr(trace, "_check_features", lambda site, positions: None)
    monkeypatch.setattr(path.LayerPath, "note", lambda path, points, scores: None)
    monkeypatch.setattr(path.LayerPath, "_leap", lambda path, score: 0.0)
    monkeypatch.setattr(hooks, "is_ids", lambda tensor, ids: tensor.shape == ids.shape)
    monkeypatch.setattr(path.LayerPath, "_reaches_input", lambda path, scored: True)
    monkeypatch.setattr(Features, "n_columns", property(lambda features: len(features.names)))
    monkeypatch.setattr(Features, "first", 0)
    monkeypatch.setattr(gradient, "path_start", start_of_zeros)
    monkeypatch.setattr(MaskedPrompts, "prompts", prompts_of_masks)
    monkeypatch.setattr(CaptumMethod, "attribute_masked", scores_of_all)
    monkeypatch.setattr(scorer, "_shared", lambda prompt, reference: 4)
    monkeypatch.setattr(scorer, "_with_reference", lambda many, one: ([*many, one], len(many)))
    monkeypatch.setattr(scorer.PromptScorer, "_agrees", lambda scorer, log_probs: True)
    monkeypatch.setattr(tasks, "output_tokens", lambda ids, tokenizer: ["?"] * len(ids))
    monkeypatch.setattr(gradient, "check_totals", lambda *rest: None)
    monkeypatch.setattr(gradient, "to_result", lambda totals, *rest: OfNoInput(totals))
    with OneDevice():
        yield tiny_model("llama", fresh=True).to("meta")


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_stay_on_the_device(valueless: nn.Module, method: str, per_token: bool) -> None:
    kind, options = METHODS[method]
    totals = our_attribution(
        kind,
        valueless,
        LAYERS,
        prompt_input(),
        target=target_ids(3),
        include_per_token_attr=per_token,
        include_hidden_attr=True,
        reuse_prefix=False,
        **options,
    )
    count = prompt_input().inp_tensor.size(1)
    assert [site.name for site in totals] == LAYERS
    for total in totals.values():
        assert total.tokens.device.type == total.sequence.device.type == "meta"
        assert total.tokens.shape == (3, count + 2)


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_ablation_stays_on_the_device(valueless: nn.Module, reuse_prefix: bool) -> None:
    wrapper = LLMAttribution(FeatureAblation(valueless), tiny_tokenizer())
    result = wrapper.attribute(prompt_input(), target=target_ids(2), reuse_prefix=reuse_prefix)
    assert result.token_attr.device.type == "meta"
    assert result.token_attr.shape == (2, prompt_input().inp_tensor.size(1))


def test_a_tensor_that_is_left_behind_is_noticed(valueless: nn.Module, monkeypatch: Any) -> None:
    """The guard of these tests works: ids of the target on the CPU are found."""
    place = "captum_llm_ext.scoring.target_scores.Target._scores"
    scores = Target._scores
    monkeypatch.setattr(place, lambda *rest: scores(*rest) + torch.ones(1))
    with pytest.raises((AssertionError, RuntimeError)):
        our_attribution(LayerSaliency, valueless, LAYERS, prompt_input(), target=target_ids(2))


# --- spread over memory and disk by accelerate ---------------------------------------------------

accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate")

SPLITS = {
    "disk": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"},
    "embeddings on disk": {"model.embed_tokens": "disk", "lm_head": "disk"},
    "all on disk": {},
}


def spread(split: str, folder: Any) -> nn.Module:
    """A tiny model of which parts lie on disk, and come to the processor while they run."""
    model = tiny_model("llama", fresh=True)
    if split == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    given = SPLITS[split]
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm"]
    places = {n: given.get(n, "cpu") for n in [*names, "model.rotary_emb", "lm_head"]}
    if split == "all on disk":
        places = dict.fromkeys(places, "disk")
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.fixture(params=["cpu_offload", *SPLITS])
def split(request: Any, tmp_path: Any) -> nn.Module:
    return spread(request.param, tmp_path)


def state(model: nn.Module) -> dict[Any, Any]:
    """Where the parameters are, and what accelerate has put around the modules."""
    found: dict[Any, Any] = {}
    for name, module in model.named_modules():
        found[name] = (vars(module).get("forward"), vars(module).get("_hf_hook"), module.training)
    for name, parameter in model.named_parameters():
        found[name, "parameter"] = (parameter.device, parameter.requires_grad, parameter.shape)
    return found


def test_parts_lie_on_no_device(split: nn.Module) -> None:
    """So that these tests show something: some parameters have no values between passes."""
    assert any(parameter.device.type == "meta" for parameter in split.parameters())
    assert input_device(split) == torch.device("cpu")


@pytest.mark.parametrize("method", METHODS)
def test_spread_gradients_equal_the_undivided_models(split: nn.Module, method: str) -> None:
    kind, options = METHODS[method]
    before = state(split)
    both, results = {"target": target_ids(3), **options}, []
    for model in (split, tiny_model("llama")):
        torch.manual_seed(0)
        results.append(our_attribution(kind, model, LAYERS, prompt_input(), **both))
    found, expected = results
    for name in LAYERS[-1:] if method == "joint" else LAYERS:  # the last one sets the score alone
        assert_close(found[name].token_attr, expected[name].token_attr, 1e-5)
    assert state(split) == before


@pytest.mark.parametrize("baselines", [7, "zero", "mean", "nearest", ("nearest", 2)])
def test_baselines_of_a_spread_model(split: nn.Module, baselines: Any) -> None:
    both = {"target": target_ids(2), "baselines": baselines, "n_steps": 3}
    names = "model.layers.1.mlp"
    found = our_attribution(LayerIntegratedGradients, split, names, prompt_input(), **both)
    whole = tiny_model("llama")
    expected = our_attribution(LayerIntegratedGradients, whole, names, prompt_input(), **both)
    assert_close(found.token_attr, expected.token_attr, 1e-5)


def test_adaptive_and_generated_targets_of_a_spread_model(split: nn.Module) -> None:
    gen_args = {"max_new_tokens": 2, "do_sample": False}
    both = {"method": "adaptive", "n_steps": None, "gen_args": gen_args}
    layer = "model.layers.2"
    found = our_attribution(LayerIntegratedGradients, split, layer, prompt_input(), **both)
    whole = tiny_model("llama")
    expected = our_attribution(LayerIntegratedGradients, whole, layer, prompt_input(), **both)
    assert found.output_tokens == expected.output_tokens
    assert_close(found.token_attr, expected.token_attr, 1e-4)


@pytest.mark.parametrize("method", [FeatureAblation, ShapleyValueSampling])
def test_spread_perturbations_equal_the_undivided_models(split: nn.Module, method: Any) -> None:
    inp = TextTemplateInput("{} lives in {} and", ["Dave", "Palm Coast"], ["friends", "Japan"])
    before, found = state(split), []
    for model in (split, tiny_model("llama")):
        torch.manual_seed(0)
        wrapper = LLMAttribution(method(model), tiny_tokenizer())
        found.append(wrapper.attribute(inp, target=target_ids(3)).token_attr)
    assert_close(found[0], found[1], 1e-5)
    assert state(split) == before


def test_trainable_weights_of_a_spread_model_stay_trainable(split: nn.Module) -> None:
    split.requires_grad_(True)
    before = state(split)
    our_attribution(LayerSaliency, split, LAYERS, prompt_input(), target=target_ids(2))
    assert state(split) == before
    assert all(parameter.requires_grad for parameter in split.parameters())
    assert all(parameter.grad is None for parameter in split.parameters())


def test_after_an_exception_in_a_spread_model(split: nn.Module) -> None:
    hook = split.model.norm.register_forward_hook(lambda *_: 1 / 0)
    before = state(split)
    with pytest.raises(ZeroDivisionError):
        our_attribution(LayerSaliency, split, LAYERS, prompt_input(), target=target_ids(2))
    hook.remove()
    assert state(split) == before


def test_quantised_layers_of_a_spread_model(tmp_path: Any) -> None:
    """accelerate wraps their forward; the product is replaced beneath its wrapper."""
    pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")
    from tests.models.quantized import layout, quantized, stored_weights, tiny_float_model
    from tests.models.quantized import with_weights as float_copy

    whole = quantized(tiny_float_model(), "nf4")
    reference = float_copy(tiny_float_model(), stored_weights(whole), whole)
    model = accelerate.dispatch_model(whole, {"": "cpu"}, main_device="cpu", force_hooks=True)
    before = layout(model)
    for kind in (LayerSaliency, LayerIntegratedGradients):
        found, expected = (
            our_attribution(kind, m, LAYERS[1:], prompt_input(), target=target_ids(2))
            for m in (model, reference)
        )
        assert_close(found.layer_token_attr, expected.layer_token_attr, 1e-3)
    assert layout(model) == before
