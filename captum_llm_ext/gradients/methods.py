"""The gradient methods: `LayerSaliency`, and for each supported method what it does with gradients.

A new method is one function that reads its options into a `PointRule` or a `PathRule`, and one
line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from captum.attr import (
    LayerConductance,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import Tensor, nn

from captum_llm_ext.compat import (
    GradientAttribution,
    LayerAttribution,
    compute_layer_gradients_and_eval,
)
from captum_llm_ext.gradients.quadrature import ADAPTIVE, FEWEST_ROWS, check_steps, fixed_rule

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(-1),
    "l1": lambda values: values.abs().sum(-1),
    "l2": lambda values: values.norm(dim=-1),
    "linf": lambda values: values.abs().amax(-1),
}


class LayerSaliency(LayerAttribution, GradientAttribution):
    """Norm of the gradient of the score with respect to a layer, per token.

    Args:
        forward_func: the model.
        layer: a layer, a list of layers, or names and patterns of layers when used with
            `LLMGradientAttribution`.
        norm: over the hidden units of a token: "l1", "l2" or "linf". Default: "l1".

    Raises:
        ValueError: unknown norm.

    The attribution of a token has the unit of the score per unit of the layer; it is never
    negative, and it does not add up to a difference of scores.

    Simonyan et al. 2013, Deep Inside Convolutional Networks, https://arxiv.org/abs/1312.6034;
    with the norm over embeddings, Li et al. 2016, https://arxiv.org/abs/1506.01066.

    Example:
        >>> method = LayerSaliency(model, model.get_input_embeddings())
        >>> result = LLMGradientAttribution(method, tokenizer).attribute(inp, target=" Paris")
        >>> result.seq_attr.shape
        torch.Size([5])
    """

    def __init__(self, forward_func: Callable[..., Any], layer: Any, norm: str = "l1") -> None:
        LayerAttribution.__init__(self, forward_func, layer)
        GradientAttribution.__init__(self, forward_func)
        if norm not in NORMS or norm == "sum":
            raise ValueError(f"norm must be 'l1', 'l2' or 'linf', got {norm!r}")
        self.norm = norm

    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Norms (batch, sequence) of ∂forward_func/∂layer; a list of them for a list of layers.

        The arguments are those of Captum's `LayerGradientXActivation.attribute`.
        """
        gradients, _ = compute_layer_gradients_and_eval(
            self.forward_func,
            self.layer,
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input=attribute_to_layer_input,
            grad_kwargs=grad_kwargs,
        )
        several = not isinstance(self.layer, nn.Module)
        norms = [NORMS[self.norm](g[0]) for g in (gradients if several else [gradients])]
        return norms if several else norms[0]


@dataclass(frozen=True)
class PointRule:
    """Gradients at the input itself, of any number of layers from one pass.

    norm: how the hidden units of a token combine; multiply: gradient times the layer's value.
    """

    norm: str = "sum"
    multiply: bool = False


@dataclass(frozen=True)
class PathRule:
    """Weighted gradients at points between the layer's baseline (0) and its value (1).

    multiply: times input minus baseline; stdev: of Gaussian noise on the layer's value, drawn
    from `seed` for each layer; is_random: whether another trial would give another result;
    is_integral: whether the attributions ought to sum to the difference of the scores;
    is_conductance: whether the embeddings walk the path, and layers are read on the way; tolerance:
    relative, on that sum, of adaptive quadrature, which chooses the points itself within
    `max_rows` of them; None for the given points.
    """

    points: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    multiply: bool = True
    stdev: float = 0.0
    is_integral: bool = True
    is_conductance: bool = False
    is_random: bool = False
    seed: int = 0
    tolerance: float | None = None
    max_rows: int = 0
    norm: str = "sum"


Rule = PointRule | PathRule


def _saliency(method: LayerSaliency) -> Rule:
    return PointRule(norm=method.norm)


def _gradient_x_activation(method: LayerGradientXActivation) -> Rule:
    return PointRule(multiply=method.multiplies_by_inputs)


def _integrated_gradients(
    method: LayerIntegratedGradients,
    *,
    n_steps: int | None = None,
    rule: str = "gausslegendre",
    tol: float | None = None,
    max_rows: int | None = None,
) -> Rule:
    if rule == ADAPTIVE:
        if not method.multiplies_by_inputs:
            raise ValueError('method="adaptive" needs multiply_by_inputs=True: it checks the sums')
        return _adaptive(n_steps, tol, max_rows)
    _check_fixed(tol, max_rows)
    n_steps = 50 if n_steps is None else n_steps
    points, weights = fixed_rule(rule, n_steps)
    multiply = method.multiplies_by_inputs
    return PathRule(tuple(points), tuple(weights), multiply, is_integral=multiply)


def _check_fixed(tol: float | None, max_rows: int | None) -> None:
    if tol is not None or max_rows is not None:
        raise ValueError('tol and max_rows belong to method="adaptive"')


def _adaptive(n_steps: int | None, tol: float | None, max_rows: int | None) -> PathRule:
    tol, max_rows = 0.05 if tol is None else tol, 1000 if max_rows is None else max_rows
    if n_steps is not None:
        raise ValueError('n_steps belongs to the fixed rules; method="adaptive" takes max_rows')
    if not tol > 0:
        raise ValueError(f"tol must be greater than 0, got {tol}")
    if max_rows < FEWEST_ROWS:
        raise ValueError(f"max_rows must be at least {FEWEST_ROWS}, got {max_rows}")
    return PathRule(tolerance=float(tol), max_rows=max_rows)


def _conductance(
    method: LayerConductance,
    *,
    n_steps: int | None = None,
    rule: str = "gausslegendre",
    tol: float | None = None,
    max_rows: int | None = None,
) -> Rule:
    """Dhamdhere et al. 2018, https://arxiv.org/abs/1805.12233.

    By Captum's sum: between each two of n_steps + 1 points, the gradient at the first of them
    times how the layer changes.
    """
    if rule == ADAPTIVE:
        return replace(_adaptive(n_steps, tol, max_rows), is_conductance=True)
    _check_fixed(tol, max_rows)
    check_steps(rule, n_steps := 50 if n_steps is None else n_steps)
    points, weights = fixed_rule(rule, n_steps + 1)
    return PathRule(tuple(points), tuple(weights), is_conductance=True)


def _gradient_shap(method: LayerGradientShap, *, n_samples: int = 5, stdevs: float = 0.0) -> Rule:
    """Expected gradients, Erion et al. 2021, https://arxiv.org/abs/1906.10670."""
    if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
        raise ValueError(f"n_samples must be an int >= 1, got {n_samples!r}")
    if isinstance(stdevs, bool) or not isinstance(stdevs, int | float) or stdevs < 0:
        raise ValueError(f"stdevs must be a number >= 0, one for all layers; got {stdevs!r}")
    points = tuple(torch.rand(n_samples).tolist())
    weights = (1.0 / n_samples,) * n_samples
    seed = int(torch.randint(2**31, ()))
    multiply = method.multiplies_by_inputs
    return PathRule(points, weights, multiply, float(stdevs), False, is_random=True, seed=seed)


RULES: dict[type, tuple[Callable[..., Rule], Mapping[str, str]]] = {
    # method class: (rule from its options, the options' names in `attribute` -> in the function)
    LayerSaliency: (_saliency, {}),
    LayerGradientXActivation: (_gradient_x_activation, {}),
    LayerIntegratedGradients: (
        _integrated_gradients,
        {"n_steps": "n_steps", "method": "rule", "tol": "tol", "max_rows": "max_rows"},
    ),
    LayerConductance: (
        _conductance,
        {"n_steps": "n_steps", "method": "rule", "tol": "tol", "max_rows": "max_rows"},
    ),
    LayerGradientShap: (_gradient_shap, {"n_samples": "n_samples", "stdevs": "stdevs"}),
}


def check_baselines(rule: Rule, baselines: Any, method: str) -> None:
    """Refuse a baseline where there is no path that could start at it."""
    if baselines is not None and isinstance(rule, PointRule):
        raise ValueError(f"baselines mean nothing to {method}, which has no path")


def read_rule(method: GradientAttribution, options: Mapping[str, Any]) -> Rule:
    """The rule of a method with the options given to `attribute`.

    Raises:
        TypeError: an option that the method does not have.
    """
    build, names = next(rule for kind, rule in RULES.items() if isinstance(method, kind))
    unknown = sorted(set(options) - set(names))
    if unknown:
        known = ", ".join(names) or "none"
        raise TypeError(
            f"{type(method).__name__} does not take {', '.join(unknown)} (its own options: {known})"
        )
    return build(method, **{names[name]: value for name, value in options.items()})
