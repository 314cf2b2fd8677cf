"""From a prompt and a request to a checked, probed pass: what wrappers do before their work."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs.features import Features
from captum_llm_ext.model.adapter import CAUSAL, Adapter
from captum_llm_ext.model.check_cache import check_cache_of
from captum_llm_ext.model.compiled import original
from captum_llm_ext.model.hooks import evaluating
from captum_llm_ext.model.keywords import taken_by
from captum_llm_ext.model.prefix_cache import PrefixCache, can_be_cropped
from captum_llm_ext.model.suitability import check_reads_tokens
from captum_llm_ext.scoring.checks import (
    check_causal,
    check_ids,
    check_vocabulary,
    is_random,
    warn_of_dropout,
    warn_of_ended_prompt,
    warn_of_other_tokenizer,
)
from captum_llm_ext.scoring.context import check_context, generating
from captum_llm_ext.scoring.tasks import Request, Task, task_of
from captum_llm_ext.scoring.teacher_forcing import Pass, TeacherForcing, last_positions

FEWEST_REUSED = 8  # a shorter prefix costs more to keep than to compute again


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to be scored.

    output_tokens, output_labels: names of the target's tokens, see `Task`; probe: the pass that was
    scored to probe the model, once it is; causal: whether one pass scores all target tokens.
    """

    task: Task
    forcing: TeacherForcing
    output_tokens: list[str]
    output_labels: list[str] | None = None
    probe: Pass | None = None
    causal: bool = True

    def probed(
        self, use_cache: bool = False, filled_up: bool = True, product: bool = True
    ) -> Prepared:
        """The same with the model probed: for dropout, finite scores, and causality.

        use_cache: keep the probe's key/value cache, where the model has one; filled_up: whether
        prompts will be padded or cut into a cached prefix, which takes a causal model even for a
        target of one token; product: whether a product of probabilities must come from one pass.

        Raises:
            ValueError: scores that are not finite, or a product that needs a causal model.
        """
        warn_of_dropout(self.forcing)
        model, target = self.forcing.model, self.forcing.target
        alone = isinstance(model, Adapter) or target.of_positions
        with evaluating(model):  # dropout would look like a model that is not causal
            cache = use_cache and self._keeps_cache
            probe = self.forcing.probe(cache, of_prompt=filled_up and not alone)
            causal = check_causal(self.forcing, probe, product)
        return replace(self, probe=probe, causal=causal)

    @property
    def _keeps_cache(self) -> bool:
        """Whether the model's forward takes and gives a key/value cache."""
        return self.forcing.takes("past_key_values") and self.forcing.takes("use_cache")

    def probed_for(self, features: Features, reuse_prefix: bool) -> Prepared:
        """The same with the tokens that precede all features from the cache, where there are some.

        It is probed only where a pass at the input will not do; see `is_causal`.
        """
        n_cached = features.first if reuse_prefix else 0
        if n_cached >= FEWEST_REUSED:
            return self.probed(use_cache=True)._with_prefix(n_cached)
        return self.probed(filled_up=False) if is_random(self.forcing) else self

    def is_causal(self, scored: Pass) -> bool:
        """Whether one pass can score all target tokens, by the probe or by a pass at the input.

        scored: the pass over the row as it is.

        Raises, warns: as `check_causal`.
        """
        return check_causal(self.forcing, scored) if self.probe is None else self.causal

    def _with_prefix(self, n_cached: int) -> Prepared:
        """The same with the first `n_cached` tokens from the probe's cache, where that is right."""
        if self.probe is None or not self.causal or not can_be_cropped(self.probe.cache):
            return self
        forcing = self.forcing
        ids, length = forcing.prompt_ids[0], forcing.row.length
        prefix = PrefixCache(forcing.call, ids, self.probe.cache, length)
        shorter = replace(forcing, prefix=prefix, n_cached=n_cached)
        with torch.no_grad(), evaluating(forcing.model):
            scored = shorter.run(shorter.fed(shorter.whole), shorter.whole)
        return replace(self, forcing=shorter) if scored.agrees_with(self.probe) else self


def prepare(
    model: nn.Module, tokenizer: Any, inp: InterpretableInput, prompt: Tensor, request: Request
) -> Prepared:
    """The input's prompt (1, n_prompt) with the request's target, generated if need be.

    Raises:
        ValueError: a model of pictures or sounds, ids that are not in the vocabulary, a prompt and
            target that are too long, or a target that has no meaning.
    """
    check_reads_tokens(model)
    task = task_of(model)
    model, checks = original(model), check_cache_of(model)
    warn_of_other_tokenizer(inp, prompt, tokenizer)
    check_vocabulary(model, prompt[0])
    with generating(model, prompt.size(1)) if request.target is None else nullcontext():
        forcing = task.teacher_forcing(model, tokenizer, prompt, request)
    check_ids(forcing)
    check_context(forcing)
    if task.name == CAUSAL:
        warn_of_ended_prompt(inp, prompt, tokenizer)
    run = partial(forcing.model, forcing.prompt_ids[:, :1])
    keywords = checks.answer("keywords", lambda: taken_by(forcing.model, run, _options(forcing)))
    forcing = replace(forcing, keywords=keywords, checks=checks)
    names = task.output_tokens(forcing, tokenizer), task.output_labels(forcing, tokenizer)
    return Prepared(task, forcing, *names)


def _options(forcing: TeacherForcing) -> dict[str, Any]:
    """The options that passes use where the model has them, with values that change no score."""
    return {
        "use_cache": False,
        "past_key_values": DynamicCache(),
        "logits_to_keep": last_positions(forcing.model, 1),
        "output_attentions": False,
    }
