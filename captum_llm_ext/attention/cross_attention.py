"""The attention that the decoder of an encoder-decoder model pays to the encoder's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.attention.hooks import eager_attention, possible_weights
from captum_llm_ext.attention.maps import LayerAttention
from captum_llm_ext.attention.reading import Selection, check_eager, check_same_heads
from captum_llm_ext.model.hooks import without_checkpointing
from captum_llm_ext.model.layers import decoder_blocks, named_layers
from captum_llm_ext.scoring.teacher_forcing import Pass, TeacherForcing, read_logits

CROSS_REDUCTIONS = ("mean", "max")  # the others multiply layers, or need values of one stack


@torch.no_grad()
def read_cross_attention(
    forcing: TeacherForcing, selection: Selection
) -> tuple[list[LayerAttention], Tensor]:
    """The cross-attention of the selected layers, and log p (n_output,) of the target's tokens.

    The keys are the encoder's positions alone: `targets` is (n_heads, n_output, n_encoder). The
    first of the ids that the decoder begins with may predict none of the target's tokens.
    """
    n_output = len(forcing.target)
    model: Any = forcing.model.model
    blocks = decoder_blocks(model.get_decoder())
    with without_checkpointing(model), eager_attention(model), _returned_by(blocks) as returned:
        output = forcing.model(forcing.ids, output_attentions=True)
    scored = Pass(forcing.target, forcing.whole, read_logits(output)[:, -n_output:])
    check_eager(forcing, scored)
    names = {module: name for name, module in named_layers(model)}
    weights_of = {
        returned[w.data_ptr()][0]: w[0, :, -n_output:] for w in output.cross_attentions or ()
    }
    selection.check(model, {names[module]: module for module in weights_of})
    layers = [
        LayerAttention(names[module], selection.of_heads(names[module], weights, forcing))
        for module, weights in weights_of.items()
        if selection.includes(module)
    ]
    check_same_heads(layers)
    return layers, scored.token_scores()[0]


@contextmanager
def _returned_by(blocks: Sequence[nn.Module]) -> Iterator[dict[int, tuple[nn.Module, Tensor]]]:
    """The innermost module that returned a tensor shaped as weights, by the tensor's address."""
    returned: dict[int, tuple[nn.Module, Tensor]] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        for weights in possible_weights(output):  # held, so that no address is used twice
            returned.setdefault(weights.data_ptr(), (module, weights))

    with ExitStack() as stack:
        for module in (part for block in blocks for part in block.modules()):
            stack.callback(module.register_forward_hook(note).remove)
        yield returned
