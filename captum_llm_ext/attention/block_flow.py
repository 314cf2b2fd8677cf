"""Find the parts of a decoder block around its attention: entering state, projection, norm, scale.

Nothing here knows a family: the output projection is the module that is fed what the kernel gave, a
norm on the attention's output is the module that is fed the projection's output, and the factor of
the residual connection is read off the next module that is fed their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from captum_llm_ext.attention.information_flow import BlockFlow
from captum_llm_ext.attention.values import agree, linear_map, not_a_sum
from captum_llm_ext.model.suitability import UnreadableAttentionError
from captum_llm_ext.scoring.teacher_forcing import tolerance


class Heads(Protocol):
    """One call of an attention, however it was read.

    module: that called it; values: (n_heads, length, head_dim); mixed: (length, n_heads, head_dim),
    the weighted values.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def mixed(self) -> Tensor: ...
    def weights(self, rows: Tensor) -> Tensor | None:
        """The softmaxed weights (n_heads, n_rows, length), or None where they are not known."""


@dataclass
class BlockRun:
    """One run of a decoder block.

    block: the module; state: (1, length, hidden) what enters it; heads: the call of attention in
    it; modules: each module that ran inside with its input and output (1, length, …), in the order
    in which they ended.
    """

    block: nn.Module
    state: Tensor | None
    heads: Heads | None = None
    modules: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)

    def carried(self) -> Tensor:
        """(n_heads, length, hidden) what each head's value becomes in the output projection.

        Raises:
            UnreadableAttentionError: the attention's output is not a projected sum of values.
        """
        heads = self._heads()
        mixed = heads.mixed.flatten(1)
        first = mixed.data_ptr()  # the projection is mostly fed the same memory
        # A layer that wraps the projection, as LoRA's, ends after it and adds to what it gives.
        outer_first = list(reversed(self.modules))
        outer_first.sort(key=lambda run: run[1].data_ptr() != first)
        for module, inputs, outputs in outer_first:
            if inputs.shape == (1, *mixed.shape) and agree(inputs[0], mixed, inputs.dtype):
                matrix = linear_map(module, inputs, outputs)
                if matrix is not None:
                    return heads.values @ matrix.unflatten(0, (heads.values.size(0), -1))
        raise not_a_sum(heads.module)

    def flow(self, rows: Tensor, weights: Tensor) -> BlockFlow:
        """The flow at the rows (n_rows,), from the weights (n_heads, n_rows, length) there.

        Raises:
            UnreadableAttentionError: the attention's output is not a projected sum of values.
        """
        heads, carried = self._heads(), self.carried()
        if self.state is None:
            raise not_a_sum(heads.module)
        rows = rows.to(carried.device)
        states, added = self.state[0, rows].float(), self._output_of(heads.module)[0, rows].float()
        norm = self._norm(heads.module)
        scales = added.new_ones(len(rows))
        if norm is not None:
            linear = Normalisation.of(norm, self.state)
            scales, added = linear.scales(added), linear(added)
            carried = linear.apply(carried)
        scales = scales * self._residual_factor(states, rows, added)
        return BlockFlow(states, weights * scales[:, None], carried)

    def _heads(self) -> Heads:
        if self.heads is None:
            raise ValueError("no attention ran in this block")
        return self.heads

    def _output_of(self, attention: nn.Module) -> Tensor:
        """The first tensor (1, length, hidden) that the attention module returned."""
        return next(output for module, _, output in self.modules if module is attention)

    def _norm(self, attention: nn.Module) -> nn.Module | None:
        """The module that is fed the attention's output, if it is not linear."""
        output = self._output_of(attention)
        inside = set(attention.modules())
        for module, inputs, result in self.modules:
            same = inputs.shape == output.shape and inputs.data_ptr() == output.data_ptr()
            if module not in inside and same and not torch.equal(inputs, result):
                return module
        return None

    def _residual_factor(self, states: Tensor, rows: Tensor, added: Tensor) -> float:
        """The factor by which the block scales the attention's output before the residual sum."""
        if self.state is None:
            return 1.0
        seen = {self.state.data_ptr()}
        for _, inputs, _ in self.modules:
            if inputs.shape != self.state.shape or inputs.data_ptr() in seen:
                continue
            seen.add(inputs.data_ptr())  # several modules are fed the same
            difference = inputs[0, rows].float() - states
            factor = float((difference * added).sum() / added.square().sum().clamp(min=1e-30))
            error = (difference - factor * added).abs().max()
            if factor and error <= 10 * tolerance(inputs.dtype) * difference.abs().max():
                return factor
        return 1.0  # a parallel block, where nothing is fed the sum


@dataclass(frozen=True, eq=False)
class Normalisation:
    """A norm as the linear map that it is at each row: scale · weight · (x − mean), and a bias."""

    norm: nn.Module
    weight: Tensor
    bias: Tensor
    centred: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, norm: nn.Module, like: Tensor) -> Normalisation:
        """The norm of states such as `like` (…, hidden)."""
        unit = torch.ones_like(like.reshape(-1, like.size(-1))[0])
        unit[1::2] = -1  # mean 0 (of an even width), mean square 1
        rows = torch.stack([torch.zeros_like(unit), unit, unit + 1])
        zero, image, shifted = norm.forward(rows[None])[0].float()
        weight = (image - zero) * unit.float()
        centred = agree(shifted, image, torch.bfloat16)
        return cls(norm, weight, zero, centred, like.dtype)

    def apply(self, values: Tensor) -> Tensor:
        """The linear map at scale 1, without the bias."""
        values = values - values.mean(-1, keepdim=True) if self.centred else values
        return values * self.weight

    def __call__(self, values: Tensor) -> Tensor:
        outputs: Tensor = self.norm.forward(values.to(self.dtype)[None])[0].float()
        return outputs - self.bias

    def scales(self, values: Tensor) -> Tensor:
        """(n_rows,) the factor at each row (n_rows, hidden)."""
        mapped = self.apply(values)
        return (self(values) * mapped).sum(-1) / mapped.square().sum(-1).clamp(min=1e-30)


class RunsTwiceError(UnreadableAttentionError):
    """A block, or an attention in it, ran more than once in one pass."""


@contextmanager
def running_blocks(
    blocks: Sequence[nn.Module], receive: Callable[[BlockRun], None]
) -> Iterator[Callable[[Heads], None]]:
    """Hand each block's run to `receive` when it ends; yields what notes the calls of attention.

    A block may end without any.

    One run is held at a time.
    """
    index_of = {module: i for i, block in enumerate(blocks) for module in block.modules()}
    runs: dict[int, BlockRun] = {}
    ended: set[int] = set()

    def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runs[index_of[block]] = BlockRun(block, _first_state((*args, *kwargs.values())))

    def note(heads: Heads) -> None:
        index = index_of[heads.module]
        other = runs[index].heads
        if other is not None and other.module is not heads.module:
            raise RunsTwiceError(
                f"block {index} holds two attentions, {type(other.module).__name__} and "
                f"{type(heads.module).__name__}: the attention of such a model cannot be read"
            )
        if other is not None or index in ended:
            raise RunsTwiceError(
                f"block {index} runs more than once in a forward pass, so its attention is "
                "not defined: choose other layers"
            )
        runs[index].heads = heads

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = _first_state((*args, *kwargs.values()))
        state = _first_state(output if isinstance(output, tuple | list) else (output,))
        run = runs.get(index_of[module])
        if run is not None and inputs is not None and state is not None:
            run.modules.append((module, inputs, state))

    def end(block: nn.Module, args: Any, output: Any) -> None:
        run = runs.pop(index_of[block])
        if run.heads is not None:
            ended.add(index_of[block])
        receive(run)

    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):  # a model may use one block at several depths
            hook = block.register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(hook.remove)
            for module in block.modules():
                if module is not block:
                    hook = module.register_forward_hook(keep, with_kwargs=True)
                    stack.callback(hook.remove)
            stack.callback(block.register_forward_hook(end).remove)
        yield note


def _first_state(values: Iterable[Any]) -> Tensor | None:
    """The first floating-point tensor (1, length, …) of several values."""
    tensors = (x for x in values if isinstance(x, Tensor) and x.is_floating_point())
    return next((x for x in tensors if x.dim() == 3), None)
