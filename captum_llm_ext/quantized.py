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

from captum_llm_ext.memory import free_bytes

SHARE_OF_MEMORY = 0.25  # of what is free, for weights that are kept dequantised during a call


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weight is not a plain floating-point tensor, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if (hasattr(module, "in_features") or hasattr(module, "infeatures"))
        and not _is_plain(getattr(module, "weight", None))
    }


def quantizes_activations(model: nn.Module) -> bool:
    """Whether a layer rounds its input by what else is in the pass, as 8-bit layers do."""
    return any(isinstance(module, _kind("Linear8bitLt")) for module in model.modules())


def computes_in(model: nn.Module) -> torch.dtype | None:
    """The lowest precision in which quantised layers multiply, or None without such layers."""
    if quantizes_activations(model):
        return torch.float16
    found = {m.compute_dtype for m in model.modules() if isinstance(m, _kind("Linear4bit"))}
    low = [dtype for dtype in found if dtype in (torch.float16, torch.bfloat16)]
    return low[0] if low else torch.float32 if found else None


@contextmanager
def dequantized_products(model: nn.Module) -> Iterator[None]:
    """Let 4-bit layers multiply by their dequantised weights, forwards and backwards.

    On processors with AVX512-BF16, bitsandbytes packs the weights of a layer in the first pass
    without gradients for a product that has no backward. The packed weights are left as they are;
    passes with and without gradients compute the same function here, on every device.
    """
    layers = [m for m in model.modules() if isinstance(m, _kind("Linear4bit"))]
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
            self._budget[device] = SHARE_OF_MEMORY * (free_bytes(device) or 0)
        return self._budget[device]


def _multiply(module: Any, weights: _Weights, x: Tensor) -> Tensor:
    """What `Linear4bit.forward` computes, without packing the weights or setting the dtype."""
    dtype = module.compute_dtype
    if not module.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        dtype = x.dtype
    dtype = dtype or x.dtype
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
    """The weight (out, in) of a 4-bit layer, packed for the processor's product or not."""
    from bitsandbytes import functional

    state = getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None:
        raise ValueError(
            f"{type(module).__name__} is not quantised yet: move the model to a device"
        )
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


def _is_plain(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def _kind(name: str) -> Any:
    """A class of bitsandbytes, or nothing that a module could be where it was never imported."""
    return getattr(sys.modules.get("bitsandbytes.nn"), name, ())
