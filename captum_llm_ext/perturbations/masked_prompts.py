"""Masks → prompts with baselines for absent features → their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import CaptumTextTemplateInput, ImageMaskInput, InterpretableInput
from captum_llm_ext.inputs.baselines import REMOVE, BaselineSpec
from captum_llm_ext.inputs.features import prompt_ids
from captum_llm_ext.inputs.templates import check_template, with_drawn_baselines
from captum_llm_ext.inputs.tokens import with_baselines
from captum_llm_ext.model.adapter import QA
from captum_llm_ext.model.layers import input_device
from captum_llm_ext.perturbations.scorer import Prompt, PromptScorer
from captum_llm_ext.scoring.preparation import prepare
from captum_llm_ext.scoring.tasks import Request

InspectForward: TypeAlias = Callable[[str, str, list[float]], None]


@dataclass
class MaskedPrompts:
    """The prompts of an input by which features are present.

    inspect: called for every mask with the prompt, the target, and the first `n_inspected`
    probabilities of the sequence and each target token.
    """

    inp: InterpretableInput
    tokenizer: Any
    scorer: PromptScorer
    inspect: InspectForward | None = None
    n_inspected: int | None = None
    _prompts: dict[tuple[bool, ...], Prompt] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        inp: InterpretableInput,
        request: Request,
        baselines: BaselineSpec = None,
        reuse_prefix: bool = True,
        rows: int | None = None,
        show_progress: bool = False,
    ) -> MaskedPrompts:
        """Check and probe the input with the request's target; rows: prompts per pass."""
        if isinstance(inp, CaptumTextTemplateInput):
            check_template(inp)
        inp = with_baselines(inp, baselines, model)
        prompt = prompt_ids(inp, None, tokenizer, input_device(model))
        prepared = prepare(model, tokenizer, inp, prompt[None], request)
        if prepared.task.name == QA and getattr(inp, "named_baseline", None) == REMOVE:
            raise ValueError(
                "baselines='remove' moves the answer's positions, so a question answering model "
                "cannot take it: give another baseline"
            )
        prepared = prepared.probed(use_cache=reuse_prefix, product=False)
        return cls(inp, tokenizer, PromptScorer(prepared, rows, show_progress))

    @property
    def is_causal(self) -> bool:
        return self.scorer.prepared.causal

    @property
    def output_tokens(self) -> list[str]:
        return self.scorer.prepared.output_tokens

    @property
    def output_labels(self) -> list[str] | None:
        return self.scorer.prepared.output_labels

    @property
    def target_ids(self) -> list[int]:
        ids: list[int] = self.scorer.target.ids.tolist()
        return ids

    @property
    def n_evaluations(self) -> int:
        """How many prompts have been scored."""
        return self.scorer.n_evaluations

    @property
    def n_columns(self) -> int:
        """The sequence and each target token."""
        return 1 + len(self.target_ids)

    @property
    def device(self) -> torch.device:
        return self.scorer.reference.device

    def drawn(self) -> MaskedPrompts:
        """The same with a callable baseline drawn once, for all masks."""
        task = self.scorer.prepared.task
        return replace(self, inp=task.perturbed(with_drawn_baselines(self.inp), self.tokenizer))

    def prompts(self, masks: Tensor) -> list[Prompt]:
        """The prompts of masks (n_rows, n_features)."""
        rows = [tuple(row) for row in (masks == 1).tolist()]
        for row in rows:
            if row not in self._prompts:
                present = torch.tensor([row]).float()
                ids = prompt_ids(self.inp, present, self.tokenizer, "cpu")
                self._prompts[row] = tuple(ids.tolist())
        return [self._prompts[row] for row in rows]

    def prefetch(self, masks: Tensor) -> None:
        """Score the prompts of masks that are asked for later, in as few passes as it takes."""
        self.scorer.scores(self.prompts(masks))

    def scores(self, masks: Tensor) -> Tensor:
        """(n_rows, 1 + n_output) of masks (n_rows, n_features); each prompt is scored once."""
        prompts = self.prompts(masks)
        scores, log_probs = self.scorer.scores(prompts).unbind(1)
        if self.inspect is not None:
            response = self.tokenizer.decode(self.scorer.target.ids)
            for prompt, probabilities in zip(prompts, log_probs.exp().tolist(), strict=True):
                shown = probabilities[: self.n_inspected]
                self.inspect(self.tokenizer.decode(list(prompt)), response, shown)
        return scores


@dataclass(frozen=True)
class MaskedPicture:
    """A picture by which of its segments are present, scored by Captum's forward, row by row.

    forward: from a mask (1, n_features) to the scores of the sequence and of target tokens.
    """

    inp: ImageMaskInput
    forward: Callable[[Tensor], Tensor]
    output_tokens: list[str]
    target_ids: list[int]
    device: torch.device
    output_labels: list[str] | None = None
    n_evaluations: int | None = None

    @property
    def n_columns(self) -> int:
        return 1 + len(self.target_ids)

    def drawn(self) -> MaskedPicture:
        return self

    def prefetch(self, masks: Tensor) -> None:
        """Nothing is gained by scoring pictures ahead."""

    def scores(self, masks: Tensor) -> Tensor:
        return torch.stack([self.forward(mask[None]).flatten() for mask in masks])


Masked: TypeAlias = MaskedPrompts | MaskedPicture
