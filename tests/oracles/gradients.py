"""The formulas of the methods, written out one target token at a time with plain autograd.

Slow and simple on purpose: nothing is shared with the package. Sequences grow token by token, as
in Captum, so the formulas hold for models that are not causal too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Score = Callable[[Tensor], Tensor]  # logits (vocabulary,) → number


def token_score(token: int, kind: str = "log_prob", contrast: int | None = None) -> Score:
    """log p, p or logit of `token`, less the same of `contrast`."""
    transform = {
        "log_prob": lambda logits: logits.log_softmax(-1),
        "prob": lambda logits: logits.softmax(-1),
        "logit": lambda logits: logits,
    }[kind]

    def score(logits: Tensor) -> Tensor:
        values = transform(logits)
        return values[token] - (0 if contrast is None else values[contrast])

    return score


def first_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else next(v for v in value if torch.is_tensor(v))


def _swap_first(value: Any, new: Tensor) -> Any:
    return new if isinstance(value, Tensor) else (new, *value[1:])


@contextmanager
def hooked(
    layers: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor | None], at_input: bool
) -> Iterator[None]:
    """Call `change(number of the layer, its output or input)`; what it returns takes its place."""

    def output_hook(number: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            new = change(number, first_tensor(output))
            return None if new is None else _swap_first(output, new)

        return hook

    def input_hook(number: int) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: Any) -> Any:
            new = change(number, first_tensor(inputs))
            return None if new is None else (new, *inputs[1:])

        return hook

    handles = [
        layer.register_forward_pre_hook(input_hook(i))
        if at_input
        else layer.register_forward_hook(output_hook(i))
        for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Problem:
    """A prompt, its baseline, the target and the layers that the score is explained by.

    `baseline` is token ids (n,), or embeddings (n, hidden) that take the place of the prompt's in
    the output of `embedding`. `generated_baseline` (a token id) moves earlier target tokens too.
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    prompt: Tensor
    target: Tensor
    baseline: Tensor | None = None
    embedding: nn.Module | None = None
    at_input: bool = False
    kind: str = "log_prob"
    contrast: Tensor | None = None
    generated_baseline: int | None = None

    @property
    def width(self) -> int:
        return len(self.prompt) + len(self.target)

    def ids(self, t: int) -> Tensor:
        return torch.cat([self.prompt, self.target[:t]])[None]

    def score(self, t: int) -> Score:
        contrast = None if self.contrast is None else int(self.contrast[t])
        return token_score(int(self.target[t]), self.kind, contrast)

    def values(self, ids: Tensor) -> list[Tensor]:
        """What the layers put out (or take in) for these ids, (1, length, hidden) each."""
        seen: dict[int, Tensor] = {}

        def keep(number: int, value: Tensor) -> None:
            seen[number] = value.detach().clone()

        with torch.no_grad(), hooked(self.layers, keep, self.at_input):
            self.model(ids)
        return [seen[number] for number in range(len(self.layers))]

    def start_values(self, t: int) -> list[Tensor]:
        """The same where the prompt has become the baseline."""
        if self.baseline is None:
            raise ValueError("this problem has no baseline")
        earlier = self.target[:t].clone()
        if self.generated_baseline is not None:
            earlier[:] = self.generated_baseline
        if self.embedding is None:
            return self.values(torch.cat([self.baseline, earlier])[None])

        def replace(_: int, value: Tensor) -> Tensor:
            return torch.cat([self.baseline[None], value[:, len(self.prompt) :]], dim=1)

        with hooked([self.embedding], replace, at_input=False):
            return self.values(self.ids(t))

    def gradient(self, t: int, values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """∂score_t / ∂layer with the layers set to `values`, and score_t there."""
        leaves = [value.detach().clone().requires_grad_() for value in values]
        with (
            torch.enable_grad(),
            hooked(self.layers, lambda i, _: leaves[i].clone(), self.at_input),
        ):
            score = self.score(t)(self.model(self.ids(t)).logits[0, -1])
        gradients = torch.autograd.grad(score, leaves, allow_unused=True)
        filled = [
            torch.zeros_like(v) if g is None else g for g, v in zip(gradients, leaves, strict=True)
        ]
        return filled, score.detach()

    def pad(self, row: Tensor) -> Tensor:
        """(1, length, hidden) → (width, hidden), zero from the target token on."""
        padded = row.new_zeros(self.width, row.shape[-1])
        padded[: row.shape[1]] = row[0]
        return padded


def gradients(problem: Problem) -> list[Tensor]:
    """∂score/∂layer at the prompt itself: a (T, width, hidden) tensor for each layer."""
    rows = [
        problem.gradient(t, problem.values(problem.ids(t)))[0] for t in range(len(problem.target))
    ]
    return [torch.stack([problem.pad(row[i]) for row in rows]) for i in range(len(problem.layers))]


def gradient_x_activation(problem: Problem) -> list[Tensor]:
    last = problem.values(problem.ids(len(problem.target)))
    return [g * problem.pad(v) for g, v in zip(gradients(problem), last, strict=True)]


@dataclass
class Path:
    attributions: list[Tensor]  # (T, width, hidden) of each layer
    delta: Tensor  # (T,)
    difference: Tensor  # (T,) score at the end less score at the start


def _rule(n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    points, weights = np.polynomial.legendre.leggauss(n_steps)
    return (1 + points) / 2, weights / 2


def _between(start: list[Tensor], end: list[Tensor], alpha: float) -> list[Tensor]:
    return [s + alpha * (e - s) for s, e in zip(start, end, strict=True)]


def integrated_gradients(problem: Problem, n_steps: int) -> Path:
    """Gauss-Legendre sum of Sundararajan et al. 2017, equation 1; all layers move together."""
    rows, deltas, differences = [], [], []
    for t in range(len(problem.target)):
        start, end = problem.start_values(t), problem.values(problem.ids(t))
        total = [torch.zeros_like(value) for value in end]
        for alpha, weight in zip(*_rule(n_steps), strict=True):
            gradient, _ = problem.gradient(t, _between(start, end, float(alpha)))
            total = [
                a + weight * g * (e - s)
                for a, g, e, s in zip(total, gradient, end, start, strict=True)
            ]
        difference = problem.gradient(t, end)[1] - problem.gradient(t, start)[1]
        rows.append([problem.pad(row) for row in total])
        deltas.append(sum(row.sum() for row in total) - difference)
        differences.append(difference)
    layers = [torch.stack([row[i] for row in rows]) for i in range(len(problem.layers))]
    return Path(layers, torch.stack(deltas), torch.stack(differences))


def sequence_gradient(problem: Problem, values: list[Tensor]) -> list[Tensor]:
    """∂ (sequence score) / ∂layer, (width, hidden) each, in one pass: for causal models alone.

    The sequence score is the sum of the token scores, or exp(Σ log p) for "prob".
    """
    count = len(problem.target)
    leaves = [value.detach().clone().requires_grad_() for value in values]
    with (
        torch.enable_grad(),
        hooked(problem.layers, lambda i, _: leaves[i].clone(), problem.at_input),
    ):
        logits = problem.model(problem.ids(count - 1)).logits[0, -count:]
        log_p = logits.log_softmax(-1)[torch.arange(count), problem.target].sum()
        score = log_p.exp() if problem.kind == "prob" else log_p
    return [problem.pad(g) for g in torch.autograd.grad(score, leaves)]


def sequence_integrated_gradients(problem: Problem, n_steps: int) -> list[Tensor]:
    """Integrated gradients of the sequence score itself, (width, hidden) each."""
    last = len(problem.target) - 1
    start, end = problem.start_values(last), problem.values(problem.ids(last))
    total = [torch.zeros(problem.width, value.shape[-1]) for value in end]
    for alpha, weight in zip(*_rule(n_steps), strict=True):
        gradient = sequence_gradient(problem, _between(start, end, float(alpha)))
        total = [
            a + weight * g * problem.pad(e - s)
            for a, g, e, s in zip(total, gradient, end, start, strict=True)
        ]
    return total
