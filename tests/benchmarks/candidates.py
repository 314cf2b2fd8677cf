"""Ways to attribute with about 2 K evaluations that were tried beside `TwoStageAblation`.

Each is a function of a game: present (n_rows, n_features) → scores (n_rows,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from captum_llm_ext import LLMAttributionResult, TextTokenInput, explain
from captum_llm_ext.compat import CaptumTextTokenInput
from captum_llm_ext.metrics.removal import no_gradients, open_prompts, sequence_scores
from captum_llm_ext.scoring.tasks import Request
from tests.benchmarks.attributed import BASELINE, result_of

Game: TypeAlias = Callable[[Tensor], Tensor]


def leave_one_out(game: Game, n: int) -> Tensor:
    return game(torch.ones(1, n)) - game(1 - torch.eye(n))


def two_sided(game: Game, n: int) -> Tensor:
    """The mean of leaving out of the whole and of adding to the bare prompt."""
    return (leave_one_out(game, n) + game(torch.eye(n)) - game(torch.zeros(1, n))) / 2


def shapley_pair(game: Game, n: int) -> Tensor:
    """Shapley sampling with one permutation and its reverse."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return (_along(game, order) + _along(game, order.flip(0))) / 2


def windows(game: Game, n: int) -> Tensor:
    """The mean of leaving out one feature and of leaving out two neighbours."""
    starts, places = torch.arange(-1, n)[:, None], torch.arange(n)
    absent = (places == starts) | (places == starts + 1)
    drop = (game(torch.ones(1, n)) - game((~absent).float())) / absent.sum(1)
    return (leave_one_out(game, n) + (drop[1:] + drop[:-1]) / 2) / 2


def regression(game: Game, n: int) -> Tensor:
    """Leaving one out, corrected by a ridge regression on random halves and their complements."""
    first = leave_one_out(game, n)
    halves = torch.rand(n // 2, n, generator=torch.Generator().manual_seed(0)) < 0.5
    absent = torch.cat([halves, ~halves]).double()
    missing = game(torch.ones(1, n)) - game(1 - absent) - absent @ first
    weights = 1 / absent.sum(1).clamp(min=1)
    gram = (absent * weights[:, None]).T @ absent + 0.2 * torch.eye(n)
    return first + torch.linalg.solve(gram, (absent * weights[:, None]).T @ missing)


def within_half(game: Game, n: int) -> Tensor:
    """And once more within the half, of the more or the less important, that each belongs to."""
    first = leave_one_out(game, n)
    top = _top(first, (n + 1) // 2)
    own = (top[:, None] == top).float()
    return (first + game(own) - game(own * (1 - torch.eye(n)))) / 2


def in_context(kept: float, least: bool = False) -> Callable[[Game, int], Tensor]:
    """And once more with this share of the most (or least) important features there."""

    def attribution(game: Game, n: int) -> Tensor:
        first = leave_one_out(game, n)
        there = _top(-first if least else first, max(1, round(n * kept))).float()
        eye = torch.eye(n)
        with_it, without = torch.maximum(there, eye), there * (1 - eye)
        return (first + game(with_it) - game(without)) / 2

    return attribution


CANDIDATES: dict[str, Callable[[Game, int], Tensor]] = {
    "two-sided ablation": two_sided,
    "Shapley, a permutation and its reverse": shapley_pair,
    "ablation of one and of two neighbours": windows,
    "ablation and regression": regression,
    "ablation, again within each half": within_half,
    "ablation, again without the lower half": in_context(0.5),
    "ablation, again without the upper half": in_context(0.5, least=True),
}


def by_candidate(
    name: str, model: nn.Module, tokenizer: Any, inp: Any, target: Tensor
) -> LLMAttributionResult:
    baseline = BASELINE if isinstance(inp, CaptumTextTokenInput) else None
    prompts = open_prompts(model, tokenizer, inp, Request(target), baseline)

    def game(rows: Tensor) -> Tensor:
        with no_gradients():
            return sequence_scores(prompts, rows.float())

    return result_of(CANDIDATES[name](game, inp.n_itp_features), inp, tokenizer, target)


def first_token_aside(model: nn.Module, tokenizer: Any, inp: Any, target: Tensor) -> Any:
    """L1 saliency, the first token of a prompt without a template given the median."""
    result = explain(model, tokenizer, inp, target, "saliency", include_per_token_attr=False)
    if type(inp) is TextTokenInput and inp.itp_mask is None:
        values = result.seq_attr.clone()
        values[0] = values.median()
        result.seq_attr = values
    return result


def _along(game: Game, order: Tensor) -> Tensor:
    """What each feature takes away when they are removed in this order."""
    gone = order.argsort() < torch.arange(len(order) + 1)[:, None]
    scores = game((~gone).float())
    return (scores[:-1] - scores[1:])[order.argsort()]


def _top(attr: Tensor, count: int) -> Tensor:
    return attr.argsort(descending=True, stable=True).argsort() < count
