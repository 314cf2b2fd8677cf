"""Attention worked out from a model's weights and what its layers read, and more families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from tests.models.families import FAMILIES, VOCAB_SIZE, _model, layer_names, tiny_model

N_HEADS, HEAD_DIM = 4, 8
_SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 4}
_GROUPED = {
    **_SMALL,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_EMBD = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 4, "n_head": N_HEADS, "n_positions": 64}
OTHER_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt_oss": lambda: _model(
        "GptOss",
        **_GROUPED,
        head_dim=HEAD_DIM,
        sliding_window=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "jamba": lambda: _model(
        "Jamba",
        **_GROUPED,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
    ),
    "bloom": lambda: _model("Bloom", vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=4, n_head=4),
    "falcon_alibi": lambda: _model(
        "Falcon",
        **_SMALL,
        num_attention_heads=N_HEADS,
        alibi=True,
        multi_query=True,
        attn_implementation="eager",  # which adds the biases twice, and "sdpa" does not
    ),
    "gptj": lambda: _model("GPTJ", **_EMBD, rotary_dim=4),
    "gpt_neo": lambda: _model(
        "GPTNeo",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
    ),
    "qwen3_next": lambda: _model(
        "Qwen3Next",
        **_GROUPED,
        head_dim=HEAD_DIM,
        num_experts=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts_per_tok=1,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "bitnet": lambda: _model("BitNet", **_GROUPED),
    "diffllama": lambda: _model("DiffLlama", **_GROUPED),
    "mamba": lambda: _model("Mamba", **_SMALL, state_size=4),
}
ALL_FAMILIES = {**FAMILIES, **OTHER_FAMILIES}

# Families whose attention transformers gives only from a version on: what is missing before.
FIRST_VERSION = {
    "falcon": ("torch", "2.6", "masks that torch must combine"),
    "falcon_alibi": ("torch", "2.6", "masks that torch must combine"),
    "jamba": ("transformers", "5.8", "one kind of cache for all layers"),
    "qwen3_next": ("transformers", "5.8", "one kind of cache for all layers"),
    "gemma2": ("transformers", "5.21", "its soft cap in every attention but eager"),
    "diffllama": ("transformers", "5.17", "weights that are given out"),
}


def skip_before_its_first_version(family: str) -> None:
    package, first, what = FIRST_VERSION.get(family, ("torch", "0", ""))
    if Version(version(package)) < Version(first):
        pytest.skip(f"{family} needs {package} {first}: {what}")


def family_model(family: str) -> nn.Module:
    return tiny_model(family) if family in FAMILIES else OTHER_FAMILIES[family]()


def eager_weights(model: nn.Module, ids: Tensor) -> Tensor:
    """What transformers itself gives, (n_layers, n_heads, length, length), of a model set to it."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        given = model(ids[None], output_attentions=True).attentions
    model.config._attn_implementation = before
    return torch.cat([weights for weights in given if weights is not None]).float()


@dataclass(frozen=True)
class Kind:
    """How a family's attention differs from plain dot products with rotary positions.

    windows: of layer i, windows[i % len(windows)] positions or None; thetas likewise; rotary: how
    many units of a head turn; norm: how the units of queries and keys are normalised.
    """

    windows: tuple[int | None, ...] = (None,)
    thetas: tuple[float, ...] = (10_000.0,)
    rotary: int = HEAD_DIM
    soft_cap: float | None = None
    norm: Callable[[Tensor, nn.Module], Tensor] | None = None


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


KINDS = {
    "llama": Kind(),
    "qwen3": Kind(norm=lambda x, module: _rms(x) * module.weight),
    "mistral": Kind(windows=(4,)),
    "gemma2": Kind(windows=(4, None), soft_cap=50.0),
    "gemma3": Kind(
        windows=(4, None),
        thetas=(10_000.0, 1_000_000.0),
        norm=lambda x, module: _rms(x) * (1 + module.weight),
    ),
    "gpt_neox": Kind(rotary=2),
    "phi3": Kind(),
    "gpt2": Kind(rotary=0),
}


def read_by_attention(model: nn.Module, family: str, layer: int, ids: Tensor) -> Tensor:
    """What a layer's attention module is given, (length, hidden), as the model normally runs."""
    module = attention_module(model, family, layer)
    given: list[Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((args[0] if args else kwargs["hidden_states"])[0])

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(ids[None])
    hook.remove()
    return given[0]


def attention_module(model: nn.Module, family: str, layer: int) -> Any:
    return model.get_submodule(layer_names(family)["attention"].replace(".1.", f".{layer}."))


@torch.no_grad()
def weights_by_hand(model: nn.Module, family: str, layer: int, ids: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) over what each position may see, (n_heads, length, length)."""
    kind, module = KINDS[family], attention_module(model, family, layer)
    query, key, _ = _query_key_value(family, module, read_by_attention(model, family, layer, ids))
    if kind.norm is not None:
        query, key = kind.norm(query, module.q_norm), kind.norm(key, module.k_norm)
    theta = kind.thetas[layer % len(kind.thetas)]
    query, key = _turned(query, kind.rotary, theta), _turned(key, kind.rotary, theta)
    key = key.repeat_interleave(N_HEADS // len(key), 0)
    scores = torch.einsum("hid,hjd->hij", query, key) / HEAD_DIM**0.5
    if kind.soft_cap is not None:
        scores = kind.soft_cap * torch.tanh(scores / kind.soft_cap)
    place = torch.arange(len(ids))
    distance = place[:, None] - place[None]
    window = kind.windows[layer % len(kind.windows)] or len(ids)
    visible = (distance >= 0) & (distance < window)
    powers = scores.exp() * visible
    return powers / powers.sum(-1, keepdim=True)


@torch.no_grad()
def norms_by_hand(model: nn.Module, family: str, layer: int, ids: Tensor) -> Tensor:
    """‖(x W_V + b_V) W_O‖ of every head, (n_heads, length)."""
    return carried_by_hand(model, family, layer, ids).square().sum(-1).sqrt()


@torch.no_grad()
def carried_by_hand(model: nn.Module, family: str, layer: int, ids: Tensor) -> Tensor:
    """(x W_V + b_V) W_O of every head, (n_heads, length, hidden)."""
    module = attention_module(model, family, layer)
    _, _, value = _query_key_value(family, module, read_by_attention(model, family, layer, ids))
    value = value.repeat_interleave(N_HEADS // len(value), 0)
    if family == "gpt2":  # its weights are stored (in, out)
        out = module.c_proj.weight
    else:
        out = (module.dense if family == "gpt_neox" else module.o_proj).weight.T
    return torch.stack(
        [value[head] @ out[head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in range(N_HEADS)]
    )


@torch.no_grad()
def parts_by_hand(model: nn.Module, family: str, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What enters a block (length, hidden), and what each head adds at i from j.

    The second is (length, n_heads, length, hidden): α_hij (v_hj W_h), after Gemma's norm of the
    sum, whose root mean square counts as a constant.
    """
    states = model(ids[None], output_hidden_states=True).hidden_states[layer][0]
    weights = weights_by_hand(model, family, layer, ids)
    parts = torch.einsum("hij,hjk->ihjk", weights, carried_by_hand(model, family, layer, ids))
    if family in ("gemma2", "gemma3"):
        norm = model.get_submodule(f"model.layers.{layer}.post_attention_layernorm")
        mean_square = parts.sum((1, 2)).square().mean(-1) + norm.eps
        parts = parts / mean_square.sqrt()[:, None, None, None] * (1 + norm.weight)
    return states, parts


def _query_key_value(family: str, module: Any, x: Tensor) -> Sequence[Tensor]:
    """(heads, length, head_dim) of each, before positions."""
    if family == "gpt2":
        parts = (x @ module.c_attn.weight + module.c_attn.bias).split(32, -1)
    elif family == "gpt_neox":  # of each head in turn: query, key, value
        layer = module.query_key_value
        fused = (x @ layer.weight.T + layer.bias).view(len(x), N_HEADS, 3, HEAD_DIM)
        return [fused[:, :, i].transpose(0, 1) for i in range(3)]
    elif family == "phi3":
        parts = (x @ module.qkv_proj.weight.T).split([32, 16, 16], -1)
    else:
        parts = tuple(x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    return [part.view(len(x), -1, HEAD_DIM).transpose(0, 1) for part in parts]


def _turned(x: Tensor, rotary: int, theta: float) -> Tensor:
    """Rotary positions: unit i and unit i + rotary/2 turn by position · theta^(-2i/rotary)."""
    if not rotary:
        return x
    half = rotary // 2
    angle = torch.arange(x.size(1))[:, None] * theta ** (-2 * torch.arange(half) / rotary)
    first, second, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
    turned = (
        first * angle.cos() - second * angle.sin(),
        second * angle.cos() + first * angle.sin(),
    )
    return torch.cat([*turned, rest], -1)


def bidirectional() -> nn.Module:
    """BERT's masked language model: every token attends to every other."""
    config = transformers.BertConfig(
        **_SMALL, num_attention_heads=N_HEADS, intermediate_size=48, max_position_embeddings=64
    )
    return transformers.BertForMaskedLM(config).eval()
