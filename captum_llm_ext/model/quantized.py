"""Quantised layers: which they are, and right gradients through those of bitsandbytes.

The only place that knows of bitsandbytes, which need not be installed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from captum_llm_ext.model.memory import free_bytes

_NOT_QUANTISED = "{} is not quantised yet: move the model to a device first"
SHARE_FOR_WEIGHTS = 0.25  # of what is free, for weights that are kept dequantised during a call


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weight is not a plain floating-point tensor, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if (hasattr(module, "in_features") or hasattr(module, "infeatures"))
        and _has_quantised_weight(module)
    }


def quantizes_activations(model: nn.Module) -> bool:
    """Whether a layer rounds its input by what else is in the pass, as 8-bit layers do."""
    return any(isinstance(module, _kind("Linear8bitLt")) for module in model.modules())


def computes_in(model: nn.Module) -> torch.dtype | None:
    """The 16-bit dtype in which 4-bit layers multiply, or None where they do not."""
    found = {m.compute_dtype for m in model.modules() if isinstance(m, _kind("Linear4bit"))}
    return next((dtype for dtype in found if dtype in (torch.float16, torch.bfloat16)), None)


@contextmanager
def dequantized_products(model: nn.Module) -> Iterator[None]:
    """Let the layers of bitsandbytes multiply by their dequantised weights, also backwards.

    So that scores and gradients come from the same function, on every device. Of themselves 8-bit
    layers round their input by all that is in the pass, and take the gradient as if they did not;
    on processors with AVX512-BF16 the first pass without gradients packs the weights of 4-bit
    layers for a product that has no backward. The weights are left as they are, packed or not.
    """
    layers = [m for m in model.modules() if _differentiated_here(m)]
    weights = _Weights()
    unset = object()
    # accelerate puts its own `forward` over the one found first, which it then calls.
    names = ["_old_forward" if "_old_forward" in vars(m) else "forward" for m in layers]
    found = [vars(m).get(name, unset) for m, name in zip(layers, names, strict=True)]
    try:
        for module, name in zip(layers, names, strict=True):
            setattr(module, name, partial(_multiply, module, weights))
        yield
    finally:
        for module, name, forward in zip(layers, names, found, strict=True):
            if forward is unset:
                vars(module).pop(name, None)
            else:
                setattr(module, name, forward)


@contextmanager
def quietly() -> Iterator[None]:
    """Hold back bitsandbytes' note on every single product that it casts its input."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Weights:
    """Dequantised weights, kept while there is memory for them."""

    def __init__(self) -> None:
        self._kept: dict[nn.Module, Tensor] = {}
        self._budget: dict[torch.device, float] = {}

    def of(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        if module in self._kept:
            return self._kept[module].to(dtype)
        weight = _dequantized(module).to(dtype)
        left = self._left(weight.device) - weight.nbytes
        if left > 0:
            self._kept[module], self._budget[weight.device] = weight, left
        return weight

    def _left(self, device: torch.device) -> float:
        if device not in self._budget:
            self._budget[device] = SHARE_FOR_WEIGHTS * (free_bytes(device) or 0)
        return self._budget[device]


def _multiply(module: Any, weights: _Weights, x: Tensor) -> Tensor:
    """x Wᵀ + b in the layer's dtype, of which `Linear4bit.forward` would take note."""
    dtype = getattr(module, "compute_dtype", None) or x.dtype
    if not getattr(module, "compute_type_is_set", True) and x.dtype != torch.float16:
        dtype = x.dtype
    bias = None if module.bias is None else module.bias.to(dtype)
    return _Product.apply(x.to(dtype), bias, partial(weights.of, module, dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, where W is asked for when it is needed instead of being kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return linear(x, weight(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight(), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return linear(tangent, ctx.weight())


@torch.no_grad()
def _dequantized(module: Any) -> Tensor:
    """The weight (out, in) of a quantised layer."""
    is_8bit = isinstance(module, _kind("Linear8bitLt"))
    return _of_8bit(module) if is_8bit else _of_4bit(module)


def _of_8bit(module: Any) -> Tensor:
    """Whole numbers in ±127 times the scale of their row."""
    places = (module.state, module.weight)  # they move to the state in the first pass
    held = next((p for p in places if getattr(p, "SCB", None) is not None), None)
    if held is None:
        raise ValueError(_NOT_QUANTISED.format(type(module).__name__))
    whole = held.CB if held.CB is not None else module.weight.data
    weight: Tensor = whole.float() * (held.SCB.float() / 127).unsqueeze(1)
    return weight


def _of_4bit(module: Any) -> Tensor:
    """Looked up and scaled by bitsandbytes, also where they were packed for the processor."""
    from bitsandbytes import functional

    state = getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None:
        raise ValueError(_NOT_QUANTISED.format(type(module).__name__))
    data = module.weight.data
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _unpacked(data, state)
    return functional.dequantize_4bit(data, state)


def _unpacked(data: Tensor, packed: Any) -> tuple[Tensor, Any]:
    """Weights and state in the usual order. Packing rounded the scales to bfloat16, for good."""
    from bitsandbytes import functional

    state = copy(packed)
    scales = packed.absmax.T.reshape(-1).float().contiguous()
    state.original_nested = False  # the scales are not to be quantised again
    data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax, state.nested = scales, False
    return data, state


def _has_quantised_weight(module: nn.Module) -> bool:
    """Whether its weight is a tensor of another kind, or whole numbers or bytes of another name."""
    weight = getattr(module, "weight", None)
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    tensors = own if weight is None else [weight]
    return not all(_is_plain(tensor) for tensor in tensors)


def _is_plain(weight: Any) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    return plain and weight.itemsize > 1  # 8-bit floats come with kernels of their own


def _kind(name: str) -> Any:
    """A class of bitsandbytes, or nothing that a module could be where it was never imported."""
    return getattr(sys.modules.get("bitsandbytes.nn"), name, ())


def _differentiated_here(module: Any) -> bool:
    if isinstance(module, _kind("Linear8bitLt")):
        return not module.state.has_fp16_weights  # else it multiplies by float weights itself
    return isinstance(module, _kind("Linear4bit"))
