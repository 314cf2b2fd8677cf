"""This package: its defaults but for what each work asks."""

from __future__ import annotations

from typing import Any

import torch

from captum_llm_ext import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
)
from tests.benchmarks.peers.workload import Question, Run, main


def integrated_gradients(settings: str, **options: Any) -> Any:
    def work(question: Question) -> Run:
        inp = TextTokenInput(question.prompt, question.tokenizer)
        method = LayerIntegratedGradients(question.model, question.embedding)
        attribution = LLMGradientAttribution(method, question.tokenizer)
        given = options if "method" in options else {"n_steps": question.n_steps, **options}
        n_input = inp.n_itp_features
        return Run(
            settings=settings,
            call=lambda: attribution.attribute(inp, target=question.target, **given),
            attributions=lambda found: (
                found.seq_attr[None] if found.token_attr is None else found.token_attr
            )[:, :n_input],
            stated=lambda found: float(found.convergence_delta.sum()),
        )

    return work


def layers(question: Question) -> Run:
    method = LayerGradientXActivation(question.model, question.layer_names())
    attribution = LLMGradientAttribution(method, question.tokenizer)
    inp = TextTokenInput(question.prompt, question.tokenizer)
    return Run(
        settings="all layers in one call",
        call=lambda: attribution.attribute(inp, target=question.target),
        attributions=lambda found: found.layer_token_attr,
    )


def ablation(question: Question) -> Run:
    attribution = LLMAttribution(FeatureAblation(question.model), question.tokenizer)
    inp = TextTokenInput(question.prompt, question.tokenizer)
    return Run(
        settings="defaults",
        call=lambda: attribution.attribute(inp, target=question.target),
        attributions=lambda found: torch.as_tensor(found.token_attr),
    )


WORKS = {
    "error/50": integrated_gradients("50 steps"),
    "error/adaptive": integrated_gradients("method='adaptive', tol=0.05", method="adaptive"),
    "tokens": integrated_gradients("10 steps"),
    "tokens/prefix": integrated_gradients(
        "10 steps, include_generated=True: earlier target tokens move too", include_generated=True
    ),
    "sequence": integrated_gradients(
        "10 steps, include_per_token_attr=False", include_per_token_attr=False
    ),
    "layers": layers,
    "ablation": ablation,
}

if __name__ == "__main__":
    main(WORKS, ("captum",))
