"""How large the vectors are that attention carries: Kobayashi et al. 2020.

The output of an attention module at position i is Σ over heads h and keys j of α_hij f_h(x_j), and
a bias, where f_h(x_j) is head h's value at j put through the head's part of the output projection
(https://arxiv.org/abs/2004.10102, section 2). Values are read from the key/value cache, where
every family keeps them, however it fuses its projections; heads that share values share them here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from captum_llm_ext.attention.hooks import AttentionCall, configs
from captum_llm_ext.compat import DynamicLayer, DynamicSlidingWindowLayer
from captum_llm_ext.scoring.teacher_forcing import tolerance


def whole_cache(model: nn.Module) -> DynamicCache:
    """An empty cache that will keep every position, of layers with a sliding window too."""
    cache = DynamicCache(config=configs(model)[0])
    cache.layers = [
        DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache


def value_norms(call: AttentionCall, cache: Any) -> Tensor:
    """‖f_h(x_j)‖, (n_heads, length), of an attention module that has just filled the cache.

    Raises:
        ValueError: the module's output is not the projected sum of the values in the cache, as
            where it is gated or normalised, or where the cache holds something else.
    """
    values = _values(call, cache)
    projection = _output_projection(call, values)
    by_head = projection.unflatten(0, (values.size(0), -1))
    pairs = zip(values, by_head, strict=True)
    return torch.stack([(value @ part).norm(dim=-1) for value, part in pairs])


def _values(call: AttentionCall, cache: Any) -> Tensor:
    """The values (n_heads, length, head_dim) of every head."""
    layer = getattr(call.module, "layer_idx", call.block)
    values = getattr(cache.layers[layer], "values", None) if layer < len(cache.layers) else None
    n_heads = call.weights.size(0)
    if not isinstance(values, Tensor) or values.dim() != 4 or n_heads % values.size(1):
        raise ValueError(_not_a_sum(call))
    return values[0].float().repeat_interleave(n_heads // values.size(1), dim=0)


def _output_projection(call: AttentionCall, values: Tensor) -> Tensor:
    """The matrix (n_heads · head_dim, hidden) of the part that reads the weighted values."""
    if call.weights.size(-1) != values.size(1):
        raise ValueError(_not_a_sum(call))
    mixed = (call.weights.float() @ values).transpose(0, 1).flatten(1)
    for part, given in call.inputs:
        if given.shape == (1, *mixed.shape) and _agree(given[0], mixed, given.dtype):
            matrix = _linear_map(part, given)
            if matrix is not None:
                return matrix
    raise ValueError(_not_a_sum(call))


def _linear_map(part: nn.Module, given: Tensor) -> Tensor | None:
    """The matrix of a part that is linear but for a bias, whatever class it is, or None."""
    unit = torch.eye(given.size(-1), dtype=given.dtype, device=given.device)
    probe = torch.cat([torch.zeros_like(unit[:1]), unit, given[0]])
    # Not by calling the module, whose hooks are not to see this.
    zero, images, found = part.forward(probe[None])[0].split([1, len(unit), given.size(1)])
    matrix = (images - zero).float()
    linear = given[0].float() @ matrix + zero
    return matrix if _agree(found, linear, given.dtype) else None


def _agree(found: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    allowed = tolerance(dtype) * truth.abs().max()
    return bool((found.float() - truth.float()).abs().max() <= allowed)


def _not_a_sum(call: AttentionCall) -> str:
    return (
        f"reduction='value_norm' is not defined for {type(call.module).__name__}: its output is "
        "not the sum of the values in the cache, weighted and projected; use 'mean', 'max' or "
        "'rollout'"
    )
