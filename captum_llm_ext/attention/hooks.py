"""Read attention weights while a model runs; its attention implementation is put back on leaving.

Transformers gives the softmaxed weights with the "eager" implementation alone: every family's
attention module then returns them beside its output, each with its own masks, soft caps and sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

EAGER = "eager"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One run of an attention module.

    block: its place among the decoder blocks; weights: (n_heads, length, length), query by key;
    inputs: the module's parts, each with what it was called with, (1, length, width).
    """

    block: int
    module: nn.Module
    weights: Tensor
    inputs: list[tuple[nn.Module, Tensor]]


def configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The configurations of a model and of its parts, each once, those that hold others first."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        _add_config(getattr(module, "config", None), found)
    return list(found.values())


def _add_config(config: Any, found: dict[int, PreTrainedConfig]) -> None:
    if isinstance(config, PreTrainedConfig) and id(config) not in found:
        found[id(config)] = config
        for name in config.sub_configs:
            _add_config(getattr(config, name, None), found)


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Let the model compute attention in the way that gives the weights."""
    before = [(config, config._attn_implementation) for config in configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = EAGER
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def reading_attention(
    blocks: Sequence[nn.Module],
    length: int,
    receive: Callable[[AttentionCall], None],
    with_inputs: bool = False,
) -> Iterator[None]:
    """Hand every block's attention over `length` tokens to `receive`, as the model runs one row.

    The module that holds it is the innermost one which returns weights of that shape. Nothing is
    kept, since the weights of all layers together may not fit in memory.
    """
    seen: dict[int, nn.Module] = {}
    inputs: dict[nn.Module, Tensor] = {}

    def watch(block: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weights = _attention_weights(output, length)
            if weights is None or seen.get(block, module) is not module:
                return
            if block in seen:
                raise ValueError(
                    f"block {block} runs more than once in a forward pass, so its attention is "
                    "not defined: choose other layers"
                )
            seen[block] = module
            parts = [(part, inputs[part]) for part in module.children() if part in inputs]
            inputs.clear()
            receive(AttentionCall(block, module, weights[0], parts))

        return hook

    def keep_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            inputs[module] = args[0]

    with ExitStack() as stack:
        for block, module in ((i, m) for i, b in enumerate(blocks) for m in b.modules()):
            stack.callback(module.register_forward_hook(watch(block)).remove)
            if with_inputs:
                stack.callback(module.register_forward_pre_hook(keep_input).remove)
        yield


def _attention_weights(output: Any, length: int) -> Tensor | None:
    """The weights (1, n_heads, length, length) in a module's output, if it holds any."""
    items = output if isinstance(output, tuple | list) else ()
    found = (x for x in items if isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point())
    return next((x for x in found if x.size(0) == 1 and x.shape[-2:] == (length, length)), None)
