"""interpreto: log-softmax scores of single tokens, all path points or perturbations in one batch.

Its baseline of integrated gradients is set to the embedding of token 0 in the prompt and to the
target's own embeddings after it, so that the prompt alone moves; its mask token to token 0. Its
integrated gradients are the mean of |gradient × path point| over hidden units: they have no sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from interpreto import Granularity, IntegratedGradients, Occlusion, Saliency
from interpreto.attributions import InferenceModes
from torch import Tensor

from tests.benchmarks.peers.workload import BASELINE_ID, Question, Run, main

OPTIONS = {
    "granularity": Granularity.ALL_TOKENS,
    "inference_mode": InferenceModes.LOG_SOFTMAX,
}


def run(settings: str, explainer: Callable[[Question], Any]) -> Callable[[Question], Run]:
    """The explainer is made in the call, as its baseline belongs to one input."""

    def explain(question: Question) -> Tensor:
        found = explainer(question).explain(question.prompt, question.target)[0]
        return found.attributions[:, : len(question.prompt_ids)]

    return lambda question: Run(settings, lambda: explain(question), lambda found: found)


def integrated_gradients(question: Question, **options: Any) -> IntegratedGradients:
    ids = torch.cat([question.prompt_ids, question.target_ids])
    ids[: len(question.prompt_ids)] = BASELINE_ID
    return IntegratedGradients(
        question.model,
        question.tokenizer,
        batch_size=question.n_steps,
        n_perturbations=question.n_steps,
        baseline=question.embedding(ids),
        **OPTIONS,
        **options,
    )


def with_delta(question: Question) -> IntegratedGradients:
    return integrated_gradients(question, return_convergence_delta=True)


def saliency_of_layers(question: Question) -> Saliency:
    return Saliency(question.model, question.tokenizer, layer=question.layers(), **OPTIONS)


def occlusion(question: Question) -> Occlusion:
    question.tokenizer.mask_token = question.tokenizer.decode([BASELINE_ID])
    rows = question.fed_ids.size(1) + 2
    return Occlusion(question.model, question.tokenizer, batch_size=rows, **OPTIONS)


WORKS = {
    "error/unsigned": run("50 points; no sign", integrated_gradients),
    "error/stated": run("return_convergence_delta=True", with_delta),
    "tokens/unsigned": run("10 points; no sign", integrated_gradients),
    "layers/list": run("Saliency(layer=…)", saliency_of_layers),
    "ablation": run("Occlusion, all rows in one batch", occlusion),
}

if __name__ == "__main__":
    main(WORKS, ("interpreto",))
