"""What the attributions ought to be: plain autograd over a Hugging Face model, nothing else.

One target token at a time, each after its own prefix. "tokens" moves the prompt alone,
"tokens/prefix" the earlier target tokens too (inseq), "tokens/unsigned" is interpreto's formula:
the mean of |gradient × path point| over hidden units, by the trapezoidal rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.peers.workload import BASELINE_ID, Question, Run, main

# n_steps -> points in [0, 1] and their weights; gradient, path point, difference -> what is summed.
Rule = Callable[[int], tuple[Tensor, Tensor]]
Term = Callable[[Tensor, Tensor, Tensor], Tensor]


def gauss_legendre(n_steps: int) -> tuple[Tensor, Tensor]:
    points, weights = np.polynomial.legendre.leggauss(n_steps)
    return torch.tensor((points + 1) / 2), torch.tensor(weights / 2)


def trapezoid(n_steps: int) -> tuple[Tensor, Tensor]:
    weights = torch.full((n_steps,), 1 / (n_steps - 1))
    weights[[0, -1]] /= 2
    return torch.linspace(0, 1, n_steps), weights


def signed(gradient: Tensor, point: Tensor, difference: Tensor) -> Tensor:
    return (gradient * difference).sum(-1)


def unsigned(gradient: Tensor, point: Tensor, difference: Tensor) -> Tensor:
    return (gradient * point).abs().mean(-1)


def score(question: Question, embeds: Tensor, token: int) -> Tensor:
    """Log probability of target token number `token` after all of its prefix."""
    logits = question.model(inputs_embeds=embeds[None]).logits[0, -1]
    return logits.log_softmax(-1)[question.target_ids[token]]


def ends(question: Question, token: int, whole_prefix: bool) -> tuple[Tensor, Tensor]:
    """Embeddings (length, hidden) of the baseline and of the input before target `token`."""
    ids = torch.cat([question.prompt_ids, question.target_ids[:token]])
    start = ids.clone()
    start[: None if whole_prefix else len(question.prompt_ids)] = BASELINE_ID
    return question.embedding(start).detach(), question.embedding(ids).detach()


def gradients_at(
    question: Question, token: int, whole_prefix: bool, points: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores (n,), their gradients, the points' embeddings (n, length, hidden); the difference."""
    start, end = ends(question, token, whole_prefix)
    embeds = (start + points.float()[:, None, None] * (end - start)).requires_grad_()
    logits = question.model(inputs_embeds=embeds).logits[:, -1]
    scores = logits.log_softmax(-1)[:, question.target_ids[token]]
    (gradients,) = torch.autograd.grad(scores.sum(), embeds)
    return scores.detach(), gradients, embeds.detach(), end - start


def integrated_gradients(
    question: Question,
    whole_prefix: bool = False,
    rule: Rule = gauss_legendre,
    term: Term = signed,
) -> Tensor:
    """(n_output, n_input)"""
    points, weights = rule(question.n_steps)
    rows = []
    for token in range(len(question.target_ids)):
        _, *found = gradients_at(question, token, whole_prefix, points)
        rows.append(weights.double() @ term(*found).double())
    n_input = len(question.prompt_ids)
    return torch.stack([row[:n_input] for row in rows])


def converged(
    question: Question, tolerance: float = 0.02, at_once: int = 8, most: int = 800
) -> Tensor:
    """(1, n_input) of a target of one token: the path's worst pieces are halved until all match.

    A piece's five-point rule must give the difference of the scores at its ends; the mismatches of
    all pieces, as absolute values, must add up to less than `tolerance` of the whole difference.
    """
    found = pieces(question, torch.linspace(0, 1, 9))
    whole = abs(score_difference(question))
    while sum(mismatch for mismatch, *_ in found) > tolerance * whole:
        if len(found) > most:
            raise ValueError(f"the reference has not converged with {len(found)} pieces")
        found.sort(key=lambda one: one[0])
        found, worst = found[:-at_once], found[-at_once:]
        for _, a, b, _ in worst:
            found += pieces(question, torch.tensor([a, (a + b) / 2, b]))
    return torch.stack([part for *_, part in found]).sum(0)[None]


def pieces(question: Question, borders: Tensor) -> list[tuple[float, float, float, Tensor]]:
    """Of each piece: how far its sum misses the scores at its ends; the ends; (n_input,)."""
    points, weights = gauss_legendre(5)
    widths = borders.diff()
    inner = (borders[:-1, None] + widths[:, None] * points).flatten()
    at = torch.cat([borders, inner])
    scores, gradients, _, difference = gradients_at(question, 0, False, at)
    products = signed(gradients, gradients, difference)[len(borders) :].double()
    products = products.view(len(widths), len(points), -1)
    parts = torch.einsum("n,w,nwl->nl", widths.double(), weights, products)
    mismatch = (parts.sum(1) - scores[: len(borders)].diff()).abs()
    rows = zip(mismatch.tolist(), borders[:-1].tolist(), borders[1:].tolist(), parts, strict=True)
    return list(rows)


def score_difference(question: Question) -> float:
    """Sequence score of the prompt less that of the baseline in its place."""
    total = 0.0
    for token in range(len(question.target_ids)):
        start, end = ends(question, token, False)
        with torch.no_grad():
            total += float(score(question, end, token) - score(question, start, token))
    return total


def gradient_x_activation(question: Question) -> Tensor:
    """(n_layers, n_output, n_input)"""
    seen: list[Any] = []
    # The embeddings come first and must need a gradient for anything after them to have one.
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.append(_leaf(output)))
        for layer in question.layers()
    ]
    try:
        scores = question.scores(question.model(question.fed_ids).logits)[0]
    finally:
        for hook in hooks:
            hook.remove()
    n_input = len(question.prompt_ids)
    rows = [torch.autograd.grad(s, seen, retain_graph=True) for s in scores]
    products = [[(g * x).sum(-1)[0, :n_input] for g, x in zip(r, seen, strict=True)] for r in rows]
    return torch.stack([torch.stack(tokens) for tokens in products]).transpose(0, 1)


def _leaf(output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


def ablation(question: Question) -> Tensor:
    """(n_output, n_input): scores of the prompt less those with one of its tokens replaced."""

    def scores(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return question.scores(question.model(ids).logits)[0]

    columns = []
    for place in range(len(question.prompt_ids)):
        ids = question.fed_ids.clone()
        ids[0, place] = BASELINE_ID
        columns.append(scores(question.fed_ids) - scores(ids))
    return torch.stack(columns, 1)


def run(formula: Callable[[Question], Tensor]) -> Callable[[Question], Run]:
    return lambda question: Run(
        settings="plain autograd",
        call=lambda: formula(question),
        attributions=lambda found: found,
        stated=lambda found: score_difference(question),
    )


def _steps(**options: Any) -> Callable[[Question], Run]:
    return run(lambda question: integrated_gradients(question, **options))


WORKS = {
    "error": run(converged),
    "error/50": _steps(),
    "error/unsigned": _steps(rule=trapezoid, term=unsigned),
    "tokens": _steps(),
    "tokens/prefix": _steps(whole_prefix=True),
    "tokens/unsigned": _steps(rule=trapezoid, term=unsigned),
    "layers": run(gradient_x_activation),
    "ablation": run(ablation),
}

if __name__ == "__main__":
    main(WORKS)
