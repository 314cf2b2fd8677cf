"""Tiny random models, plain modules and tokenizers that the tests share. No downloads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 352
PROMPT = "Dave lives in Palm Coast and"
TARGET = " plays golf, hiking"
CORPUS = (
    "Dave lives in Palm Coast and plays golf, hiking with his family and friends.",
    "The capital of France is Paris and the capital of Japan is Tokyo.",
    "His personal interests include hiking, golf and cooking with friends in Palm Coast.",
)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained here, which puts "<s>" before every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


class MinimalTokenizer:
    """The least that Captum's wrappers need of a tokenizer: no special tokens, no padding."""

    def __init__(self) -> None:
        self.words = sorted({word for text in CORPUS for word in text.split()})

    def encode(
        self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None
    ) -> Any:
        ids = [self.words.index(word) for word in text.split()]
        return ids if return_tensors is None else torch.tensor([ids])

    def decode(self, token_ids: Any) -> str:
        return " ".join(self.words[int(i)] for i in torch.as_tensor(token_ids).reshape(-1))

    def convert_ids_to_tokens(self, token_ids: Any) -> Any:
        if isinstance(token_ids, int):
            return self.words[token_ids]
        return [self.words[int(i)] for i in token_ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, str):
            return self.words.index(tokens)
        return [self.words.index(token) for token in tokens]

    def __call__(
        self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, Any]:
        encoded: dict[str, Any] = {"input_ids": self.encode(text)}
        if return_offsets_mapping:
            encoded["offset_mapping"] = list(self._offsets(text))
        return encoded

    @staticmethod
    def _offsets(text: str) -> Iterator[tuple[int, int]]:
        start = 0
        for word in text.split():
            start = text.index(word, start)
            yield start, start + len(word)
            start += len(word)


# --- transformers families -------------------------------------------------------------------

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 48}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def _model(name: str, seed: int = 0, **settings: Any) -> nn.Module:
    """The causal language model of `<name>Config` with random weights."""
    config = getattr(transformers, f"{name}Config")(**settings)
    return _randomise(transformers.AutoModelForCausalLM.from_config(config), seed)


def _randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that attention is not uniform and log p of tokens differs by nats."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.3)
            else:
                parameter.add_(noise * 0.1)
    return model.float().eval()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _model("Llama", **_GROUPED),
    "qwen2": lambda: _model("Qwen2", **_GROUPED),
    "qwen3": lambda: _model("Qwen3", **_GROUPED, head_dim=8),
    "mistral": lambda: _model("Mistral", **_GROUPED, sliding_window=4),
    "gemma2": lambda: _model(
        "Gemma2",
        **_GROUPED,
        head_dim=8,
        sliding_window=4,
        layer_types=_SLIDING,
        query_pre_attn_scalar=8,
    ),
    "gemma3": lambda: _model(
        "Gemma3Text",
        **_GROUPED,
        head_dim=8,
        sliding_window=4,
        layer_types=_SLIDING,
        query_pre_attn_scalar=8,
    ),
    "phi3": lambda: _model("Phi3", **_GROUPED),
    "gpt2": lambda: _model("GPT2", seed=1, **_GPT2),
    "gpt_neox": lambda: _model("GPTNeoX", **_COMMON, intermediate_size=48),
    "opt": lambda: _model("OPT", **_COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "falcon": lambda: _model("Falcon", **_COMMON, num_kv_heads=2, new_decoder_architecture=True),
    "mixtral": lambda: _model("Mixtral", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
}

_LLAMA_LAYERS = {
    "embedding": "model.embed_tokens",
    "block": "model.layers.1",
    "attention_projection": "model.layers.1.self_attn.q_proj",
    "mlp": "model.layers.1.mlp",
    "final_norm": "model.norm",
    "attention": "model.layers.1.self_attn",
}
_LAYERS: dict[str, dict[str, str]] = {
    "phi3": {**_LLAMA_LAYERS, "attention_projection": "model.layers.1.self_attn.qkv_proj"},
    "gpt2": {
        "embedding": "transformer.wte",
        "block": "transformer.h.1",
        "attention_projection": "transformer.h.1.attn.c_attn",
        "mlp": "transformer.h.1.mlp",
        "final_norm": "transformer.ln_f",
        "attention": "transformer.h.1.attn",
    },
    "gpt_neox": {
        "embedding": "gpt_neox.embed_in",
        "block": "gpt_neox.layers.1",
        "attention_projection": "gpt_neox.layers.1.attention.query_key_value",
        "mlp": "gpt_neox.layers.1.mlp",
        "final_norm": "gpt_neox.final_layer_norm",
        "attention": "gpt_neox.layers.1.attention",
    },
    "opt": {  # no module is its feed-forward part, so the attention's way out stands for it
        "embedding": "model.decoder.embed_tokens",
        "block": "model.decoder.layers.1",
        "attention_projection": "model.decoder.layers.1.self_attn.q_proj",
        "mlp": "model.decoder.layers.1.self_attn.out_proj",
        "final_norm": "model.decoder.final_layer_norm",
        "attention": "model.decoder.layers.1.self_attn",
    },
    "falcon": {
        "embedding": "transformer.word_embeddings",
        "block": "transformer.h.1",
        "attention_projection": "transformer.h.1.self_attention.query_key_value",
        "mlp": "transformer.h.1.mlp",
        "final_norm": "transformer.ln_f",
        "attention": "transformer.h.1.self_attention",
    },
}


@cache
def _cached_model(family: str) -> nn.Module:
    return FAMILIES[family]()


def tiny_model(family: str, fresh: bool = False) -> nn.Module:
    """The family's tiny model in evaluation mode; `fresh` gives one that a test may change."""
    return FAMILIES[family]() if fresh else _cached_model(family)


def layer_names(family: str) -> dict[str, str]:
    """Kind of layer → qualified name; a kind that every block has is taken from the second of four.

    Two blocks follow it: after one alone, a norm would make gradient times output zero at all
    positions but the last.
    """
    return _LAYERS.get(family, _LLAMA_LAYERS)


# --- plain modules: no config, no cache, `forward(ids)` alone ------------------------------------


def _causal_mean(hidden: Tensor) -> Tensor:
    counts = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)
    return hidden.cumsum(1) / counts[:, None]


class CausalToy(nn.Module):
    """Embedding, running means, one nonlinear layer: a plain module that a user may bring."""

    def __init__(self, vocab_size: int = VOCAB_SIZE, hidden_size: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.layer = nn.Linear(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size)
        _randomise(self)

    def mix(self, hidden: Tensor) -> Tensor:
        return _causal_mean(hidden) + hidden

    def forward(self, ids: Tensor) -> SimpleNamespace:
        hidden = torch.tanh(2 * self.layer(self.mix(2 * self.embedding(ids))))
        return SimpleNamespace(logits=2 * self.head(self.mix(hidden)))


class BidirectionalToy(CausalToy):
    """Every position sees every other: one pass over the whole target would be wrong."""

    def mix(self, hidden: Tensor) -> Tensor:
        return hidden.mean(1, keepdim=True) + hidden


class LinearToy(nn.Module):
    """log p of every token but the last is linear in the embeddings: closed forms hold.

    The last token takes the remaining probability, so that the logits are already log
    probabilities and the softmax changes nothing. Position i weighs position j by 0.8^(i-j).
    """

    def __init__(self, vocab_size: int = VOCAB_SIZE, hidden_size: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size - 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in (self.embedding.weight, self.head.weight):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
            self.head.bias.fill_(-math.log(vocab_size) - 3)

    @staticmethod
    def mixing(length: int) -> Tensor:
        """Weight of position j (column) in the logits of position i (row)."""
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        return torch.where(distance >= 0, 0.8 ** distance.clamp(min=0).float(), 0.0)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        hidden = self.embedding(ids)
        mixed = self.mixing(ids.shape[1]).to(hidden) @ hidden
        log_p = self.head(mixed)
        last = torch.log1p(-log_p.logsumexp(-1, keepdim=True).exp())
        return SimpleNamespace(logits=torch.cat([log_p, last], dim=-1))
