"""The rules of relevance: one table from the operations of a model to changed derivatives.

Value times gradient is conserved from layer to layer by them. The denominator of a norm is a
constant. An activation is its input times the constant value/input. The factors of a product share
its gradient. AttnLRP, Achtibat et al. 2024, https://arxiv.org/abs/2402.05602. With attention
weights as constants: conservative propagation, Ali et al. 2022, https://arxiv.org/abs/2202.07304.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import LinearActivation

from captum_llm_ext.model.backward_rules import (
    Operation,
    Rule,
    changed_backward,
    comes_from,
    constant,
    has_gradient,
    own_output,
    share_of_gradient,
    with_gradient_of,
    with_writing,
)

# Nodes of autograd; see `comes_from`.
GATES = frozenset({"Sigmoid", "Hardsigmoid"})
WEIGHTS = frozenset({"Softmax"})
ROOTS = frozenset({"Sqrt", "LinalgVectorNorm", "Norm", "Std"})
NEARLY_ZERO = 1e-4


def relevance_rules(model: nn.Module, rules: str) -> AbstractContextManager[None]:
    """Run a model, and go backward through it, by the rules of `RULES[rules]`.

    Raises:
        ValueError: the model's attention runs in a kernel whose inside the rules do not reach.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    kernels = {str(getattr(config, "_attn_implementation", None)) for config in configs}
    if closed := sorted(x for x in kernels if "flash" in x or "flex" in x or "/" in x):
        raise ValueError(
            f"expected attention 'sdpa' or 'eager', got {closed[0]!r}, whose kernel the rules of "
            "relevance do not reach: call model.set_attn_implementation('sdpa') first"
        )
    return changed_backward(RULES[rules], filter(_is_activation, model.modules()))


def _is_activation(module: nn.Module) -> bool:
    """Whether this is an activation of transformers; those of torch are one operation anyway."""
    kind = type(module)
    if kind.__module__ == "transformers.activations":
        return kind is not LinearActivation  # it hands on its input itself
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith("Gelu")


# --- normalisations: the denominator is a constant -----------------------------------------------


def layer_norm(
    run: Operation,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *more: Any,
) -> Tensor:
    """(x − mean) / σ · weight."""
    own = own_output(run, input, normalized_shape, weight, bias, eps, *more)
    scaled = _over_deviation(_wide(input), tuple(range(-len(normalized_shape), 0)), eps)
    return with_gradient_of(scaled if weight is None else scaled * weight, own)


def group_norm(
    run: Operation,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *more: Any,
) -> Tensor:
    """(x − mean) / σ · weight, of each group of channels."""
    own = own_output(run, input, num_groups, weight, bias, eps, *more)
    groups = _wide(input).reshape(len(input), num_groups, -1)
    scaled = _over_deviation(groups, (-1,), eps).reshape(len(input), input.size(1), -1)
    scaled = scaled if weight is None else scaled * weight[:, None]
    return with_gradient_of(scaled.reshape(input.shape), own)


def rms_norm(
    run: Operation,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """x / root of the mean square · weight."""
    own = own_output(run, input, normalized_shape, weight, eps)
    x, dims = _wide(input), tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    scaled = x * (x.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    return with_gradient_of(scaled if weight is None else scaled * weight, own)


def normalize(
    run: Operation, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, **more: Any
) -> Tensor:
    """x / norm."""
    own = own_output(run, input, p, dim, eps, **more)
    norm = input.detach().norm(p, dim, keepdim=True).clamp_min(eps)
    return with_gradient_of(input / norm, own)


def inverse_root(run: Operation, input: Tensor) -> Any:
    """1/√x."""
    return run(constant(input))


def quotient(run: Operation, input: Any, other: Any, **more: Any) -> Any:
    """x / y, where y may be a root or a norm."""
    return run(input, constant(other) if comes_from(other, ROOTS) else other, **more)


def reciprocal(run: Operation, input: Any, *numerator: Any) -> Any:
    """1 / y or a number / y, where y may be a root or a norm."""
    return run(constant(input) if comes_from(input, ROOTS) else input, *numerator)


def power(run: Operation, input: Any, exponent: Any) -> Any:
    """1/√x where the exponent says so, or a product of equal factors."""
    if not isinstance(exponent, int | float):
        return run(input, exponent)
    if exponent == -0.5 or (exponent < 0 and comes_from(input, ROOTS)):
        return run(constant(input), exponent)
    return run(share_of_gradient(input, 1 / max(1, exponent)), exponent)


def square(run: Operation, input: Tensor) -> Tensor:
    """x², a product of equal factors."""
    return run(share_of_gradient(input, 1 / 2))


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over_deviation(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    variance = x.detach().var(dims, correction=0, keepdim=True)
    return (x - x.mean(dims, keepdim=True)) * (variance + eps).rsqrt()


# --- activations: the slope is value/input -------------------------------------------------------


def activation(run: Operation, input: Tensor, *more: Any, **options: Any) -> Tensor:
    """x · (f(x)/x), the quotient a constant: f′(0) where x is 0.

    A function that is not 0 at 0 has no such quotient, and is differentiated as it is.
    """
    in_place = any(option is True for option in (*more, *options.values()))

    def function(x: Tensor) -> Tensor:
        return run(x.clone() if in_place else x, *more, **options)

    zero = torch.zeros((), dtype=input.dtype, device=input.device, requires_grad=True)
    at_zero = function(zero)
    if abs(float(at_zero.detach())) > NEARLY_ZERO:
        output = function(input)
    else:
        (slope_at_zero,) = torch.autograd.grad(at_zero, zero)
        own, x = own_output(function, input), input.detach()
        slope = torch.where(x == 0, slope_at_zero, own / x)
        output = with_gradient_of(input * slope, own)
    return input.copy_(output) if in_place else output


def activation_module(run: Operation, forward: Operation, input: Tensor) -> Tensor:
    """A module that is an activation, in however many operations."""
    return activation(forward, input)


def gated(run: Operation, input: Tensor, dim: int = -1) -> Tensor:
    """a · sigmoid(b), the gate a constant."""
    value, gate = input.chunk(2, dim)
    return with_gradient_of(value * gate.detach().sigmoid(), own_output(run, input, dim))


# --- products: the factors share the gradient ----------------------------------------------------


def product(
    run: Operation,
    *args: Any,
    factors: slice = slice(None),
    fixed: frozenset[str] = frozenset(),
    **kwargs: Any,
) -> Any:
    """Equal parts of the gradient to all factors that depend on the tokens.

    factors: which of the arguments are multiplied; those by name are where all are. fixed: what a
    factor comes from that is a constant beside another factor.
    """
    within = range(len(args))[factors]
    named = kwargs if factors == slice(None) else {}
    multiplied = [args[i] for i in within] + list(named.values())
    if len(multiplied) == 1 and isinstance(multiplied[0], list | tuple):  # einsum takes a list
        multiplied = list(multiplied[0])
    dependent = [x for x in multiplied if has_gradient(x)]
    moving = [x for x in dependent if not comes_from(x, fixed)] or dependent
    share = 1 / max(1, len(moving))

    def changed(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [changed(item) for item in x]
        if any(x is factor for factor in moving):
            return share_of_gradient(x, share)
        return constant(x)

    args = tuple(changed(x) if i in within else x for i, x in enumerate(args))
    return run(*args, **{**kwargs, **{name: changed(x) for name, x in named.items()}})


def attention(
    run: Operation, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any
) -> Tensor:
    """softmax(q kᵀ) v: half to v and half to the weights, whose half q and k share."""
    n_scores = query.requires_grad + key.requires_grad
    n_mixed = value.requires_grad + bool(n_scores)
    of_weights = 1 / max(1, n_scores * n_mixed)
    query, key = share_of_gradient(query, of_weights), share_of_gradient(key, of_weights)
    return run(query, key, share_of_gradient(value, 1 / max(1, n_mixed)), *more, **options)


def attention_of_values(
    run: Operation, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any
) -> Tensor:
    """softmax(q kᵀ) v, the weights constant."""
    options = {name: constant(x) for name, x in options.items()}
    return run(constant(query), constant(key), value, *map(constant, more), **options)


# --- the table -----------------------------------------------------------------------------------


def _table(attends: Rule, mixes: Rule) -> dict[str, Rule]:
    """Name of an operation → its rule. attends: of attention; mixes: of a product of matrices."""
    multiplies = partial(product, fixed=GATES)
    after_first, first_two, last_two = slice(1, None), slice(0, 2), slice(1, 3)
    rules: dict[str, Rule] = {
        **_all("layer_norm", layer_norm),
        **_all("group_norm", group_norm),
        **_all("rms_norm", rms_norm),
        **_all("normalize", normalize),
        **_all("rsqrt", inverse_root),
        **_all("div divide true_divide", quotient),
        **_all("reciprocal __rdiv__", reciprocal),
        **_all("pow", power),
        **_all("square", square),
        # relu, leaky_relu and prelu have the slope value/input by themselves
        **_all("tanh silu gelu mish elu celu selu softsign tanhshrink", activation),
        **_all("hardswish hardtanh relu6", activation),
        **_all("one_operation", activation_module),
        **_all("glu", gated),
        **_all("mul multiply outer", multiplies),
        **_all("addcmul", partial(multiplies, factors=last_two)),
        **_all("matmul __rmatmul__ mm bmm mv dot inner", mixes),
        **_all("addmm baddbmm addbmm addmv", partial(mixes, factors=last_two)),
        **_all("linear", partial(mixes, factors=first_two)),
        **_all("einsum", partial(mixes, factors=after_first)),
        **_all("scaled_dot_product_attention", attends),
    }
    return with_writing(rules)


def _all(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, dict[str, Rule]] = {
    "cp": _table(attention_of_values, partial(product, fixed=WEIGHTS)),
    "attnlrp": _table(attention, product),
}
