"""Targets of several lines, generated in one batch: a step of one row costs as much as of many.

Only greedy targets of causal models are generated so, and only where the model gives a row that is
padded what it gives the row alone. Groups follow from the whole file, and never from what is left
of it: a batch that goes on generates the same rows together, and gets the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_llm_ext.batches.lines import Line
from captum_llm_ext.batches.records import Explainer
from captum_llm_ext.inputs.targets import generated_ids, generated_together, is_greedy
from captum_llm_ext.model.adapter import CAUSAL
from captum_llm_ext.model.lock import holding, only_one_call
from captum_llm_ext.model.quantized import quantization_of, quiet_bitsandbytes
from captum_llm_ext.model.suitability import unwrapped
from captum_llm_ext.scoring.context import generating
from captum_llm_ext.scoring.tasks import task_of

LINES = 16  # in a group


@dataclass
class Together:
    """The lines of a file in groups, whose targets are generated together.

    prompts: the ids (n_prompt,) of the lines that may go together, by number; groups: all lines.
    """

    explainer: Explainer
    prompts: Mapping[int, Tensor]
    groups: Sequence[Sequence[Line]]

    @classmethod
    def of(cls, explainer: Explainer, lines: Sequence[Line]) -> Together:
        """The groups of lines, which are in order of length."""
        prompts: dict[int, Tensor] = {}
        if _may_go_together(explainer.model, explainer.options):
            found = {line.number: explainer.prompt_without_target(line) for line in lines}
            prompts = {number: ids for number, ids in found.items() if ids is not None}
        several = [line for line in lines if line.number in prompts]
        groups = [several[i : i + LINES] for i in range(0, len(several), LINES)]
        together = cls(explainer, prompts, groups)
        if not groups or not together._as_alone(groups[0]):
            return cls(explainer, {}, [[line] for line in lines])
        return cls(explainer, prompts, [*groups, *([x] for x in lines if x.number not in prompts)])

    def targets(self, group: Sequence[Line]) -> dict[int, Tensor]:
        """The targets by number of line; none where each line is to be generated for itself."""
        numbers = [line.number for line in group if line.number in self.prompts]
        if len(numbers) < 2:
            return {}
        model, tokenizer = self.explainer.model, self.explainer.tokenizer
        prompts = [self.prompts[number] for number in numbers]
        gen_args = self.explainer.options.get("gen_args")
        try:
            with only_one_call(model), quiet_bitsandbytes(), generating(model, len(prompts[0])):
                targets = generated_together(model, prompts, gen_args, tokenizer)
        except (ValueError, RuntimeError):  # each line for itself will say what is wrong with it
            return {}
        return dict(zip(numbers, targets, strict=True))

    def _as_alone(self, group: Sequence[Line]) -> bool:
        """Whether the shortest prompt, which is padded most, has the target that it has alone."""
        model, tokenizer = self.explainer.model, self.explainer.tokenizer
        gen_args = self.explainer.options.get("gen_args")
        with holding(warnings), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            targets, last = self.targets(group), group[-1].number
            if last not in targets:
                return False
            with only_one_call(model), quiet_bitsandbytes():
                alone = generated_ids(model, self.prompts[last][None], gen_args, tokenizer)
        return alone.tolist() == targets[last].tolist()


def _may_go_together(model: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether targets are greedy, and rows of a batch do not change one another."""
    return (
        isinstance(unwrapped(model), PreTrainedModel)
        and task_of(model).name == CAUSAL
        and not model.training
        and not options.get("skip_tokens")
        and is_greedy(model, options.get("gen_args"))
        and not quantization_of(model).rounds_inputs
    )
