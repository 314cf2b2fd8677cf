"""Quantised layers: which layers are quantised, and right gradients through those of bitsandbytes.

Only this file knows bitsandbytes, which need not be installed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from captum_llm_ext.model.hooks import forward_name, patched
from captum_llm_ext.model.memory import free_bytes

SHARE_FOR_WEIGHTS = 0.25  # of free memory, for weights that stay dequantised during a call
PLAIN = (Tensor, nn.Parameter)

Dequantize = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Quantization:
    """The quantised layers of a model.

    layers: name → linear layer whose weight is not a plain floating-point tensor; rounds_inputs:
    whether a layer rounds its input by what else is in the pass, as 8-bit layers do;
    compute_dtype: the 16-bit dtype in which 4-bit layers multiply, or None where they do not;
    dequantize: layer of bitsandbytes → the function that gives its weight (out, in).
    """

    layers: Mapping[str, nn.Module]
    rounds_inputs: bool
    compute_dtype: torch.dtype | None
    dequantize: Mapping[nn.Module, Dequantize]


def quantization_of(model: nn.Module) -> Quantization:
    """The quantised layers of a model, of any kind, and what follows from them."""
    kinds = sys.modules.get("bitsandbytes.nn")  # a package that is not imported has no layers here
    modules: dict[str, Any] = dict(model.named_modules())
    in_8_bits: list[Any]
    in_4_bits: list[Any]
    in_8_bits, in_4_bits = (
        [module for module in modules.values() if isinstance(module, getattr(kinds, kind, ()))]
        for kind in ("Linear8bitLt", "Linear4bit")
    )
    low_dtypes = {m.compute_dtype for m in in_4_bits} & {torch.float16, torch.bfloat16}
    # With float weights an 8-bit layer multiplies by them itself.
    dequantize = {m: _weight_of_8_bits for m in in_8_bits if not m.state.has_fp16_weights}
    return Quantization(
        layers={name: module for name, module in modules.items() if _is_quantized(module)},
        rounds_inputs=bool(in_8_bits),
        compute_dtype=next(iter(low_dtypes), None),
        dequantize={**dequantize, **dict.fromkeys(in_4_bits, _weight_of_4_bits)},
    )


def dequantized_products(model: nn.Module) -> AbstractContextManager[None]:
    """Let the layers of bitsandbytes multiply by their dequantised weights, also backwards.

    Scores and gradients then come from the same function, on every device. Without this, 8-bit
    layers round their input by all that is in the pass, and their gradient does not know it; and
    on processors with AVX512-BF16 the first pass without gradients packs the weights of 4-bit
    layers for a product that has no backward. The weights stay as they are, packed or not.
    """
    weights = DequantizedWeights(quantization_of(model).dequantize)
    return patched(
        (module, forward_name(module), partial(_multiply, module, weights))
        for module in weights.dequantize
    )


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Hold back the note of bitsandbytes that it casts its input, which every product writes."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)  # one for each call, in whatever order threads come and go
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def _is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer has a weight, or tensors of other names, that are not plain floats."""
    if not (hasattr(module, "in_features") or hasattr(module, "infeatures")):
        return False
    weight = getattr(module, "weight", None)
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return not all(  # 8-bit floats come with kernels of their own
        type(tensor) in PLAIN and tensor.is_floating_point() and tensor.itemsize > 1
        for tensor in (tensors if weight is None else [weight])
    )


@dataclass
class DequantizedWeights:
    """The weights of layers, kept while there is memory for them."""

    dequantize: Mapping[nn.Module, Dequantize]
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)
    budgets: dict[torch.device, float] = field(default_factory=dict)  # bytes still to be used

    @torch.no_grad()
    def of(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) of a layer."""
        if module in self.kept:
            return self.kept[module].to(dtype)
        weight = self.dequantize[module](module).to(dtype)
        device = weight.device
        if device not in self.budgets:
            self.budgets[device] = SHARE_FOR_WEIGHTS * (free_bytes(device) or 0)
        if weight.nbytes < self.budgets[device]:
            self.kept[module] = weight
            self.budgets[device] -= weight.nbytes
        return weight


def _multiply(module: Any, weights: DequantizedWeights, x: Tensor) -> Tensor:
    """x Wᵀ + b in the layer's dtype; `Linear4bit.forward` takes an unset one from its input."""
    dtype = getattr(module, "compute_dtype", None) or x.dtype
    if not getattr(module, "compute_type_is_set", True) and x.dtype != torch.float16:
        dtype = x.dtype
    bias = None if module.bias is None else module.bias.to(dtype)
    return _Product.apply(x.to(dtype), bias, partial(weights.of, module, dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ + b. The backward calls for W again, so that autograd does not keep it."""

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


def _weight_of_8_bits(module: Any) -> Tensor:
    """Whole numbers in ±127 times the scale of their row."""
    holders = (module.state, module.weight)  # the first pass moves them to the state
    holder = next((h for h in holders if getattr(h, "SCB", None) is not None), None)
    if holder is None:
        raise _not_quantized(module)
    whole = holder.CB if holder.CB is not None else module.weight.data
    weight: Tensor = whole.float() * (holder.SCB.float() / 127).unsqueeze(1)
    return weight


def _weight_of_4_bits(module: Any) -> Tensor:
    """Codes that bitsandbytes looks up and scales, also where the processor packed them."""
    from bitsandbytes import functional

    state = getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None:
        raise _not_quantized(module)
    data = module.weight.data
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _unpacked(data, state)
    return functional.dequantize_4bit(data, state)


def _unpacked(data: Tensor, packed: Any) -> tuple[Tensor, Any]:
    """Weights and state in the usual order. Packing rounded the scales to bfloat16, for good."""
    from bitsandbytes import functional

    state = copy(packed)
    scales = packed.absmax.T.reshape(-1).float().contiguous()
    state.original_nested = False  # the scales must not be quantised again
    data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax, state.nested = scales, False
    return data, state


def _not_quantized(module: nn.Module) -> ValueError:
    return ValueError(
        f"{type(module).__name__} is not quantised yet: move the model to a device first"
    )
