"""One teacher-forced pass that keeps the attention of the selected layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.attention.hooks import AttentionCall, eager_attention, reading_attention
from captum_llm_ext.attention.maps import LayerAttention
from captum_llm_ext.attention.value_norms import value_norms, whole_cache
from captum_llm_ext.model.hooks import without_checkpointing
from captum_llm_ext.model.layers import decoder_blocks
from captum_llm_ext.scoring.checks import check_finite
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing


@dataclass(frozen=True)
class Selection:
    """The layers and heads whose attention is kept, and what is kept of each layer.

    layers: the modules in each layer, by the name that the caller used, or None for every layer;
    heads: indices, or None for all; prompt: keep the attention among the prompt's tokens; mean:
    keep the mean over heads at every position; norms: keep the norms of the values.
    """

    layers: Mapping[str, set[nn.Module]] | None = None
    heads: Sequence[int] | None = None
    prompt: bool = False
    mean: bool = False
    norms: bool = False

    def includes(self, module: nn.Module) -> bool:
        return self.layers is None or any(module in parts for parts in self.layers.values())

    def of_heads(self, name: str, values: Tensor, forcing: TeacherForcing) -> Tensor:
        """The selected heads of a layer's values (n_heads, …), in float32, beside the ids."""
        heads = list(range(len(values)) if self.heads is None else self.heads)
        if not all(head < len(values) for head in heads):
            raise ValueError(f"heads must be in 0…{len(values) - 1}, as {name} has; got {heads}")
        return values[heads].float().to(forcing.ids.device)

    def check(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Refuse a model none of whose `modules` gave attention, and a layer that holds none."""
        if not modules:
            raise ValueError(
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

    The weights of all layers together may not fit in memory, so each layer's weights are cut to
    the selection while the model runs.
    """
    model = forcing.model
    names = {module: name for name, module in model.named_modules()}
    modules: dict[str, nn.Module] = {}
    layers: list[LayerAttention] = []
    cache = whole_cache(model) if selection.norms else None

    def receive(call: AttentionCall) -> None:
        name = names[call.module]
        modules[name] = call.module
        if selection.includes(call.module):
            _check_causal(model, name, call.weights)
            norms = None if cache is None else value_norms(call, cache)
            layers.append(_cut(name, call.weights, norms, forcing, selection))

    # Some families return the weights of their modules only with this option.
    options: dict[str, Any] = {"output_attentions": True}
    if cache is not None:
        options |= {"past_key_values": cache, "use_cache": True}
    with ExitStack() as stack:
        stack.enter_context(without_checkpointing(model))
        stack.enter_context(eager_attention(model))
        blocks, length = decoder_blocks(model), forcing.ids.size(1)
        stack.enter_context(reading_attention(blocks, length, receive, selection.norms))
        scored = forcing.run(forcing.ids, forcing.whole, **options)
    check_finite(scored)
    selection.check(model, modules)
    check_same_heads(layers)
    return layers, scored.token_scores()[0]


def _cut(
    name: str, weights: Tensor, norms: Tensor | None, forcing: TeacherForcing, selection: Selection
) -> LayerAttention:
    """The selection from the weights (n_heads, length, length) of one layer, in float32."""
    n_prompt, n_output = forcing.row.n_prompt, len(forcing.target)
    weights = selection.of_heads(name, weights, forcing)
    return LayerAttention(
        name=name,
        targets=weights[:, -n_output:].clone(),
        prompt=weights[:, :n_prompt, :n_prompt].clone() if selection.prompt else None,
        mean=weights.mean(0) if selection.mean else None,
        norms=None if norms is None else selection.of_heads(name, norms, forcing),
    )


def _check_causal(model: nn.Module, name: str, weights: Tensor) -> None:
    if (weights.triu(1) > 0).any():
        raise ValueError(
            f"{type(model).__name__} is not causal: in {name} a token attends to later ones, so "
            "one pass does not give the attention with which the target is generated"
        )


def check_same_heads(layers: Sequence[LayerAttention]) -> None:
    counts = sorted({len(layer.targets) for layer in layers})
    if len(counts) > 1:
        raise ValueError(
            f"the layers have different numbers of heads, {counts}: choose heads that all of "
            "them have, or fewer layers"
        )
