"""Attribution in one line: name the method, the layers and the prompt, and get the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from captum.attr import (
    FeatureAblation,
    InterpretableInput,
    KernelShap,
    LayerConductance,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    ShapleyValues,
    ShapleyValueSampling,
)
from torch import nn

from captum_llm_ext.attention.wrapper import LLMAttentionAttribution
from captum_llm_ext.gradients.methods import LayerSaliency
from captum_llm_ext.gradients.wrapper import LLMGradientAttribution
from captum_llm_ext.inputs.chats import chat_input
from captum_llm_ext.inputs.questions import qa_input
from captum_llm_ext.inputs.tokens import TextTokenInput
from captum_llm_ext.perturbations.two_stage import TwoStageAblation
from captum_llm_ext.perturbations.wrapper import LLMAttribution
from captum_llm_ext.results import LLMAttributionResult
from captum_llm_ext.scoring.tasks import QA, TASKS, task_of

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[Message] | InterpretableInput
Layers: TypeAlias = nn.Module | str | Sequence[nn.Module | str]
Wrapper: TypeAlias = LLMGradientAttribution | LLMAttribution | LLMAttentionAttribution


def _integrated_gradients(model: nn.Module, layer: Any) -> LayerIntegratedGradients:
    with warnings.catch_warnings():
        # Captum warns of layers that feed each other; here each layer has its own path.
        warnings.filterwarnings("ignore", message="Multiple layers provided")
        return LayerIntegratedGradients(model, layer)


GRADIENT_METHODS: dict[str, Callable[..., Any]] = {
    "saliency": LayerSaliency,
    "ig": _integrated_gradients,
    "gradxact": LayerGradientXActivation,
    "gradshap": LayerGradientShap,
    "conductance": LayerConductance,
}
PERTURBATION_METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "ablation": FeatureAblation,
    "two_stage": TwoStageAblation,
    "shapley": ShapleyValues,
    "shapley_sampling": ShapleyValueSampling,
    "lime": Lime,
    "kernelshap": KernelShap,
}
# What LayerSaliency and Captum's wrappers are made with, as no options of `attribute`.
METHOD_SETTINGS: dict[str, tuple[str, ...]] = {"saliency": ("norm",)}
WRAPPER_SETTINGS = ("attr_target",)
# Wrappers that need no method of Captum's, and what they are made with besides model and layers.
READOUT_METHODS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "attention": (LLMAttentionAttribution, ("heads", "reduction")),
}
# Methods that put nothing in the place of features.
WITHOUT_BASELINES = ("saliency", "gradxact", *READOUT_METHODS)
METHODS = (*GRADIENT_METHODS, *PERTURBATION_METHODS, *READOUT_METHODS)


def explain(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    target: str | torch.Tensor | None = None,
    method: str = "saliency",
    layers: Layers | None = None,
    quadrature: str | None = None,
    context: str | None = None,
    **kwargs: Any,
) -> LLMAttributionResult:
    """Attribute what a language model says to the parts of its prompt.

    Args:
        model: a causal language model, an encoder-decoder model, whose target is its translation
            or summary, or a question answering model, whose target is an answer of the context.
        tokenizer: the model's tokenizer.
        prompt: a string (every token is a feature), a list of messages
            (``{"role": ..., "content": ...}``, put through the chat template), or any
            interpretable input of Captum.
        target: the continuation to attribute, a string or token ids of shape (n_output,).
            Default: what the model generates.
        method: with gradients, "saliency" (L1 norm of the gradient, the default), "ig" (integrated
            gradients), "gradxact" (gradient x activation), "gradshap" (gradient SHAP) or
            "conductance" (of layers, along the path of the embeddings); by
            perturbation, "ablation", "two_stage" (ablation in two contexts), "shapley",
            "shapley_sampling", "lime" or "kernelshap"; or "attention", the attention weights (with
            `heads` and `reduction`).
        layers: for the methods with gradients and "attention", a module, a name, a pattern such as
            ``"model.layers.*.mlp"``, or a list of these. Default: the input embeddings; for
            "attention", every layer that has it.
        quadrature: of "ig" and "conductance" (where `attribute` calls it `method`):
            "gausslegendre" (the default), a Riemann rule, or "adaptive" with ``tol=0.05``.
        context: of a question answering model, the text that the answer is part of; the prompt is
            the question.
        **kwargs: `attr_target` ("log_prob", the default, "prob" or "logit"; by perturbation "rank"
            too) and, of "saliency", `norm` ("l1", the default, "l2" or "linf"). All others go to
            ``attribute`` of `LLMGradientAttribution`, `LLMAttribution` or
            `LLMAttentionAttribution`, for example ``n_steps=100``, ``n_samples=50`` or
            ``gen_args={"max_new_tokens": 10}``.

    Returns:
        A result with ``seq_attr`` (n_input,) and ``token_attr`` (n_output, n_input), in units of
        log p; for several layers an ``LLMLayerAttributionResult``, with those of each layer too.
        Of "attention" an ``LLMAttentionAttributionResult``, in shares of 1.

    Raises:
        ValueError: the method is unknown or has no layers, a layer is not in the model, or the
            prompt or the target is empty.
        TypeError: the prompt is none of the kinds above.

    Example:
        >>> model, tokenizer = load_demo_model()
        >>> result = explain(model, tokenizer, "The capital of France is", " Paris")
        >>> result.seq_attr.shape, result.token_attr.shape
        (torch.Size([5]), torch.Size([1, 5]))

    Source: Kokhlikyan et al., "Captum" (2020), arXiv:2009.07896; Miglani et al., "Using Captum to
    explain generative language models" (2023), arXiv:2312.05491.
    """
    options = {"quadrature": quadrature, **kwargs}
    wrapper, options = prepare(model, tokenizer, method, layers, options)
    inp = as_input(prompt, tokenizer, context, task_of(model) is TASKS[QA])
    return wrapper.attribute(inp, target=target, **options)


def prepare(
    model: nn.Module,
    tokenizer: Any,
    method: str,
    layers: Layers | None,
    options: Mapping[str, Any],
) -> tuple[Wrapper, dict[str, Any]]:
    """The wrapper of a method, and those of the options of `explain` that its `attribute` takes."""
    rest = dict(options)
    own = _taken_out(rest, METHOD_SETTINGS.get(method, ()))
    settings = _taken_out(rest, READOUT_METHODS.get(method, (None, WRAPPER_SETTINGS))[1])
    wrapper = _wrapper(model, tokenizer, method, layers, own, settings)
    quadrature = rest.pop("quadrature", None)
    if quadrature is not None:
        if method not in ("ig", "conductance"):
            raise ValueError(f"quadrature belongs to 'ig' and 'conductance', got {method!r}")
        rest["method"] = quadrature
    return wrapper, rest


def _taken_out(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}


def _wrapper(
    model: nn.Module,
    tokenizer: Any,
    method: str,
    layers: Layers | None,
    own: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Wrapper:
    if method in READOUT_METHODS:
        wrapper: Wrapper = READOUT_METHODS[method][0](model, tokenizer, layers, **settings)
        return wrapper
    if method in GRADIENT_METHODS:
        layer = _input_embeddings(model) if layers is None else layers
        attr_method = GRADIENT_METHODS[method](model, layer, **own)
        return LLMGradientAttribution(attr_method, tokenizer, **settings)
    if method not in PERTURBATION_METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}; got {method!r}")
    if layers is not None:
        raise ValueError(
            f"{method} perturbs the prompt and has no layers: leave out layers, or choose one of "
            f"{', '.join((*GRADIENT_METHODS, *READOUT_METHODS))}"
        )
    return LLMAttribution(PERTURBATION_METHODS[method](model), tokenizer, **settings)


def as_input(
    prompt: Any, tokenizer: Any, context: str | None = None, answers: bool = False
) -> InterpretableInput:
    """What `explain` makes of a prompt; of a model that answers, of a question and its context."""
    if context is not None or (answers and isinstance(prompt, str)):
        return _question(prompt, tokenizer, context, answers)
    if isinstance(prompt, str):
        if not prompt:  # with a tokenizer that puts a token before every text it would pass
            raise ValueError("expected a prompt of at least one character, got an empty string")
        return TextTokenInput(prompt, tokenizer)
    if isinstance(prompt, InterpretableInput):
        return prompt
    if isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt):
        return chat_input(prompt, tokenizer)
    raise TypeError(
        "expected the prompt to be a string, a list of messages with 'role' and 'content', or an "
        f"interpretable input of Captum; got {type(prompt).__name__}"
    )


def _question(
    prompt: Any, tokenizer: Any, context: str | None, answers: bool
) -> InterpretableInput:
    if not answers:
        raise ValueError("a context is for question answering models, which this model is not")
    if not isinstance(prompt, str) or context is None:
        raise ValueError(
            "a question answering model needs a question as the prompt, and the context that "
            "holds the answer, both strings"
        )
    return qa_input(prompt, context, tokenizer)


def _input_embeddings(model: nn.Module) -> nn.Module:
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    if not isinstance(embeddings, nn.Module):
        raise ValueError(
            f"cannot tell which layer of {type(model).__name__} holds the input embeddings: name "
            'it with layers, for example layers="embed_tokens"'
        )
    return embeddings
