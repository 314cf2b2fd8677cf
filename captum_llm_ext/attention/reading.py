"""One teacher-forced pass that keeps the attention of the selected layers and heads.

There are two ways to read it. Where a model hands queries, keys and values to a kernel
(`interface.py`), its kernel stays and the rows of the target are computed anew. Otherwise, and
where every row is needed, the model runs with eager attention, which returns the weights; its
scores must then be those of the model as it is. Either way, every attention that runs is read, or
it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_llm_ext.attention.block_flow import BlockRun, Heads, RunsTwiceError, running_blocks
from captum_llm_ext.attention.hooks import eager_attention, reading_weights
from captum_llm_ext.attention.interface import (
    UnreadableCallError,
    noting_callers,
    reading_heads,
)
from captum_llm_ext.attention.maps import LayerAttention
from captum_llm_ext.attention.values import cached_values, whole_cache
from captum_llm_ext.inputs.statements import Statements
from captum_llm_ext.model.hooks import evaluating, without_checkpointing
from captum_llm_ext.model.layers import decoder_blocks, named_layers
from captum_llm_ext.model.suitability import UnreadableAttentionError
from captum_llm_ext.scoring.checks import check_finite, is_random
from captum_llm_ext.scoring.positions import TargetSpan
from captum_llm_ext.scoring.teacher_forcing import Pass, TeacherForcing

FEW = 8  # tokens that show which blocks have attention


@dataclass(frozen=True)
class Selection:
    """The layers and heads whose attention is kept, and what is kept of each layer.

    layers: the modules in each layer, by the name that the caller used, or None for every layer;
    heads: indices, or None for all; prompt: keep the attention among the prompt's tokens; needs:
    the field of `LayerAttention` that the reduction needs besides the target's weights, or None;
    per_token: whether the target's tokens have rows of their own.
    """

    layers: Mapping[str, set[nn.Module]] | None = None
    heads: Sequence[int] | None = None
    prompt: bool = False
    needs: str | None = None
    per_token: bool = True
    statements: Statements | None = None

    @property
    def needs_every_row(self) -> bool:
        return self.prompt or self.needs in ("mean", "transitions")

    @property
    def needs_values(self) -> bool:
        return self.needs in ("norms", "flow", "transitions")

    def includes(self, module: nn.Module) -> bool:
        return self.layers is None or any(module in parts for parts in self.layers.values())

    def of_heads(self, name: str, values: Tensor, forcing: TeacherForcing) -> Tensor:
        """The selected heads of a layer's values (n_heads, …), in float32, beside the ids."""
        return values[self.head_indices(name, len(values))].float().to(forcing.ids.device)

    def head_indices(self, name: str, n_heads: int) -> list[int]:
        """The selected heads of a layer, which has so many."""
        heads = list(range(n_heads) if self.heads is None else self.heads)
        if not all(head < n_heads for head in heads):
            raise ValueError(f"heads must be in 0…{n_heads - 1}, as {name} has; got {heads}")
        return heads

    def check(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Refuse a model none of whose `modules` gave attention, and a layer that holds none."""
        if not modules:
            raise UnreadableAttentionError(
                f"{type(model).__name__} gives no attention weights: it has no attention, or its "
                "attention cannot be computed with the implementation 'eager'"
            )
        for layer, parts in (self.layers or {}).items():
            if not parts & set(modules.values()):
                names = ", ".join(list(modules)[:4]) + (", …" if len(modules) > 4 else "")
                raise ValueError(
                    f"layer {layer} holds no attention: expected a decoder block or its attention "
                    f"module, such as {names}"
                )


@torch.no_grad()
def read_attention(
    forcing: TeacherForcing, selection: Selection
) -> tuple[list[LayerAttention], Tensor]:
    """The attention of the selected layers, and log p (n_output,) of the target's tokens.

    The weights of all layers together may not fit in memory, so each layer's are cut to the
    selection while the model runs.
    """
    reading = _Reading(forcing, selection)
    with without_checkpointing(forcing.model):
        scored = None
        if not (selection.prompt or selection.needs == "mean"):
            scored = reading.by_interface()
        if scored is None:
            scored = reading.by_weights()
            check_eager(forcing, scored)
    check_finite(scored)
    reading.check_every_attention()
    selection.check(forcing.model, reading.modules)
    check_same_heads(reading.layers)
    return reading.layers, scored.token_scores()[0]


class _Reading:
    """Collects `layers`, the attention of each layer, while the model runs.

    ran: the modules in the blocks that ran; callers: those of them that called a kernel; silent:
    the blocks that ran without attention.
    """

    def __init__(self, forcing: TeacherForcing, selection: Selection) -> None:
        self.forcing, self.selection = forcing, selection
        self.blocks = decoder_blocks(forcing.model)
        self.names = {module: name for name, module in named_layers(forcing.model)}
        self._clear()
        length = forcing.row.length
        first = 0 if selection.needs_every_row else length - len(forcing.target)
        self.rows = torch.arange(first, length)

    def _clear(self) -> None:
        self.layers: list[LayerAttention] = []
        self.modules: dict[str, nn.Module] = {}
        self.ran, self.callers = set[nn.Module](), set[nn.Module]()
        self.silent: list[nn.Module] = []

    def by_interface(self) -> Pass | None:
        """Read where kernels are called; None where the model does not call them as expected."""
        modules = [module for block in self.blocks for module in block.modules()]
        try:
            with running_blocks(self.blocks, self._receive) as note, reading_heads(modules, note):
                scored = self.forcing.run(self.forcing.ids, self.forcing.whole)
        except (_NotExplainedError, UnreadableCallError, RunsTwiceError):
            scored = None
        if scored is None or not self.modules or self._unread() or self._silent_attend():
            self._clear()
            return None
        return scored

    def _silent_attend(self) -> bool:
        """Whether blocks that call no kernel have attention of their own: a few tokens tell."""
        if not self.silent:
            return False
        attention: list[object] = []
        ids, model = self.forcing.ids[:, :FEW], self.forcing.model
        read = reading_weights(self.silent, ids.size(1), lambda *_: None, attention.append)
        with eager_attention(model), read:
            self.forcing.run(ids, TargetSpan(0, 1), output_attentions=True)
        return bool(attention)

    def by_weights(self) -> Pass:
        """Read the weights that eager attention returns."""
        forcing, model = self.forcing, self.forcing.model
        cache = whole_cache(model) if self.selection.needs_values else None
        options: dict[str, object] = {"output_attentions": True}  # some families ask for it
        if cache is not None:
            options |= {"past_key_values": cache, "use_cache": True}

        def values_of(block: int, module: nn.Module, n_heads: int) -> Tensor | None:
            return None if cache is None else cached_values(cache, block, module, n_heads)

        with ExitStack() as stack:
            note = stack.enter_context(running_blocks(self.blocks, self._receive))
            stack.enter_context(eager_attention(model))
            modules = [module for block in self.blocks for module in block.modules()]
            self.callers = stack.enter_context(noting_callers(modules))
            length = forcing.row.length
            stack.enter_context(reading_weights(self.blocks, length, values_of, note))
            return forcing.run(forcing.ids, forcing.whole, **options)  # type: ignore[arg-type]

    def _receive(self, run: BlockRun) -> None:
        """Cut one layer's attention to the selection, in float32, beside the ids."""
        heads = run.heads
        self.ran.update(module for module, _, _ in run.modules)
        if heads is None:
            self.silent.append(run.block)
            return
        name = self.names[heads.module]
        self.modules[name] = heads.module
        if not self.selection.includes(heads.module):
            return
        weights = heads.weights(self.rows)
        if weights is None:
            raise _NotExplainedError
        _check_length(type(self.forcing.model).__name__, name, weights, self.forcing.row.length)
        _check_causal(type(self.forcing.model).__name__, name, weights, self.rows)
        self.layers.append(self._layer(name, run, heads, weights))

    def _layer(self, name: str, run: BlockRun, heads: Heads, weights: Tensor) -> LayerAttention:
        selection, forcing = self.selection, self.forcing
        n_prompt, n_output = forcing.row.n_prompt, len(forcing.target)
        selected = selection.of_heads(name, weights, forcing)
        indices, needs = selection.head_indices(name, len(weights)), selection.needs
        more: dict[str, Tensor | None] = {}
        if needs == "mean":
            more["mean"] = selected.mean(0)
        elif needs == "norms":
            more["norms"] = selection.of_heads(name, run.carried().norm(dim=-1), forcing)
        elif needs == "flow":
            flow = run.flow(self.rows[-n_output:], weights[:, -n_output:])
            rows = flow if selection.statements is None else flow.over(selection.statements)
            more["flow"] = rows.shares(indices) if selection.per_token else None
            more["span_flow"] = flow.together().shares(indices)[0]
        elif needs == "transitions":
            more["transitions"] = run.flow(self.rows, weights).transitions(indices)
        return LayerAttention(
            name=name,
            targets=selected[:, -n_output:].clone(),
            prompt=selected[:, :n_prompt, :n_prompt].clone() if selection.prompt else None,
            **{key: None if v is None else v.to(forcing.ids.device) for key, v in more.items()},
        )

    def check_every_attention(self) -> None:
        """Refuse a model of which an attention ran and was not read."""
        if unread := self._unread():
            raise UnreadableAttentionError(
                f"the attention of {', '.join(unread[:4])} cannot be read: it returns no weights "
                f"(n_heads, {self.forcing.row.length}, {self.forcing.row.length}) of all tokens to "
                "all tokens. Choose other layers"
            )

    def _unread(self) -> list[str]:
        """The selected modules that call a kernel, or are of a class that has attention elsewhere,
        and ran without giving it."""
        read = {part for module in self.modules.values() for part in module.modules()}
        kinds = {type(module) for module in self.modules.values()}
        attention = self.callers | {module for module in self.ran if type(module) in kinds}
        unread = (module for module in attention - read if self.selection.includes(module))
        return sorted(self.names[module] for module in unread)


def check_eager(forcing: TeacherForcing, scored: Pass) -> None:
    """Refuse eager attention with which the model has other scores than as it is."""
    check_finite(scored)
    with evaluating(forcing.model):
        expected = forcing.run(forcing.ids, forcing.whole)
    if not scored.agrees_with(expected) and not is_random(forcing):
        raise UnreadableAttentionError(
            f"{type(forcing.model).__name__} has other scores with eager attention, which returns "
            "the weights, than as it is: they are not the model's own weights. Let it compute "
            'everything so: model.set_attn_implementation("eager")'
        )


class _NotExplainedError(Exception):
    """The weights that were computed anew do not explain what the kernel returned."""


def _check_length(model: str, name: str, weights: Tensor, length: int) -> None:
    if weights.size(-1) != length:
        raise UnreadableAttentionError(
            f"{model} feeds {name} {weights.size(-1)} tokens, and prompt and target have {length}: "
            "it adds tokens, as prompt tuning does, and their attention is not told from the "
            "prompt's"
        )


def _check_causal(model: str, name: str, weights: Tensor, rows: Tensor) -> None:
    later = torch.arange(weights.size(-1)) > rows[:, None]
    if (weights * later.to(weights.device) > 0).any():
        raise UnreadableAttentionError(
            f"{model} is not causal: in {name} a token attends to later ones, so "
            "one pass does not give the attention with which the target is generated"
        )


def check_same_heads(layers: Sequence[LayerAttention]) -> None:
    counts = sorted({len(layer.targets) for layer in layers})
    if len(counts) > 1:
        raise UnreadableAttentionError(
            f"the layers have different numbers of heads, {counts}: choose heads that all of "
            "them have, or fewer layers"
        )
