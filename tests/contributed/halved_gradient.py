"""A gradient method with a changed backward: half of the gradient passes the last block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from captum_llm_ext.gradients.method import LayerMethod
from captum_llm_ext.model.layers import decoder_blocks


class HalvedGradient(LayerMethod):
    """Gradient × activation, with half of the gradient."""

    @contextmanager
    def surround(self, model: nn.Module) -> Iterator[None]:
        def halve(module: nn.Module, args: Any, output: Any) -> Any:
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradient / 2)

        hook = decoder_blocks(model)[-1].register_forward_hook(halve)
        try:
            yield
        finally:
            hook.remove()
