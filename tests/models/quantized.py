"""Quantised models to test with, and their weights decoded by hand from the stored bytes.

Test modules that import this are skipped where bitsandbytes is missing. Nothing here uses the
dequantisation of captum_llm_ext.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.models.families import VOCAB_SIZE, _randomise
from tests.oracles.cases import prompt_input

bnb: Any = pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")

# A processor's packed layout wants rows by 32 and columns by 64.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def tiny_float_model(family: str = "Qwen2") -> nn.Module:
    """A random model wide enough to be quantised; Qwen2's q, k and v have biases."""
    config = getattr(transformers, f"{family}Config")(**SIZES)
    return _randomise(transformers.AutoModelForCausalLM.from_config(config)).requires_grad_(False)


def _in_4_bits(quant_type: str, double: bool, compute: torch.dtype | None) -> Any:
    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute,
            compress_statistics=double,
            quant_type=quant_type,
        )
        layer.load_state_dict(linear.state_dict())
        return layer

    return make


def _in_8_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,  # as transformers sets it
    )
    layer.load_state_dict(linear.state_dict())
    return layer


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": _in_4_bits("nf4", double=False, compute=torch.float32),
    "nf4 double": _in_4_bits("nf4", double=True, compute=torch.float32),
    "fp4": _in_4_bits("fp4", double=False, compute=torch.float32),
    "fp4 double": _in_4_bits("fp4", double=True, compute=torch.float32),
    "nf4 of the input's dtype": _in_4_bits("nf4", double=True, compute=None),
    "int8": _in_8_bits,
}
LOW_PRECISION_KINDS = {
    "nf4 in bfloat16": _in_4_bits("nf4", double=True, compute=torch.bfloat16),
    "fp4 in float16": _in_4_bits("fp4", double=True, compute=torch.float16),
}


def quantized(model: nn.Module, kind: str, device: str = "cpu") -> nn.Module:
    """A copy on `device` whose linear layers, but for the head, are quantised. It never ran."""
    make = {**KINDS, **LOW_PRECISION_KINDS}[kind]
    copy = deepcopy(model)
    for name, module in list(copy.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            setattr(copy.get_submodule(parent), last, make(module))
    return copy.to(device).eval().requires_grad_(False)


def stored_weights(model: nn.Module, rounded: bool = False) -> dict[str, Tensor]:
    """The float32 weights that the bytes of a model mean, by layer; the model must not have run.

    rounded: with scales rounded to bfloat16, as a processor that packs them rounds them.
    """
    weights: dict[str, Tensor] = {}
    module: Any
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weights[name] = _of_4_bits(module.weight, rounded)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            whole, largest = module.weight.data, module.weight.SCB
            weights[name] = whole.float() * largest.float()[:, None] / 127
    return weights


def _of_4_bits(weight: Any, rounded: bool) -> Tensor:
    """Two codes a byte, the first in the high half; a scale for every `blocksize` weights."""
    state, packed = weight.quant_state, weight.data.view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    scales = _scales(state)
    scales = scales.bfloat16().float() if rounded else scales
    values = state.code[codes].reshape(-1, state.blocksize) * scales[:, None]
    return values.reshape(state.shape).float()


def _scales(state: Any) -> Tensor:
    """Quantised a second time, by 256, around their mean, if they are."""
    if not state.nested:
        return state.absmax.float()
    inner = state.state2
    outer = inner.absmax.repeat_interleave(inner.blocksize)[: len(state.absmax)]
    return inner.code[state.absmax.long()] * outer + state.offset


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], other: nn.Module) -> nn.Module:
    """A float32 copy of `model` with these weights, and with the other parameters of `other`."""
    copy = deepcopy(model).float()
    names = {f"{name}.weight" for name in weights}
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            layer = name.removesuffix(".weight")
            parameter.copy_(weights[layer] if name in names else theirs[name].float())
    return copy.requires_grad_(False)


def is_packed(model: nn.Module) -> bool:
    """Whether the processor has packed the 4-bit weights for a product without a backward."""
    return any(
        getattr(module.weight.quant_state, "packing_format_for_cpu", False)
        for module in model.modules()
        if isinstance(module, bnb.nn.Linear4bit)
    )


def contents(thing: Any) -> Any:
    """What == compares: tensors by address and bytes, objects by their attributes."""
    if isinstance(thing, Tensor):
        data = thing.detach()
        raw = data.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return type(thing), data.dtype, tuple(data.shape), data.data_ptr(), hash(raw)
    if isinstance(thing, bnb.functional.QuantState | bnb.MatmulLtState):
        # idx: the outlying columns of the last pass, which differ from pass to pass
        return {name: contents(value) for name, value in vars(thing).items() if name != "idx"}
    return thing


def layout(model: nn.Module) -> dict[Any, Any]:
    """All of the model that a call might change: bytes, packing, flags and forwards."""
    parts: dict[Any, Any] = {}
    for name, module in model.named_modules():
        parts[name] = (
            vars(module).get("forward"),
            module.training,
            getattr(module, "compute_dtype", None),
            getattr(module, "compute_type_is_set", None),
            contents(getattr(module, "state", None)),
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
        )
    for name, parameter in model.named_parameters():
        extra = ("quant_state", "CB", "SCB")
        parts[name, "parameter"] = (
            parameter.requires_grad,
            parameter.grad,
            contents(parameter),
            {key: contents(getattr(parameter, key, None)) for key in extra},
        )
    return parts


class Pair:
    """A quantised model, and the float copy that has the weights its bytes mean."""

    def __init__(self, kind: str, ran: bool, family: str = "Qwen2") -> None:
        model = tiny_float_model(family)
        self.model = quantized(model, kind)
        weights = {rounded: stored_weights(self.model, rounded) for rounded in (False, True)}
        if ran:
            self.model.generate(prompt_input().inp_tensor, max_new_tokens=2, do_sample=False)
        self.reference = with_weights(model, weights[is_packed(self.model)], self.model)
