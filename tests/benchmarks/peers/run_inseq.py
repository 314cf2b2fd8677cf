"""inseq: attributed function "probability" with logprob=True; granular values, summed here.

inseq moves the whole prefix, earlier target tokens too, from its unknown token (id 0 here) along
the path. Its own aggregation over hidden units is a norm: the sum is taken of the granular values.
Its occlusion gives absolute values alone.
"""

from __future__ import annotations

from typing import Any

import inseq
import torch
from torch import Tensor

from tests.benchmarks.peers.workload import SAMPLED_BLOCKS, Question, Run, main

OPTIONS: dict[str, Any] = {
    "attributed_fn": "probability",
    "logprob": True,
    "show_progress": False,
    "pretty_progress": False,
}


def attribute(question: Question, method: str, target_layer: Any = None, **options: Any) -> Any:
    more = {} if target_layer is None else {"target_layer": target_layer}
    model = inseq.load_model(question.model, method, tokenizer=question.tokenizer, **more)
    try:
        out = model.attribute(
            question.prompt, question.prompt + question.target, **OPTIONS, **options
        )
    finally:
        model.attribution_method.unhook()
    return out.sequence_attributions[0]


def token_attributions(question: Question, found: Any) -> Tensor:
    """(length, n_output[, hidden]) → (n_output, n_input)"""
    values = found.target_attributions
    values = values.sum(-1) if values.ndim == 3 else values
    return values[: len(question.prompt_ids)].T


def integrated_gradients(settings: str, **options: Any) -> Any:
    def work(question: Question) -> Run:
        given = {"n_steps": question.n_steps, **options}
        states = "return_convergence_delta" in options
        return Run(
            settings=settings,
            call=lambda: attribute(question, "integrated_gradients", **given),
            attributions=lambda found: token_attributions(question, found),
            stated=(lambda found: float(found.step_scores["deltas"].sum())) if states else None,
        )

    return work


def layers_at_once(question: Question) -> Run:
    return _layers(question, "a list of 121 layers", [question.layers()], 1.0)


def layers_one_at_a_time(question: Question) -> Run:
    sampled = question.layer_names(SAMPLED_BLOCKS)
    scale = (len(question.layers()) - 1) / len(sampled)
    return _layers(question, "a call for each layer (estimated from 4 layers)", sampled, scale)


def _layers(question: Question, settings: str, layers: list[Any], scale: float) -> Run:
    return Run(
        settings=settings,
        call=lambda: [attribute(question, "layer_gradient_x_activation", x) for x in layers],
        attributions=lambda found: torch.stack([token_attributions(question, x) for x in found]),
        scale=scale,
    )


def ablation(question: Question) -> Run:
    rows = question.fed_ids.size(1)
    return Run(
        settings="occlusion, perturbations_per_eval=30; absolute values",
        call=lambda: attribute(question, "occlusion", perturbations_per_eval=rows),
        attributions=lambda found: token_attributions(question, found),
    )


DELTA = {"return_convergence_delta": True}
WORKS = {
    "error/50": integrated_gradients("50 steps, return_convergence_delta=True", **DELTA),
    "error/500": integrated_gradients(
        "500 steps, return_convergence_delta=True", n_steps=500, internal_batch_size=50, **DELTA
    ),
    "tokens/prefix": integrated_gradients("10 steps; earlier target tokens move too"),
    "layers/list": layers_at_once,
    "layers/each": layers_one_at_a_time,
    "ablation/absolute": ablation,
}

if __name__ == "__main__":
    main(WORKS, ("inseq", "captum"))
