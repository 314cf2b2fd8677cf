"""The coalitions of features that a method asks for: their prompts, and their scores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs.features import prompt_ids
from captum_llm_ext.model.adapter import prompt_in
from captum_llm_ext.model.layers import input_device
from captum_llm_ext.model.prefix_cache import keeps_cache
from captum_llm_ext.perturbations.scorer import PromptScorer
from captum_llm_ext.scoring.checks import check_causal, check_context, check_ids, probed
from captum_llm_ext.scoring.tasks import Request, task_of
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing

Key: TypeAlias = tuple[int, ...]


@dataclass
class Coalitions:
    """The perturbed prompts of a trial, by which features are present, and their scores."""

    inp: InterpretableInput
    tokenizer: Any
    scorer: PromptScorer
    known: dict[Key, Tensor] = field(default_factory=dict)
    show_progress: bool = False
    _prompts: dict[tuple[bool, ...], tuple[Key, Tensor]] = field(default_factory=dict)
    _unscored: dict[Key, Tensor] = field(default_factory=dict)

    def prompt(self, row: Tensor) -> Tensor:
        """The ids (n_prompt,) of the prompt with the features that `row` (n_features,) has."""
        return self._prompt(row)[1]

    def add(self, rows: Tensor) -> None:
        for row in rows:
            self._prompt(row)

    def score(self) -> None:
        """Score all prompts that have no score yet, each once."""
        new = self._unscored
        if not new:
            return
        longest = max(new.values(), key=len)
        forcing = self.scorer.forcing
        prompt = prompt_in(forcing.model, longest)
        check_context(replace(forcing, prompt_ids=prompt[None]))
        with tqdm(total=len(new), disable=not self.show_progress, desc="prompts") as bar:
            self.scorer.advance = bar.update
            self.known.update(zip(new, self.scorer.scores(list(new.values())), strict=True))
        self._unscored = {}

    def found(self, row: Tensor) -> Tensor:
        """(2, 1 + n_output): scores and log probabilities; scored now if it was not foreseen."""
        key = self._prompt(row)[0]
        if key not in self.known:
            self.score()
        return self.known[key]

    def _prompt(self, row: Tensor) -> tuple[Key, Tensor]:
        """The prompt of a row, after what it is known by."""
        present = tuple((row == 1).tolist())
        if present not in self._prompts:
            device = self.scorer.reference.device
            prompt = prompt_ids(self.inp, row[None], self.tokenizer, device)
            key = tuple(prompt.tolist())
            self._prompts[present] = key, prompt
            if key not in self.known:
                self._unscored[key] = prompt
        return self._prompts[present]


def teacher_forcing(
    model: nn.Module, tokenizer: Any, inp: InterpretableInput, request: Request
) -> TeacherForcing:
    """The whole prompt of an input with the target that is given, or that the model generates."""
    device = getattr(model, "device", None) or next(model.parameters()).device
    device = input_device(model, device)
    prompt = prompt_ids(inp, None, tokenizer, device)
    forcing = task_of(model).forcing(model, tokenizer, prompt[None], request)
    check_ids(forcing)
    check_context(forcing)
    return forcing


def prompt_scorer(
    forcing: TeacherForcing, reuse_prefix: bool = True, rows: int | None = None
) -> PromptScorer:
    """The scorer of prompts that resemble this one, `rows` at a time."""
    probe = probed(forcing, use_cache=reuse_prefix and keeps_cache(forcing.model))
    return PromptScorer(forcing, probe, check_causal(forcing, probe, product=False), rows)
