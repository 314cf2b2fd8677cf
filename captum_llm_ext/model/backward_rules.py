"""Rules of relevance that take the place of derivatives while a model runs.

One table leads from the name of an operation of torch, in every spelling, to its rule; a mode of
torch looks each call up there. A rule returns the operation's own output, so that scores stay as
they are to the bit, with another gradient. What no rule covers is differentiated as it is.

Under the rules gradient times value is conserved: a norm's denominator is a constant; an activation
is a product of its input with the slope value/input; the factors of a product share its gradient.
AttnLRP: Achtibat et al. 2024, https://arxiv.org/abs/2402.05602. Conservative propagation, where
attention weights are constants: Ali et al. 2022, https://arxiv.org/abs/2202.07304.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from transformers.activations import LinearActivation

from captum_llm_ext.model.hooks import forward_name, patched

Operation: TypeAlias = Callable[..., Any]
Rule: TypeAlias = Callable[..., Any]  # (operation, *its arguments) → its output


@contextmanager
def relevance_rules(model: nn.Module, rules: str) -> Iterator[None]:
    """Run a model, and go backward through it, by the rules of `RULES[rules]`.

    Raises:
        ValueError: the model's attention runs in a kernel that no rule sees into.
    """
    _check_attention(model)
    activations = [module for module in model.modules() if _is_activation(module)]
    names = [forward_name(module) for module in activations]
    patches = [
        (module, name, partial(one_operation, getattr(module, name)))
        for module, name in zip(activations, names, strict=True)
    ]
    with patched(patches), _Mode(RULES[rules]):
        yield


class _Mode(TorchFunctionMode):
    """Looks up the rule of every operation; inside of a rule operations are as they are."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in COMPOSED:
            with self:
                return _opened(func)(*args, **kwargs)
        rule = self.rules.get(getattr(func, "__name__", ""))
        return func(*args, **kwargs) if rule is None else rule(func, *args, **kwargs)


# --- an operation's own output with another gradient ---------------------------------------------


class _Own(torch.autograd.Function):
    """An operation's own output, which has the gradient of an expression of the same value."""

    @staticmethod
    def forward(ctx: Any, expression: Tensor, own: Callable[[], Tensor]) -> Tensor:
        return own()  # no input of the function, so that a model may write into it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Share(torch.autograd.Function):
    """A tensor that takes a share of the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.share, None


def _with_gradient_of(expression: Tensor, own: Tensor) -> Tensor:
    return _Own.apply(expression, lambda: own)


def _share(x: Any, share: float) -> Any:
    return _Share.apply(x, share) if share < 1 and _has_gradient(x) else x


def _constant(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


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
    """(x − mean) · weight / σ."""
    dims = tuple(range(-len(normalized_shape), 0))
    own = _own(run, input, normalized_shape, weight, bias, eps, *more)
    expression = _over_deviation(_wide(input), dims, eps)
    return _with_gradient_of(expression if weight is None else expression * weight, own)


def group_norm(
    run: Operation,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *more: Any,
) -> Tensor:
    """(x − mean) · weight / σ of each group of channels."""
    own = _own(run, input, num_groups, weight, bias, eps, *more)
    groups = _wide(input).reshape(len(input), num_groups, -1)
    expression = _over_deviation(groups, (-1,), eps).reshape(input.shape)
    if weight is not None:
        expression = expression * weight.reshape(-1, *[1] * (input.dim() - 2))
    return _with_gradient_of(expression, own)


def rms_norm(
    run: Operation,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """x · weight / root of the mean square."""
    dims = tuple(range(-len(normalized_shape), 0))
    own = _own(run, input, normalized_shape, weight, eps)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = _wide(input)
    expression = x * (x.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    return _with_gradient_of(expression if weight is None else expression * weight, own)


def normalize(
    run: Operation, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, **more: Any
) -> Tensor:
    """x / norm."""
    norm = input.detach().norm(p, dim, keepdim=True).clamp_min(eps)
    return _with_gradient_of(input / norm, _own(run, input, p, dim, eps, **more))


def constant(run: Operation, *args: Any, **kwargs: Any) -> Any:
    """1/√x, which norms multiply by."""
    return run(*map(_constant, args), **{name: _constant(x) for name, x in kwargs.items()})


def quotient(run: Operation, input: Any, other: Any, **more: Any) -> Any:
    """x / y, where y may be a root or a norm."""
    return run(input, other.detach() if _comes_from(other, ROOTS) else other, **more)


def reciprocal(run: Operation, input: Any, *more: Any) -> Any:
    """1 / y, or any number / y, where y may be a root or a norm."""
    return run(input.detach() if _comes_from(input, ROOTS) else input, *more)


def power(run: Operation, input: Any, exponent: Any) -> Any:
    """x to the −1/2, as norms multiply by it, or to the n, which is a product of n equal factors."""
    if not isinstance(exponent, int | float):
        return run(input, exponent)
    if exponent == -0.5 or (exponent < 0 and _comes_from(input, ROOTS)):
        return constant(run, input, exponent)
    return run(_share(input, 1 / exponent) if exponent > 1 else input, exponent)


def square(run: Operation, input: Any) -> Any:
    return run(_share(input, 1 / 2))


# --- activations: the slope is value/input -------------------------------------------------------


def activation(run: Operation, input: Tensor, *more: Any, **options: Any) -> Tensor:
    """x · (f(x) / x) with the quotient as a constant, f′(0) where x is 0.

    A function that is not 0 at 0 has no such quotient, and is differentiated as it is.
    """
    in_place = options.pop("inplace", False)
    zero = torch.zeros((), dtype=input.dtype, device=input.device, requires_grad=True)
    at_zero = run(zero, *more, **options)
    if abs(float(at_zero.detach())) > NEARLY_ZERO:
        output = run(input, *more, **options)
    else:
        (slope_at_zero,) = torch.autograd.grad(at_zero, zero)
        own = _own(run, input, *more, **options)
        slope = torch.where(input.detach() == 0, slope_at_zero, own / input.detach())
        output = _with_gradient_of(input * slope, own)
    return input.copy_(output) if in_place else output


def glu(run: Operation, input: Tensor, dim: int = -1) -> Tensor:
    """a · sigmoid(b), the gate a constant."""
    value, gate = input.chunk(2, dim)
    return _with_gradient_of(value * gate.detach().sigmoid(), _own(run, input, dim))


NEARLY_ZERO = 1e-4


# --- products: the factors share the gradient ----------------------------------------------------


def product(
    run: Operation,
    *args: Any,
    factors: slice = slice(None),
    constants: frozenset[str] = frozenset(),
    **kwargs: Any,
) -> Any:
    """The gradient in equal parts to all factors that depend on the tokens.

    factors: which of the arguments are multiplied. constants: what a factor comes from that gets
    nothing, where another factor does not.
    """
    places = list(range(len(args)))[factors]
    tensors = [x for i in places for x in _listed(args[i]) if _has_gradient(x)]
    tensors += [x for x in kwargs.values() if _has_gradient(x)]
    fixed = [x for x in tensors if _comes_from(x, constants)] if len(tensors) > 1 else []
    if len(fixed) == len(tensors):
        fixed = []
    share = 1 / max(1, len(tensors) - len(fixed))

    def changed(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [changed(item) for item in x]
        return x.detach() if any(x is one for one in fixed) else _share(x, share)

    args = tuple(changed(x) if i in places else x for i, x in enumerate(args))
    return run(*args, **{name: changed(x) for name, x in kwargs.items()})


def attention(
    run: Operation, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any
) -> Tensor:
    """softmax(q kᵀ) v: half to v and half to the weights, of which q and k have half each."""
    of_weights = 1 / (1 + value.requires_grad)
    of_value = 1 / (1 + (query.requires_grad or key.requires_grad))
    of_each = of_weights / max(1, query.requires_grad + key.requires_grad)
    states = _share(query, of_each), _share(key, of_each), _share(value, of_value)
    return run(*states, *more, **options)


def constant_attention(
    run: Operation, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any
) -> Tensor:
    """softmax(q kᵀ) v, the weights constant."""
    states = (query.detach(), key.detach(), value)
    if not value.requires_grad:
        return run(*states, *more, **options)
    return run(*states, *map(_constant, more), **{k: _constant(x) for k, x in options.items()})


# --- operations of several parts -----------------------------------------------------------------


def one_operation(forward: Operation, *args: Any, **kwargs: Any) -> Any:
    """A module's forward as one operation of torch, which the table has a rule for."""
    if args and has_torch_function_unary(args[0]):
        return handle_torch_function(one_operation, args[:1], forward, *args, **kwargs)
    return forward(*args, **kwargs)


def module_activation(run: Operation, forward: Operation, *args: Any, **kwargs: Any) -> Any:
    return activation(forward, *args, **kwargs)


def _is_activation(module: nn.Module) -> bool:
    """Whether this is an activation of transformers, which may be spelled in several operations.

    Those of torch are one operation each.
    """
    kind = type(module)
    named = kind.__module__ == "transformers.activations" or kind.__name__.lower().endswith("gelu")
    return named and kind.__module__.startswith("transformers.") and kind is not LinearActivation


# Functions of torch that call operations in Python; a mode sees the whole alone.
COMPOSED = frozenset({functional.multi_head_attention_forward})


def _opened(function: FunctionType) -> FunctionType:
    """The same function, which does not ask for a mode before it calls its operations."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    opened = FunctionType(function.__code__, names, argdefs=function.__defaults__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def in_place(name: str, rule: Rule) -> Rule:
    """The rule of an operation that writes into its first argument."""

    def write(run: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(rule(getattr(torch.Tensor, name), input, *args, **kwargs))

    return write


# --- what a tensor was made by -------------------------------------------------------------------

# Nodes of autograd, without their number.
GATES = frozenset({"Sigmoid", "Hardsigmoid"})
WEIGHTS = frozenset({"Softmax"})
ROOTS = frozenset({"Sqrt", "LinalgVectorNorm", "Norm", "Std"})
# What leaves a gate a gate: shapes, dtypes, and arithmetic with constants.
PASSING = frozenset(
    {
        *("Alias", "Clone", "Expand", "Index", "Permute", "Repeat", "ReshapeAlias", "Select"),
        *("Slice", "Split", "Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze"),
        *("View", "Add", "Sub", "Mul", "Div", "Clamp", "ClampMin", "MaskedFill", "NativeDropout"),
    }
)


def _comes_from(x: Any, kinds: frozenset[str]) -> bool:
    """Whether the tensor was made by such an operation, and only passed on since."""
    node = x.grad_fn if kinds and _has_gradient(x) else None
    while node is not None:
        kind = node.name().rstrip("0123456789").removesuffix("Backward")
        if kind in kinds or (kinds is ROOTS and getattr(node, "_saved_exponent", None) == 0.5):
            return True
        before = [following for following, _ in node.next_functions if following is not None]
        node = before[0] if kind in PASSING and len(before) == 1 else None
    return False


# --- helpers of the rules ------------------------------------------------------------------------


def _own(run: Operation, *args: Any, **kwargs: Any) -> Tensor:
    """The operation's output, without a gradient."""
    with torch.no_grad():
        return run(*args, **kwargs)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over_deviation(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    variance = x.detach().var(dims, correction=0, keepdim=True)
    return (x - x.mean(dims, keepdim=True)) * (variance + eps).rsqrt()


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]


def _check_attention(model: nn.Module) -> None:
    configs = [getattr(module, "config", None) for module in model.modules()]
    names = {str(getattr(config, "_attn_implementation", None)) for config in configs}
    if opaque := sorted(name for name in names if any(x in name for x in ("flash", "flex", "/"))):
        raise ValueError(
            f"expected attention 'sdpa' or 'eager', got {opaque[0]!r}, whose kernel the rules of "
            "relevance do not reach: call model.set_attn_implementation('sdpa') first"
        )


# --- the table -----------------------------------------------------------------------------------


def _table(attends: Rule, mixes: Rule) -> dict[str, Rule]:
    """Name of an operation → its rule. `attends`: of attention; `mixes`: of a matrix product."""
    multiplies = partial(product, constants=GATES)
    rules: dict[str, Rule] = {
        "scaled_dot_product_attention": attends,
        **dict.fromkeys(("matmul", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner"), mixes),
        "einsum": partial(mixes, factors=slice(1, None)),
        "linear": partial(mixes, factors=slice(0, 2)),
        **dict.fromkeys(
            ("addmm", "baddbmm", "addbmm", "addmv"), partial(mixes, factors=slice(1, 3))
        ),
        **dict.fromkeys(("mul", "multiply", "outer"), multiplies),
        "addcmul": partial(multiplies, factors=slice(1, 3)),
        **dict.fromkeys(("div", "divide", "true_divide"), quotient),
        **dict.fromkeys(("__rdiv__", "reciprocal"), reciprocal),
        **dict.fromkeys(("pow", "float_power"), power),
        "square": square,
        "rsqrt": constant,
        "layer_norm": layer_norm,
        "group_norm": group_norm,
        "rms_norm": rms_norm,
        "normalize": normalize,
        "one_operation": module_activation,
        # relu, leaky_relu and prelu have this slope themselves
        **dict.fromkeys(("tanh", "silu", "gelu", "mish", "elu", "celu", "selu"), activation),
        **dict.fromkeys(("hardswish", "hardtanh", "relu6", "softsign", "tanhshrink"), activation),
        "glu": glu,
    }
    written = {f"{name}_": in_place(name, rule) for name, rule in rules.items()}
    return {**rules, **{name: rule for name, rule in written.items() if hasattr(Tensor, name)}}


RULES: dict[str, dict[str, Rule]] = {
    "cp": _table(constant_attention, partial(product, constants=WEIGHTS)),
    "attnlrp": _table(attention, product),
}
