"""A perturbation method as a generator."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from captum_llm_ext.perturbations.game import Game
from captum_llm_ext.perturbations.method import PerturbationMethod


class LeaveOneOut(PerturbationMethod):
    """The score of the whole prompt less that without each feature."""

    def run(self, game: Game) -> Generator[Tensor, Tensor, Tensor]:
        scores = yield torch.cat([game.whole(), game.leave_one_out()])
        return (scores[:1] - scores[1:]).T
