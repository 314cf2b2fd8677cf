"""The norms of the vectors that attention carries: Kobayashi et al. 2020.

The output of an attention module at position i is Σ over heads h and keys j of α_hij f_h(x_j), and
a bias. f_h(x_j) is the value of head h at j, multiplied by the head's part of the output projection
(https://arxiv.org/abs/2004.10102, section 2). The values come from the key/value cache, where every
family keeps them, whichever projections it fuses. Heads that share values share them here too.
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
    """An empty cache that keeps every position, also in layers with a sliding window."""
    cache = DynamicCache(config=configs(model)[0])
    cache.layers = [
        DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache


def value_norms(call: AttentionCall, cache: Any) -> Tensor:
    """‖f_h(x_j)‖ (n_heads, length) of an attention module that has just filled the cache.

    Raises:
        ValueError: the module's output is not the projected sum of the values in the cache: for
            example it is gated or normalised, or the cache holds something else.
    """
    values = _values(call, cache)
    by_head = _output_projection(call, values).unflatten(0, (values.size(0), -1))
    pairs = zip(values, by_head, strict=True)
    return torch.stack([(value @ part).norm(dim=-1) for value, part in pairs])


def _values(call: AttentionCall, cache: Any) -> Tensor:
    """The values (n_heads, length, head_dim) of every head."""
    index = getattr(call.module, "layer_idx", call.block)
    values = getattr(cache.layers[index], "values", None) if index < len(cache.layers) else None
    n_heads = call.weights.size(0)
    if not isinstance(values, Tensor) or values.dim() != 4 or n_heads % values.size(1):
        raise ValueError(_not_a_sum(call))
    return values[0].float().repeat_interleave(n_heads // values.size(1), dim=0)


def _output_projection(call: AttentionCall, values: Tensor) -> Tensor:
    """The matrix (n_heads · head_dim, hidden) of the submodule that reads the weighted values."""
    if call.weights.size(-1) != values.size(1):
        raise ValueError(_not_a_sum(call))
    weighted = (call.weights.float() @ values).transpose(0, 1).flatten(1)
    for module, inputs in call.inputs:
        if inputs.shape == (1, *weighted.shape) and _agree(inputs[0], weighted, inputs.dtype):
            matrix = _linear_map(module, inputs)
            if matrix is not None:
                return matrix
    raise ValueError(_not_a_sum(call))


def _linear_map(module: nn.Module, inputs: Tensor) -> Tensor | None:
    """The matrix of a module that is linear but for a bias, whatever its class; else None."""
    unit = torch.eye(inputs.size(-1), dtype=inputs.dtype, device=inputs.device)
    rows = torch.cat([torch.zeros_like(unit[:1]), unit, inputs[0]])
    # `forward` and not the module itself, so that its hooks do not run.
    zero, images, outputs = module.forward(rows[None])[0].split([1, len(unit), inputs.size(1)])
    matrix = (images - zero).float()
    return matrix if _agree(outputs, inputs[0].float() @ matrix + zero, inputs.dtype) else None


def _agree(values: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    allowed = tolerance(dtype) * expected.abs().max()
    return bool((values.float() - expected.float()).abs().max() <= allowed)


def _not_a_sum(call: AttentionCall) -> str:
    return (
        f"reduction='value_norm' is not defined for {type(call.module).__name__}: its output is "
        "not the sum of the values in the cache, weighted and projected; use 'mean', 'max' or "
        "'rollout'"
    )
