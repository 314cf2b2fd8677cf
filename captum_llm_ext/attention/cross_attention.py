"""The attention that the decoder of an encoder-decoder model pays to the encoder's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.attention.hooks import eager_attention
from captum_llm_ext.attention.maps import LayerAttention
from captum_llm_ext.attention.reading import Wanted, check_layers, check_same_heads, chosen_heads
from captum_llm_ext.model.hooks import without_checkpointing
from captum_llm_ext.model.layers import decoder_blocks
from captum_llm_ext.scoring.checks import check_finite
from captum_llm_ext.scoring.teacher_forcing import Pass, TeacherForcing, read_logits

Returned = list[tuple[nn.Module, Tensor]]


@torch.no_grad()
def read_cross_attention(
    forcing: TeacherForcing, wanted: Wanted
) -> tuple[list[LayerAttention], Tensor]:
    """The cross-attention of each chosen layer, and log p (n_output,) of the target's tokens.

    Positions are the encoder's alone: targets (n_heads, n_output, n_encoder).
    """
    model: Any = forcing.model.model
    blocks = decoder_blocks(model.get_decoder())
    with without_checkpointing(model), eager_attention(model), _weights_of(blocks) as returned:
        output = forcing.model(forcing.ids, output_attentions=True)
    scored = Pass(forcing.target, forcing.whole, read_logits(output)[:, -len(forcing.target) :])
    check_finite(scored)
    names = {module: name for name, module in model.named_modules()}
    weights = {_module_of(w, returned): w[0] for w in output.cross_attentions or ()}
    seen = {names[module]: module for module in weights}
    check_layers(model, wanted, seen)
    device = forcing.ids.device
    layers = [
        LayerAttention(name, chosen_heads(name, weights[module], wanted).to(device))
        for name, module in seen.items()
        if wanted.includes(module)
    ]
    check_same_heads(layers)
    return layers, scored.token_scores()[0]


@contextmanager
def _weights_of(blocks: Sequence[nn.Module]) -> Iterator[Returned]:
    """What may be attention weights (1, n_heads, query, key), with the module that returned it."""
    returned: Returned = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        items = output if isinstance(output, tuple | list) else ()
        returned.extend((module, x) for x in items if isinstance(x, Tensor) and x.dim() == 4)

    with ExitStack() as stack:
        for module in (part for block in blocks for part in block.modules()):
            stack.callback(module.register_forward_hook(keep).remove)
        yield returned


def _module_of(weights: Tensor, returned: Returned) -> nn.Module:
    """The innermost module that returned the weights: it did so first."""
    place = weights.data_ptr()
    return next(module for module, tensor in returned if tensor.data_ptr() == place)
