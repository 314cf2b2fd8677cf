"""Tiny models whose later layers use keys and values of earlier ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import transformers
from torch import nn

from tests.models.families import VOCAB_SIZE, _randomise

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_kv_shared_layers": 2,
    "pad_token_id": 3,
}
SHARING: dict[str, dict[str, Any]] = {
    "gemma4": {**_SMALL, "global_head_dim": 8},
    "gemma3n": {
        **_SMALL,
        "intermediate_size": [48] * 4,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
}


@cache
def sharing_model(family: str, implementation: str = "sdpa") -> nn.Module:
    """The family's tiny model in evaluation mode, with this attention implementation."""
    name = f"{family[0].upper()}{family[1:]}TextConfig"
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    config = getattr(transformers, name)(**SHARING[family])
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation(implementation)
    return _randomise(model)
