"""Read attention weights while a model runs, and restore its attention implementation after.

Only the "eager" implementation of transformers returns the softmaxed weights: the attention module
of every family then returns them beside its output, with its own masks, soft caps and sinks.
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

    block: index of the decoder block that holds it; weights: (n_heads, length, length), query by
    key; inputs: each submodule that ran, with its input (1, length, width).
    """

    block: int
    module: nn.Module
    weights: Tensor
    inputs: list[tuple[nn.Module, Tensor]]


def configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The configurations of a model and of its parts, each once, the outer before the inner."""
    by_id: dict[int, PreTrainedConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in by_id:
            by_id[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(by_id.values())


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Let the model compute attention with the implementation that returns the weights."""
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
    """Hand the attention of every block over `length` tokens to `receive` while one row runs.

    The attention module of a block is the innermost module that returns weights of that shape.
    Nothing is kept, since the weights of all layers together may not fit in memory.
    """
    attention_of: dict[int, nn.Module] = {}  # by index of the block
    inputs: dict[nn.Module, Tensor] = {}

    def hand_on(block: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            shape = (length, length)
            weights = next((w for w in possible_weights(output) if w.shape[-2:] == shape), None)
            if weights is None or attention_of.get(block, module) is not module:
                return
            if block in attention_of:
                raise ValueError(
                    f"block {block} runs more than once in a forward pass, so its attention is "
                    "not defined: choose other layers"
                )
            attention_of[block] = module
            parts = [(part, inputs[part]) for part in module.children() if part in inputs]
            inputs.clear()
            receive(AttentionCall(block, module, weights[0], parts))

        return hook

    def keep_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            inputs[module] = args[0]

    with ExitStack() as stack:
        for block, module in ((i, m) for i, b in enumerate(blocks) for m in b.modules()):
            stack.callback(module.register_forward_hook(hand_on(block)).remove)
            if with_inputs:
                stack.callback(module.register_forward_pre_hook(keep_input).remove)
        yield


def possible_weights(output: Any) -> list[Tensor]:
    """The tensors in a module's output that are shaped as weights, (1, n_heads, query, key)."""
    items = output if isinstance(output, tuple | list) else ()
    tensors = (x for x in items if isinstance(x, Tensor) and x.is_floating_point())
    return [x for x in tensors if x.dim() == 4 and x.size(0) == 1]
