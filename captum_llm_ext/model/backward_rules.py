"""Change the backward pass of a model: each operation of torch by the rule that a table has for it.

A rule takes the operation and its arguments and returns the operation's own output, with another
gradient. So scores stay as they are to the bit. What has no rule is differentiated as it is. The
rules need nothing of a model family: a mode of torch sees every operation, however it is spelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from captum_llm_ext.model.hooks import forward_name, patched

Operation: TypeAlias = Callable[..., Any]
Rule: TypeAlias = Callable[..., Any]  # (operation, *its arguments) → its output

# Functions of torch that call operations in Python: the mode sees the whole alone.
COMPOSED = frozenset({functional.multi_head_attention_forward})


@contextmanager
def changed_backward(rules: Mapping[str, Rule], whole: Iterable[nn.Module]) -> Iterator[None]:
    """Let forward passes build a graph by the rules; on leaving, everything is as before.

    rules: name of an operation → its rule. whole: modules that are one operation each, by the name
    of `one_operation`, however many they are spelled in.
    """
    names = [(module, forward_name(module)) for module in whole]
    patches = [(m, name, partial(one_operation, getattr(m, name))) for m, name in names]
    with patched(patches), _Mode(rules):
        yield


def one_operation(forward: Operation, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module as an operation of torch; it has its own gradient without a rule."""
    if has_torch_function(args):
        return handle_torch_function(one_operation, args, forward, *args, **kwargs)
    return forward(*args, **kwargs)


def with_writing(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules, and those of the operations that write their result into their first argument."""
    names = [name for name in rules if hasattr(Tensor, f"{name}_")]
    return {**rules, **{f"{name}_": partial(_write, rules[name], name) for name in names}}


class _Mode(TorchFunctionMode):
    """Calls the rule of each operation; what a rule calls has none."""

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


def _opened(function: FunctionType) -> FunctionType:
    """The same function, which calls its operations without asking whether a mode takes over."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    opened = FunctionType(function.__code__, names, argdefs=function.__defaults__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def _write(rule: Rule, name: str, run: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not any(map(has_gradient, (input, *args))):
        return run(input, *args, **kwargs)
    # A copy, since the graph needs the argument as it was.
    return input.copy_(rule(getattr(Tensor, name), input.clone(), *args, **kwargs))


# --- what rules are made of ----------------------------------------------------------------------


def has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def own_output(run: Operation, *args: Any, **kwargs: Any) -> Tensor:
    """The operation's output, without a gradient."""
    with torch.no_grad():
        return run(*args, **kwargs)


def with_gradient_of(expression: Tensor, own: Tensor) -> Tensor:
    """An operation's own output, with the gradient of an expression of the same value."""
    return _Own.apply(expression, lambda: own)


def share_of_gradient(x: Any, share: float) -> Any:
    """The same tensor, to which a share of the gradient flows."""
    return _Share.apply(x, share) if share < 1 and has_gradient(x) else x


def constant(x: Any) -> Any:
    """The same tensor, to which no gradient flows."""
    return x.detach() if isinstance(x, Tensor) else x


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, expression: Tensor, own: Callable[[], Tensor]) -> Tensor:
        return own()  # not an input of the function, so that a model may write into it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.share, None


# --- what a tensor comes from --------------------------------------------------------------------

# Nodes of autograd, without "Backward" and their number, that leave a gate a gate and a root a
# root: shapes, dtypes, dropout, and arithmetic with constants.
PASSING = frozenset(
    {
        *("Alias", "Clone", "Expand", "Index", "Permute", "Repeat", "ReshapeAlias", "Select"),
        *("Slice", "Split", "Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze"),
        *("View", "Add", "Sub", "Mul", "Div", "Clamp", "ClampMin", "MaskedFill", "NativeDropout"),
    }
)


def comes_from(x: Any, kinds: frozenset[str]) -> bool:
    """Whether a tensor is the output of such an operation, and was only passed on since."""
    node = x.grad_fn if kinds and has_gradient(x) else None
    while node is not None and (kind := _kind(node)) not in kinds:
        before = [earlier for earlier, _ in node.next_functions if earlier is not None]
        node = before[0] if kind in PASSING and len(before) == 1 else None
    return node is not None


def _kind(node: Any) -> str:
    """The name of a node's operation; "Sqrt" for a power of one half too."""
    kind: str = node.name().rstrip("0123456789").removesuffix("Backward")
    return "Sqrt" if kind == "Pow" and node._saved_exponent == 0.5 else kind
