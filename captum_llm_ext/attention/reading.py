"""One teacher-forced pass that keeps the attention of chosen layers and heads."""

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
class Wanted:
    """What of the attention is kept.

    layers: each layer as it was asked for, with all modules in it, or None for every layer; heads:
    their indices, or None for all; prompt: the attention among the prompt's tokens; mean: over
    heads, at every position; norms: of the values that are carried.
    """

    layers: Mapping[str, set[nn.Module]] | None = None
    heads: Sequence[int] | None = None
    prompt: bool = False
    mean: bool = False
    norms: bool = False

    def includes(self, module: nn.Module) -> bool:
        return self.layers is None or any(module in parts for parts in self.layers.values())


@torch.no_grad()
def read_attention(forcing: TeacherForcing, wanted: Wanted) -> tuple[list[LayerAttention], Tensor]:
    """The attention of each chosen layer, and log p (n_output,) of the target's tokens.

    The weights of all layers together may not fit in memory, so each layer's are cut to what is
    wanted while the model runs.
    """
    model, length = forcing.model, forcing.ids.size(1)
    names = {module: name for name, module in model.named_modules()}
    seen: dict[str, nn.Module] = {}
    layers: list[LayerAttention] = []
    # Some families give the weights of their modules only where the model is asked for them.
    options: dict[str, Any] = {"output_attentions": True}
    if wanted.norms:
        options["past_key_values"] = whole_cache(model)

    def receive(call: AttentionCall) -> None:
        name = names[call.module]
        seen[name] = call.module
        if wanted.includes(call.module):
            _check_causal(model, name, call.weights)
            norms = value_norms(call, options["past_key_values"]) if wanted.norms else None
            layers.append(_kept(name, call.weights, norms, forcing, wanted))

    with ExitStack() as stack:
        stack.enter_context(without_checkpointing(model))
        stack.enter_context(eager_attention(model))
        blocks = decoder_blocks(model)
        stack.enter_context(reading_attention(blocks, length, receive, wanted.norms))
        run = forcing.run(forcing.ids, forcing.whole, use_cache=wanted.norms, **options)
    check_finite(run)
    check_layers(model, wanted, seen)
    check_same_heads(layers)
    return layers, run.token_scores()[0]


def _kept(
    name: str, weights: Tensor, norms: Tensor | None, forcing: TeacherForcing, wanted: Wanted
) -> LayerAttention:
    """What is wanted of the weights (n_heads, length, length) of one layer, in float32."""
    device, n_prompt, n_output = forcing.ids.device, forcing.row.n_prompt, len(forcing.target)
    chosen = chosen_heads(name, weights, wanted).to(device)
    return LayerAttention(
        name=name,
        targets=chosen[:, -n_output:].clone(),
        prompt=chosen[:, :n_prompt, :n_prompt].clone() if wanted.prompt else None,
        mean=chosen.mean(0) if wanted.mean else None,
        norms=None if norms is None else chosen_heads(name, norms, wanted).to(device),
    )


def chosen_heads(name: str, values: Tensor, wanted: Wanted) -> Tensor:
    """Of values (n_heads, …) of a layer's heads those that are wanted, in float32."""
    heads = list(range(len(values)) if wanted.heads is None else wanted.heads)
    if not all(head < len(values) for head in heads):
        raise ValueError(f"heads must be in 0…{len(values) - 1}, as {name} has; got {heads}")
    return values[heads].float()


def _check_causal(model: nn.Module, name: str, weights: Tensor) -> None:
    if (weights.triu(1) > 0).any():
        raise ValueError(
            f"{type(model).__name__} is not causal: in {name} a token attends to later ones, so "
            "one pass does not give the attention with which the target is generated"
        )


def check_layers(model: nn.Module, wanted: Wanted, seen: Mapping[str, nn.Module]) -> None:
    """Refuse a model without any attention weights, and a layer without any."""
    if not seen:
        raise ValueError(
            f"{type(model).__name__} gives no attention weights: it has no attention, or its "
            "attention cannot be computed with the implementation 'eager'"
        )
    for layer, parts in (wanted.layers or {}).items():
        if not parts & set(seen.values()):
            names = ", ".join(list(seen)[:4]) + (", …" if len(seen) > 4 else "")
            raise ValueError(
                f"layer {layer} holds no attention: expected a decoder block or its attention "
                f"module, such as {names}"
            )


def check_same_heads(layers: Sequence[LayerAttention]) -> None:
    counts = sorted({len(layer.targets) for layer in layers})
    if len(counts) > 1:
        raise ValueError(
            f"the layers have different numbers of heads, {counts}: choose heads that all of "
            "them have, or fewer layers"
        )
