"""Attribution in one line: name the method, the layers and the prompt, and get the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from captum_llm_ext.choosing import automatic_methods, first_that_reads
from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs.prompts import as_input
from captum_llm_ext.model.adapter import QA
from captum_llm_ext.model.signatures import keywords
from captum_llm_ext.model.suitability import check_pair
from captum_llm_ext.registry import METHODS, WITHOUT_EFFECT, did_you_mean, load, method_named
from captum_llm_ext.results.layered import LLMLayerAttributionResult
from captum_llm_ext.results.single import LLMAttributionResult
from captum_llm_ext.scoring.tasks import task_of

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[Message] | InterpretableInput
Layers: TypeAlias = nn.Module | str | Sequence[nn.Module | str]


class Attributing(Protocol):
    """A wrapper of the registry, with its method."""

    def attribute(self, inp: InterpretableInput, target: Any = None, **options: Any) -> Any: ...
    def method_options(self) -> set[str]:
        """The keywords of `attribute` that belong to the method."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse values of options that have no meaning."""


def explain(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    target: str | torch.Tensor | None = None,
    method: str | None = None,
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
        method: with gradients, "saliency" (L1 norm of the gradient), "ig" (integrated
            gradients), "gradxact" (gradient x activation), "gradshap" (gradient SHAP),
            "conductance" (of layers, along the path of the embeddings) or "relevance" (layer-wise
            relevance, see `LayerRelevance` for what its authors say of patents); by perturbation,
            "ablation", "two_stage" (ablation in two contexts), "guided" (ablation on a budget, with
            `max_evaluations` and `guide`), "surrogate" (linear, with `n_masks` and `guide`),
            "shapley", "shapley_sampling", "lime" or "kernelshap"; by attention, "attention" (the
            weights, with `heads` and `reduction`), "flow" (information flow) or "flow_rollout": any
            row of `captum_llm_ext.registry.METHODS`. Default: "flow" where the model is causal and
            its attention can be read, and neither layers nor an option is given that "flow" lacks;
            else "saliency". The result's `method` says which.
        layers: for the methods with gradients and by attention, a module, a name, a pattern such
            as ``"model.layers.*.mlp"``, or a list of these. Default: the input embeddings; by
            attention, every layer that has it.
        quadrature: the points of the path of "ig" and "conductance", which `attribute` calls
            `method`: "gausslegendre" (the default), a Riemann rule, or "adaptive" with
            ``tol=0.05``.
        context: the text that holds the answer, for a question answering model, whose prompt is
            the question.
        **kwargs: `attr_target` ("log_prob", the default, "prob" or "logit"; by perturbation "rank"
            too); for "saliency", `norm` ("l1", the default, "l2" or "linf"); for "relevance",
            `rules` ("cp", the default, or "attnlrp"). All others go to ``attribute`` of
            `LLMGradientAttribution`, `LLMAttribution` or `LLMAttentionAttribution`, for example
            ``n_steps=100``, ``n_samples=50`` or ``gen_args={"max_new_tokens": 10}``.

    Returns:
        A result with ``seq_attr`` (n_input,) and ``token_attr`` (n_output, n_input): in units of
        log p, norms of its gradient ("saliency"), or for "flow" the share of a feature in the state
        after a layer's attention, 0 to 1, summed over layers. For several layers an
        ``LLMLayerAttributionResult``, with those of each layer too; for a method by attention that
        is named an ``LLMAttentionAttributionResult``, with all weights.

    Raises:
        ValueError: the method is unknown or has no layers, a layer is not in the model, or the
            prompt or the target is empty; or the model has no head for it.
        TypeError: the prompt is none of the kinds above, or no model or tokenizer came.

    Example:
        >>> model, tokenizer = load_demo_model()
        >>> result = explain(model, tokenizer, "The capital of France is", " Paris")
        >>> result.seq_attr.shape, result.token_attr.shape
        (torch.Size([5]), torch.Size([1, 5]))

    Source: Kokhlikyan et al., "Captum" (2020), arXiv:2009.07896; Miglani et al., "Using Captum to
    explain generative language models" (2023), arXiv:2312.05491.
    """
    options = {"quadrature": quadrature, **kwargs}

    def run(name: str) -> LLMAttributionResult:
        wrapper, left = make_wrapper(model, tokenizer, name, layers, options)
        inp = as_input(prompt, tokenizer, context, task_of(model).name == QA)
        if method is None:
            left = _with_effect(left, wrapper)
        result: LLMAttributionResult = wrapper.attribute(inp, target=target, **left)
        return result  # it knows its method

    if method is not None:
        return run(method)
    check_pair(model, tokenizer)
    options = {name: value for name, value in options.items() if value is not None}
    result = first_that_reads(automatic_methods(model, layers, options), run)
    is_layered = isinstance(result, LLMLayerAttributionResult)
    return result.without_layers() if is_layered and layers is None else result


def make_wrapper(
    model: nn.Module,
    tokenizer: Any,
    method: str,
    layers: Layers | None,
    options: Mapping[str, Any],
) -> tuple[Attributing, dict[str, Any]]:
    """The wrapper of a method, and the options that are left for its `attribute`.

    Raises:
        ValueError: an unknown method or layer, a model without the head that is needed, or
            `quadrature` for a method without a path.
        TypeError: no model, or no tokenizer.
    """
    check_pair(model, tokenizer)  # before its embeddings are looked for
    row = method_named(method)
    made_with = (*row.settings, *row.wrapped_by.settings)
    settings = {**row.fixed, **{name: options[name] for name in made_with if name in options}}
    left = {name: value for name, value in options.items() if name not in settings}
    if left.get("quadrature") is None:
        left.pop("quadrature", None)
    elif "quadrature" not in row.renamed:
        names = [repr(name) for name, one in METHODS.items() if "quadrature" in one.renamed]
        raise ValueError(f"quadrature belongs to {' and '.join(names)}, got {method!r}")
    wrapper_class = load(row.wrapped_by.path)
    wrapper: Attributing = wrapper_class.of_method(method, model, tokenizer, layers, settings)
    return wrapper, {row.renamed.get(name, name): value for name, value in left.items()}


def _with_effect(options: Mapping[str, Any], wrapper: Attributing) -> dict[str, Any]:
    """Without options that change no result, where a method that was not named lacks them."""
    taken = wrapper.method_options() | keywords(wrapper.attribute)
    lacking = set(WITHOUT_EFFECT) - taken
    return {name: value for name, value in options.items() if name not in lacking}


def check_options(
    model: nn.Module,
    tokenizer: Any,
    method: str | None,
    layers: Layers | None,
    options: Mapping[str, Any],
) -> None:
    """Refuse options of `explain` that the method does not take, or that would do nothing.

    Raises:
        ValueError: an unknown method, layer or name, or a value without meaning.
        TypeError: an option that the method does not have; the message lists its options.
    """
    check_pair(model, tokenizer)
    is_chosen = method is None
    method = automatic_methods(model, layers, options)[0] if method is None else method
    wrapper, left = make_wrapper(model, tokenizer, method, layers, options)
    left = _with_effect(left, wrapper) if is_chosen else left
    names = wrapper.method_options() | (keywords(wrapper.attribute) - {"inp", "target"})
    if unknown := sorted(set(left) - names):
        back = {new: old for old, new in method_named(method).renamed.items()}
        listed = ", ".join(sorted(back.get(name, name) for name in names))
        hint = did_you_mean(unknown[0], (back.get(name, name) for name in names))
        raise TypeError(f"{method} does not take {', '.join(unknown)}; it takes {listed}{hint}")
    wrapper.check_options(left)
