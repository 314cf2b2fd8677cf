"""The values that attention carries, and the linear map that follows them.

The output of an attention module at position i is Σ over heads h and keys j of α_hij f_h(x_j), and
a bias. f_h(x_j) is the value of head h at j, multiplied by the head's part of the output projection
(Kobayashi et al. 2020, https://arxiv.org/abs/2004.10102, section 2). With eager attention the
values come from the key/value cache, where every family keeps them, whichever projections it fuses.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from captum_llm_ext.attention.hooks import configs
from captum_llm_ext.compat import DynamicLayer, DynamicSlidingWindowLayer
from captum_llm_ext.model.suitability import UnreadableAttentionError
from captum_llm_ext.scoring.teacher_forcing import tolerance

POSITIONS = 8  # that show whether a module is linear


def whole_cache(model: nn.Module) -> DynamicCache:
    """An empty cache that keeps every position, also in layers with a sliding window."""
    cache = DynamicCache(config=configs(model)[0])
    cache.layers = [
        DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache


def cached_values(cache: Any, block: int, module: nn.Module, n_heads: int) -> Tensor:
    """The values (n_heads, length, head_dim) of an attention module that has just filled the cache.

    Heads that share values share them here too.

    Raises:
        UnreadableAttentionError: the cache holds something else.
    """
    index = getattr(module, "layer_idx", block)
    values = getattr(cache.layers[index], "values", None) if index < len(cache.layers) else None
    if not isinstance(values, Tensor) or values.dim() != 4 or n_heads % values.size(1):
        raise not_a_sum(module)
    return values[0].float().repeat_interleave(n_heads // values.size(1), dim=0)


def linear_map(module: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor | None:
    """The matrix of a module that is linear but for a bias, whatever its class; else None.

    inputs and outputs: (1, length, …) of one run, which the matrix must explain.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
        for matrix in (weight.detach().float().T, weight.detach().float()):
            if _explains(matrix, inputs[0], outputs[0]):
                return matrix
    if not _takes_one(module):
        return None
    unit = torch.eye(inputs.size(-1), dtype=inputs.dtype, device=inputs.device)
    # `forward` and not the module itself, so that its hooks do not run.
    zero, images = module.forward(torch.cat([torch.zeros_like(unit[:1]), unit])[None])[0].split(
        [1, len(unit)]
    )
    matrix = (images - zero).float()
    return matrix if _explains(matrix, inputs[0], outputs[0]) else None


def _takes_one(module: nn.Module) -> bool:
    """Whether the module runs on one tensor alone."""
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError:
        return False
    return True


def _explains(matrix: Tensor, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether the outputs are the inputs times the matrix, and a bias: a few positions tell."""
    inputs, outputs = inputs[-POSITIONS:], outputs[-POSITIONS:]
    if matrix.shape != (inputs.size(-1), outputs.size(-1)):
        return False
    bias = outputs.float() - inputs.float() @ matrix
    allowed = tolerance(inputs.dtype) * outputs.abs().max()
    return bool((bias - bias[:1]).abs().max() <= allowed)


def agree(values: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether values are as expected, up to their dtype."""
    allowed = tolerance(dtype) * expected.abs().max()
    return bool((values.float() - expected.float()).abs().max() <= allowed)


def not_a_sum(module: nn.Module) -> UnreadableAttentionError:
    """Says why the flow and the value norms of an attention module are not defined."""
    return UnreadableAttentionError(
        f"the reductions 'value_norm', 'flow' and 'flow_rollout' are not defined for "
        f"{type(module).__name__}: its output is not the sum of the values in the cache, weighted "
        "and projected; use 'mean', 'max' or 'rollout'"
    )
