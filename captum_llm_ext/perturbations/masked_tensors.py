"""Masks → tensors with baselines for absent features → the outputs of a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.compat import (
    _expand_additional_forward_args,
    _expand_target,
    _format_additional_forward_args,
    _format_feature_mask,
    _format_input_baseline,
    _run_forward,
)


class MaskedTensors:
    """Inputs of a function, whose features masks switch on and off, for each example apart.

    The features of an example are the different numbers of its feature mask, in order.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        inputs: Any,
        baselines: Any = None,
        feature_mask: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> None:
        self._forward, self._target = forward_func, target
        self._arguments = _format_additional_forward_args(additional_forward_args)
        self._inputs, absent = _format_input_baseline(inputs, baselines)
        self._absent = _fitted("baselines", absent, self._inputs)
        masks = _format_feature_mask(feature_mask, self._inputs)
        fitted = _fitted("feature_mask", masks, self._inputs, torch.long)
        numbers = torch.cat([mask.flatten(1).cpu() for mask in fitted], dim=1)
        self._feature_of = [row.unique(return_inverse=True)[1] for row in numbers]
        self._one_output_in_all = False

    @property
    def n_features(self) -> list[int]:
        """Of each example."""
        return [int(feature_of.max()) + 1 for feature_of in self._feature_of]

    def scores(
        self, masks: Sequence[Tensor], at_once: int, advance: Callable[[int], Any]
    ) -> list[Tensor]:
        """The outputs (n_rows, n_outputs) for the masks (n_rows, n_features) of each example.

        at_once: masks of each example in one call. Examples share the calls: where one has fewer
        masks than another, its last one fills up. One output for all examples goes to each.
        """
        longest = torch.arange(max(map(len, masks)))
        present = torch.stack(
            [
                mask[longest.clamp(max=len(mask) - 1)][:, feature_of] == 1
                for mask, feature_of in zip(masks, self._feature_of, strict=True)
            ],
            dim=1,
        )
        parts = []
        for part in present.split(at_once):
            parts.append(self._outputs(part))
            advance(len(part))
        outputs = torch.cat(parts).expand(-1, len(masks), -1)
        return [outputs[: len(mask), i] for i, mask in enumerate(masks)]

    def shaped(self, attributions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Attributions (n_rows, n_features) of each example, in the shapes of the inputs."""
        rows = [attr[:, f] for attr, f in zip(attributions, self._feature_of, strict=True)]
        flat = torch.cat(rows[:1] if self._one_output_in_all else rows)
        parts = flat.split([x.shape[1:].numel() for x in self._inputs], dim=1)
        pairs = zip(parts, self._inputs, strict=True)
        return tuple(part.reshape(-1, *x.shape[1:]).to(x.device) for part, x in pairs)

    def _outputs(self, present: Tensor) -> Tensor:
        """(n_rows, n_examples, n_outputs) where `present` (n_rows, n_examples, n_elements)."""
        n_rows, n_examples = present.shape[:2]
        parts = present.split([x.shape[1:].numel() for x in self._inputs], dim=2)
        inputs = tuple(
            torch.where(part.view(n_rows, *x.shape).to(x.device), x, absent).flatten(0, 1)
            for part, x, absent in zip(parts, self._inputs, self._absent, strict=True)
        )
        arguments = _expand_additional_forward_args(self._arguments, n_rows)
        target = _expand_target(self._target, n_rows)
        output = torch.as_tensor(_run_forward(self._forward, inputs, target, arguments)).cpu()
        if output.dim() and len(output) == n_rows * n_examples:
            return output.reshape(n_rows, n_examples, -1)
        if n_rows > 1:
            raise ValueError(
                f"expected an output for each of {n_rows * n_examples} rows, got the shape "
                f"{tuple(output.shape)}: of a function with one output in all, leave "
                "perturbations_per_eval at 1"
            )
        self._one_output_in_all = True
        return output.reshape(1, 1, -1)


def _fitted(
    name: str, values: Sequence[Any], inputs: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """The values of each input, expanded to its shape."""
    if len(values) != len(inputs):
        raise ValueError(f"expected {name} for each of {len(inputs)} inputs, got {len(values)}")
    expanded = []
    for value, x in zip(values, inputs, strict=True):
        tensor = torch.as_tensor(value, dtype=dtype or x.dtype, device=x.device)
        try:
            expanded.append(tensor.expand_as(x))
        except RuntimeError as error:
            raise ValueError(
                f"expected {name} that fit an input {tuple(x.shape)}, got {tuple(tensor.shape)}"
            ) from error
    return tuple(expanded)
