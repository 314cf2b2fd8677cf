"""Guided ablation: a budget of evaluations, spent where a cheap method says that it matters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_llm_ext.perturbations.game import Border, Game
from captum_llm_ext.perturbations.guides import checked_guide
from captum_llm_ext.perturbations.method import Outcome, PerturbationMethod, Run
from captum_llm_ext.scoring.checks import check_counts
from captum_llm_ext.warning import warn

# Shares of the evaluations: ALONE goes to features that the guide names; FIRST_GROUPS of what is
# left goes to the groups that the other features begin in, and the remainder to splitting groups.
ALONE, FIRST_GROUPS = 0.25, 0.5
SPLIT_AT_ONCE = 0.25  # of the evaluations that are left, as groups
LEAST_PART = 0.25  # of a group that a natural border may cut off
FLOOR = 0.1  # of the mean magnitude in a group, added to each member's

Group = list[int]  # features, in their order


class GuidedAblation(PerturbationMethod):
    """Feature ablation on a budget, which a guide of one pass tells where to look.

    A quarter of the evaluations goes to the features that the guide names first, each left out
    alone. The others begin in groups of neighbours, each left out as a whole. The groups with the
    largest drops are split in two, at the most natural border (paragraph, sentence, word), and both
    halves are measured, until the budget is spent. At the end each feature belongs to one part that
    was left out in one evaluation. A feature that is alone there has its own drop, as in
    ``captum.attr.FeatureAblation``. The members of a group share the group's drop in proportion to
    the guide's magnitude plus a tenth of its mean in the group; equally where that is zero. The
    shares are the same for every target token.

    With at least one evaluation more than there are features it equals `FeatureAblation`. The whole
    prompt counts as an evaluation, and the guide's passes do not. The result's `measured`
    (n_input,) says which features were left out alone.

    Args:
        forward_func: the model, or any function of the inputs.
        max_evaluations: how many masked inputs are scored at most, the whole one among them.
        guide: the name of the method whose attributions are the guide, with its defaults; None for
            no guide. Default: "flow", and "saliency" for models whose attention cannot be read.
            It explains log p of the target, whatever the score is. Pictures and plain tensors have
            none.

    Raises:
        ValueError: `max_evaluations` is not an int of at least 1, or the guide is not a method's
            name; baselines or masks given to `attribute` do not fit the inputs.

    Warns:
        when one evaluation leaves nothing to measure: all attributions are 0.

    Inputs are (batch, n_features) for the features that `LLMAttribution` switches on and off. What
    its rules were chosen on, and how it does on other prompts, is in docs/faithfulness.md. Feature
    ablation of language models: Miglani et al. 2023, https://arxiv.org/abs/2312.05491.

    Example:
        >>> import torch
        >>> method = GuidedAblation(lambda x: x.sum(1), max_evaluations=3)
        >>> method.attribute(torch.tensor([[1.0, 3.0, 2.0, 2.0]]))
        tensor([[2., 2., 2., 2.]])
    """

    def __init__(
        self, forward_func: object, max_evaluations: int = 64, guide: str | None = "flow"
    ) -> None:
        super().__init__(forward_func)
        check_counts(max_evaluations=max_evaluations)
        self.max_evaluations, self.guide = max_evaluations, checked_guide(guide)

    def run(self, game: Game) -> Run:
        """Groups of features are left out, and those that matter most are split."""
        magnitude = torch.zeros(game.n_features) if game.guide is None else game.guide.abs()
        left = self.max_evaluations - 1
        if not left:
            warn("one evaluation leaves nothing to measure: give max_evaluations of at least 2")
            scores = yield game.whole()
            nothing = torch.zeros(game.n_features)
            return Outcome(nothing.expand(scores.size(1), -1), nothing > 0)

        groups = first_groups(game, magnitude, left)
        left -= len(groups)
        scores = yield torch.cat([game.whole(), without(groups, game)])
        whole, drops = scores[0], list(scores[0] - scores[1:])
        while chosen := groups_to_split(groups, drops, left):
            halves = [half for i in chosen for half in split(groups[i], game.borders)]
            left -= len(halves)
            scores = yield without(halves, game)
            kept = [i for i in range(len(groups)) if i not in chosen]
            groups = [*(groups[i] for i in kept), *halves]
            drops = [*(drops[i] for i in kept), *(whole - scores)]

        attr = torch.zeros(len(whole), game.n_features, dtype=whole.dtype)
        measured = torch.zeros(game.n_features, dtype=torch.bool)
        for group, drop in zip(groups, drops, strict=True):
            attr[:, group] = drop[:, None] * shares(magnitude[group])
            measured[group] = len(group) == 1
        return Outcome(attr, measured)


def first_groups(game: Game, magnitude: Tensor, evaluations: int) -> list[Group]:
    """The features that the guide names, each alone, and the others in groups of neighbours."""
    if evaluations >= game.n_features:
        return [[i] for i in range(game.n_features)]
    n_alone = int(ALONE * evaluations) if magnitude.any() else 0
    order = magnitude.argsort(descending=True, stable=True).tolist()
    groups = [sorted(order[n_alone:])]
    while len(groups) < FIRST_GROUPS * (evaluations - n_alone):
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        groups[largest : largest + 1] = split(groups[largest], game.borders)
    return [*([i] for i in sorted(order[:n_alone])), *groups]


def groups_to_split(groups: Sequence[Group], drops: Sequence[Tensor], left: int) -> list[int]:
    """Those with the largest drops of the first score; each takes two evaluations."""
    several = [i for i, group in enumerate(groups) if len(group) > 1]
    several.sort(key=lambda i: -abs(float(drops[i][0])))
    return several[: min(left // 2, max(1, int(SPLIT_AT_ONCE * left)))]


def split(group: Group, borders: Sequence[Border]) -> tuple[Group, Group]:
    """Two parts, cut at the most natural border between members, of such the nearest the middle.

    A part has at least a quarter of the members.
    """

    def quality(cut: int) -> tuple[int, int]:
        smaller = min(cut, len(group) - cut)
        border = max(borders[group[cut - 1] : group[cut]])
        return (border if smaller >= LEAST_PART * len(group) else -1, smaller)

    cut = max(range(1, len(group)), key=quality)
    return group[:cut], group[cut:]


def without(groups: Sequence[Group], game: Game) -> Tensor:
    """(n_groups, n_features) masks that lack one group each."""
    masks = torch.ones(len(groups), game.n_features)
    for mask, group in zip(masks, groups, strict=True):
        mask[group] = 0
    return masks


def shares(magnitude: Tensor) -> Tensor:
    """(n_members,) what each member has of its group's drop; they sum to 1."""
    weights = magnitude + FLOOR * magnitude.mean() if magnitude.any() else magnitude + 1
    return weights / weights.sum()
