"""Captum: its language-model wrappers, and its core classes with a forward function of one's own.

The wrappers are what Captum offers for this work. Its core classes can do more, with some lines
that score the target in one pass: "core" below, which an expert would write.
"""

from __future__ import annotations

from typing import Any

import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
)
from torch import Tensor

from tests.benchmarks.peers.workload import BASELINE_ID, SAMPLED_BLOCKS, Question, Run, main


def integrated_gradients(settings: str, **options: Any) -> Any:
    def work(question: Question) -> Run:
        method = LayerIntegratedGradients(question.model, question.embedding)
        attribution = LLMGradientAttribution(method, question.tokenizer)
        inp = TextTokenInput(question.prompt, question.tokenizer)
        given = {"n_steps": question.n_steps, **options}
        return Run(
            settings=settings,
            call=lambda: attribution.attribute(inp, target=question.target, **given),
            attributions=lambda found: found.token_attr,
        )

    return work


def core_integrated_gradients(question: Question) -> Run:
    method = LayerIntegratedGradients(
        lambda ids: token_scores(question, ids).sum(1), question.embedding
    )
    ids = question.prompt_ids[None]
    return Run(
        settings="core class, own forward function, 10 steps",
        call=lambda: method.attribute(
            ids, torch.full_like(ids, BASELINE_ID), n_steps=question.n_steps
        ),
        attributions=lambda found: found.sum(-1)[:, : ids.size(1)],
    )


def token_scores(question: Question, prompts: Tensor) -> Tensor:
    """(rows, n_input) → (rows, n_output): the target's scores after each prompt, in one pass."""
    earlier = question.target_ids[:-1].expand(len(prompts), -1)
    return question.scores(question.model(torch.cat([prompts, earlier], 1)).logits)


def layers_at_once(question: Question) -> Run:
    return _layers(question, "a list of 121 layers", [question.layers()], 1.0)


def layers_one_at_a_time(question: Question) -> Run:
    sampled = question.layers(SAMPLED_BLOCKS)
    scale = (len(question.layers()) - 1) / len(sampled)
    return _layers(question, "a call for each layer (estimated from 4 layers)", sampled, scale)


def _layers(question: Question, settings: str, layers: list[Any], scale: float) -> Run:
    inp = TextTokenInput(question.prompt, question.tokenizer)

    def call() -> Any:
        methods = [LayerGradientXActivation(question.model, layer) for layer in layers]
        wrapped = [LLMGradientAttribution(method, question.tokenizer) for method in methods]
        return [one.attribute(inp, target=question.target).token_attr for one in wrapped]

    return Run(settings=settings, call=call, attributions=torch.stack, scale=scale)


def core_layers(question: Question) -> Run:
    method = LayerGradientXActivation(lambda ids: token_scores(question, ids), question.layers())
    ids = question.prompt_ids[None]
    return Run(
        settings="core class, own forward function, a call for each target token",
        call=lambda: [
            [x.sum(-1)[0, : ids.size(1)] for x in method.attribute(ids, target=token)]
            for token in range(len(question.target_ids))
        ],
        attributions=lambda found: torch.stack([torch.stack(x) for x in found]).transpose(0, 1),
    )


def ablation(settings: str, **options: Any) -> Any:
    def work(question: Question) -> Run:
        attribution = LLMAttribution(FeatureAblation(question.model), question.tokenizer)
        inp = TextTokenInput(question.prompt, question.tokenizer)
        return Run(
            settings=settings,
            call=lambda: attribution.attribute(inp, target=question.target, **options),
            attributions=lambda found: found.token_attr,
        )

    return work


def core_ablation(question: Question) -> Run:
    method = FeatureAblation(lambda ids: token_scores(question, ids))
    ids = question.prompt_ids[None]
    return Run(
        settings="core class, own forward function, all rows in one batch",
        call=lambda: method.attribute(
            ids, baselines=BASELINE_ID, perturbations_per_eval=ids.size(1)
        ),
        attributions=lambda found: found,
    )


BY_SEQUENCE = {"forward_in_tokens": False, "use_cached_outputs": False}
WORKS = {
    "error/50": integrated_gradients("50 steps"),
    "error/500": integrated_gradients("500 steps", n_steps=500, internal_batch_size=50),
    "error/stated": integrated_gradients(
        "return_convergence_delta=True", return_convergence_delta=True
    ),
    "tokens": integrated_gradients("10 steps"),
    "sequence": core_integrated_gradients,
    "layers/list": layers_at_once,
    "layers/each": layers_one_at_a_time,
    "layers/core": core_layers,
    "ablation/default": ablation("defaults"),
    "ablation/sequence": ablation(
        "forward_in_tokens=False, use_cached_outputs=False", **BY_SEQUENCE
    ),
    "ablation/batch": ablation(
        "the same, perturbations_per_eval=17", perturbations_per_eval=17, **BY_SEQUENCE
    ),
    "ablation/core": core_ablation,
}

if __name__ == "__main__":
    main(WORKS, ("captum",))
