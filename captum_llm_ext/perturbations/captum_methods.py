"""Captum's perturbation methods, and a user's subclasses of their base, run on masked prompts."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import KernelShap, Lime
from torch import Tensor

from captum_llm_ext.compat import (
    CaptumLLMAttribution,
    PerturbationAttribution,
    default_perturb_func,
)
from captum_llm_ext.model.random_state import same_random_state
from captum_llm_ext.perturbations.masked_prompts import Masked
from captum_llm_ext.perturbations.method import Outcome, checked_rows


@dataclass(frozen=True)
class CaptumMethod:
    """A method that calls `forward_func` with masks when it likes.

    A method whose masks are repeatable runs twice: first on scores of zero, which tells all its
    masks, so that they are scored together. All others have their masks scored as they come.
    """

    method: PerturbationAttribution

    guide = None

    @property
    def token_rows(self) -> bool:
        """Whether `forward_func` gives the scores of target tokens beside the sequence's."""
        if isinstance(self.method, CaptumLLMAttribution.SUPPORTED_METHODS):
            return isinstance(self.method, CaptumLLMAttribution.SUPPORTED_PER_TOKEN_ATTR_METHODS)
        return bool(getattr(self.method, "token_rows", True))

    @property
    def repeatable_masks(self) -> bool:
        """Whether a second run, from the same global random state, has the same masks."""
        draw = getattr(self.method, "perturb_func", None)
        draws_globally = isinstance(self.method, KernelShap) or draw in (None, default_perturb_func)
        is_captums = isinstance(self.method, CaptumLLMAttribution.SUPPORTED_METHODS)
        return bool(getattr(self.method, "repeatable_masks", is_captums and draws_globally))

    def attribute_masked(self, masked: Masked, guide: None = None, **options: Any) -> Outcome:
        """Attributions (1 + n_output or 1, n_features) of a prompt or a picture."""
        if self.repeatable_masks and (masks := self._rehearse(masked, options)):
            masked.prefetch(torch.tensor(masks))
        attr = self._run(copy(self.method), masked.scores, masked, options)
        n_columns = masked.n_columns if self.token_rows else 1
        name = type(self.method).__name__
        return Outcome(checked_rows(attr, n_columns, masked.inp.n_itp_features, name))

    def _rehearse(self, masked: Masked, options: dict[str, Any]) -> list[tuple[float, ...]]:
        """The distinct masks that the method asks for; the random state is put back."""
        masks: dict[tuple[float, ...], None] = {}

        def zeros(rows: Tensor) -> Tensor:
            masks.update(dict.fromkeys(map(tuple, rows.tolist())))
            return torch.zeros(len(rows), masked.n_columns, device=rows.device)

        method = copy(self.method)
        if isinstance(method, Lime):  # its surrogate must not learn from zeros
            method.interpretable_model = deepcopy(method.interpretable_model)
        with same_random_state():
            self._run(method, zeros, masked, options)
        return list(masks)

    def _run(
        self,
        method: PerturbationAttribution,
        scores: Callable[[Tensor], Tensor],
        masked: Masked,
        options: dict[str, Any],
    ) -> Any:
        def forward(masks: Tensor) -> Tensor:
            rows = scores(masks).to(masks.device)
            return rows if self.token_rows else rows[:, 0]

        method.forward_func = forward
        if "perturbations_per_eval" not in inspect.signature(method.attribute).parameters:
            options = {k: v for k, v in options.items() if k != "perturbations_per_eval"}
        return method.attribute(masked.inp.to_tensor().to(masked.device), **options)


def check_needs(method: PerturbationAttribution, n_features: int) -> None:
    """Refuse Lime and KernelShap without what they need."""
    name = type(method).__name__
    if isinstance(method, Lime) and importlib.util.find_spec("sklearn") is None:
        raise ImportError(
            f"{name} needs scikit-learn: pip install 'captum-llm-ext[lime]'", name="sklearn"
        )
    if isinstance(method, KernelShap) and n_features < 2:
        raise ValueError(f"{name} needs at least 2 features, got {n_features}")
