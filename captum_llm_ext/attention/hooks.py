"""Read attention weights while a model runs, and restore its attention implementation after.

Only the "eager" implementation of transformers returns the softmaxed weights: the attention module
of every family then returns them beside its output, with its own masks, soft caps and sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

EAGER = "eager"


@dataclass(frozen=True, eq=False)
class WeightedHeads:
    """The attention of one module, from the weights that it returned.

    all_weights: (n_heads, length, length), query by key; cached: (n_heads, length, head_dim) or
    None, where they are not needed.
    """

    module: nn.Module
    all_weights: Tensor
    cached: Tensor | None

    @property
    def values(self) -> Tensor:
        if self.cached is None:
            raise ValueError("the values of this attention were not kept")
        return self.cached

    @property
    def mixed(self) -> Tensor:
        """(length, n_heads, head_dim) the weighted values."""
        return (self.all_weights.float() @ self.values).transpose(0, 1)

    def weights(self, rows: Tensor) -> Tensor:
        """(n_heads, n_rows, length) the rows of these queries."""
        return self.all_weights[:, rows.to(self.all_weights.device)].float()


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
def reading_weights(
    blocks: Sequence[nn.Module],
    length: int,
    values_of: Callable[[int, nn.Module, int], Tensor | None],
    receive: Callable[[WeightedHeads], None],
) -> Iterator[None]:
    """Hand the attention of every block over `length` tokens to `receive` while one row runs.

    The attention module of a block is the innermost module that returns weights of that shape; the
    modules around it hand them on, and any other module has weights of its own.
    values_of: from block, module and number of heads to the values, or None.
    """
    attention_of: dict[int, nn.Module] = {}  # by index of the block

    def hand_on(block: int, module: nn.Module, args: Any, output: Any) -> None:
        shape = (length, length)
        tensors = (w for w in possible_weights(output) if w.shape[-2:] == shape)
        # Keys and states may have that shape too, and softmaxed weights are not negative.
        weights = next((w for w in tensors if not (w < 0).any()), None)
        if weights is None:
            return
        attention = attention_of.setdefault(block, module)
        if attention is not module and attention in set(module.modules()):
            return  # handed on
        values = values_of(block, module, weights.size(1))
        receive(WeightedHeads(module, weights[0], values))

    with ExitStack() as stack:
        for block, module in ((i, m) for i, b in enumerate(blocks) for m in b.modules()):
            stack.callback(module.register_forward_hook(partial(hand_on, block)).remove)
        yield


def possible_weights(output: Any) -> list[Tensor]:
    """The tensors in a module's output that are shaped as weights, (1, n_heads, query, key)."""
    items = output if isinstance(output, tuple | list) else ()
    tensors = (x for x in items if isinstance(x, Tensor) and x.is_floating_point())
    return [x for x in tensors if x.dim() == 4 and x.size(0) == 1]
