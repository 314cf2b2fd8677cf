"""Tiny random encoder-decoder models, and their scores and attributions token by token."""

from __future__ import annotations

from functools import cache
from typing import Any

import captum.attr
import torch
import transformers
from torch import Tensor, nn

from captum_llm_ext import TextTokenInput
from tests.models.families import PROMPT, VOCAB_SIZE, _randomise, tiny_tokenizer
from tests.oracles.cases import BASELINE

_BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "scale_embedding": True,
}
_T5 = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Config", {**_T5, "decoder_start_token_id": 3}),
    "bart": (
        "BartConfig",
        {**_BART, "decoder_start_token_id": 2, "forced_bos_token_id": 1, "forced_eos_token_id": 2},
    ),
    "marian": ("MarianConfig", {**_BART, "decoder_start_token_id": 3}),
}
FAMILIES = tuple(CONFIGS)

_BART_LAYERS = {
    "embedding": "model.encoder.embed_tokens",
    "decoder_embedding": "model.decoder.embed_tokens",
    "encoder_block": "model.encoder.layers.1",
    "encoder_projection": "model.encoder.layers.1.self_attn.q_proj",
    "encoder_mlp": "model.encoder.layers.1.fc2",
    "decoder_mlp": "model.decoder.layers.1.fc2",
    "cross_key": "model.decoder.layers.1.encoder_attn.k_proj",
}
LAYERS: dict[str, dict[str, str]] = {
    "t5": {
        "embedding": "encoder.embed_tokens",
        "decoder_embedding": "decoder.embed_tokens",
        "encoder_block": "encoder.block.1.layer.1",
        "encoder_projection": "encoder.block.1.layer.0.SelfAttention.q",
        "encoder_mlp": "encoder.block.1.layer.1.DenseReluDense",
        "decoder_mlp": "decoder.block.1.layer.2.DenseReluDense",
        "cross_key": "decoder.block.1.layer.1.EncDecAttention.k",
    },
    "bart": _BART_LAYERS,
    "marian": _BART_LAYERS,
}


@cache
def tiny_seq2seq(family: str) -> nn.Module:
    return fresh_seq2seq(family)


def fresh_seq2seq(family: str) -> nn.Module:
    kind, settings = CONFIGS[family]
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    fixed = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    _randomise(model)
    model.load_state_dict(fixed, strict=False)  # sinusoids, which are not saved with a model
    return model


def target_of(count: int) -> Tensor:
    """The first `count` token ids of a target, up to as many as the prompt's and more."""
    text = " plays golf, hiking with friends in Palm Coast"
    ids = tiny_tokenizer().encode(text, add_special_tokens=False)
    assert count <= len(ids)
    return torch.tensor(ids[:count])


def log_p(model: Any, encoder_ids: Tensor, decoder_ids: Tensor, token: int) -> Tensor:
    """log p of one token after the decoder's ids, (rows,): the plain forward function."""
    mask = torch.ones_like(encoder_ids)
    output = model(input_ids=encoder_ids, attention_mask=mask, decoder_input_ids=decoder_ids)
    return output.logits[:, -1].log_softmax(-1)[:, token]


def beginning(model: Any) -> list[int]:
    """What the decoder begins with: its start token and, of BART, the token that is forced."""
    forced = model.generation_config.forced_bos_token_id
    return [model.config.decoder_start_token_id, *([] if forced is None else [forced])]


def decoder_ids(model: Any, target: Tensor, t: int) -> Tensor:
    """What the decoder has been fed when it predicts token t."""
    return torch.tensor([[*beginning(model), *target[:t].tolist()]])


def loop(method: str, model: nn.Module, layer: Any, ids: Tensor, target: Tensor, **how: Any) -> Any:
    """(T, n_input) by Captum's method, one target token at a time."""
    rows = []
    for t, token in enumerate(target.tolist()):

        def forward(encoder: Tensor, decoder: Tensor, token: int = token) -> Tensor:
            return log_p(model, encoder, decoder, token)

        explained = getattr(captum.attr, method)(forward, layer).attribute(
            ids, additional_forward_args=(decoder_ids(model, target, t),), **how
        )
        rows.append(explained.sum(-1)[0])
    return torch.stack(rows)


def loop_with_generated(
    method: str, model: Any, layers: Any, ids: Tensor, target: Tensor, baseline: int, **how: Any
) -> Tensor:
    """(T, n_input + T) of layers (encoder's or None, decoder's or None), by Captum's method.

    The decoder's earlier tokens go to the baseline with the encoder's; its beginning stays.
    """
    n_beginning = len(beginning(model))
    rows = torch.zeros(len(target), ids.size(1) + len(target))
    chosen = [layer for layer in layers if layer is not None]
    for t, token in enumerate(target.tolist()):

        def forward(encoder: Tensor, decoder: Tensor, token: int = token) -> Tensor:
            return log_p(model, encoder, decoder, token)

        fed = decoder_ids(model, target, t)
        if method == "LayerIntegratedGradients":
            start = torch.full_like(fed, baseline)
            start[0, :n_beginning] = fed[0, :n_beginning]
            how = {**how, "baselines": (torch.full_like(ids, baseline), start)}
        attributions = getattr(captum.attr, method)(forward, chosen).attribute((ids, fed), **how)
        for layer, values in zip(chosen, attributions, strict=True):
            summed = values.sum(-1)[0]
            if layer is layers[0]:
                rows[t, : ids.size(1)] = summed
            else:
                rows[t, ids.size(1) : ids.size(1) + t] = summed[n_beginning:]
    return rows


def prompt() -> TextTokenInput:
    return TextTokenInput(PROMPT, tiny_tokenizer(), baselines=BASELINE)
