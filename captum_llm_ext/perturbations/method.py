"""The base class of perturbation methods that are generators of masks."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_llm_ext.compat import PerturbationAttribution
from captum_llm_ext.perturbations.game import Game, new_seed
from captum_llm_ext.perturbations.masked_prompts import Masked
from captum_llm_ext.perturbations.masked_tensors import MaskedTensors
from captum_llm_ext.scoring.checks import check_counts

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run returns, where it is more than attributions.

    attributions: (1 + n_output, n_features), or (n_features,) of the sequence alone; measured:
    (n_features,) bool, which features were left out alone; lds: the rank correlation that a
    surrogate has with the scores of masks that it did not see.
    """

    attributions: Tensor
    measured: Tensor | None = None
    lds: float | None = None

    def by_column(self, column_of: Tensor) -> Outcome:
        """The same with each column of `column_of` (n_columns,) as a feature."""
        measured = None if self.measured is None else self.measured[column_of]
        return replace(self, attributions=self.attributions[:, column_of], measured=measured)


Run: TypeAlias = Generator[Tensor, Tensor, Tensor | Outcome]


class PerturbationMethod(PerturbationAttribution):
    """A perturbation method that reads as its algorithm does: a subclass has `run` alone.

    `run(game)` is a generator. It yields masks (n_rows, n_features), 1 where a feature is present
    and 0 where its baseline stands, and is sent their scores (n_rows, 1 + n_output), the
    sequence's first and then each target token's. It may yield again, and its later masks may
    depend on the scores. It returns attributions (1 + n_output, n_features), or (n_features,) of
    the sequence where it has no rows per token; or an `Outcome`, which says more about them. Each
    mask is scored once. All these tensors are on the CPU. `game` has `n_features`, `names`,
    `borders`, `guide`, `generator`, `whole()` and `leave_one_out()`: see
    `captum_llm_ext.perturbations.game.Game`.

    `LLMAttribution` runs it on prompts. `attribute` runs it on plain tensors, where the columns of
    scores are the outputs of `forward_func`, and each example is a game of its own.

    Args:
        forward_func: the model, or any function of the inputs.

    Example:
        >>> class LeaveOneOut(PerturbationMethod):
        ...     def run(self, game):
        ...         scores = yield torch.cat([game.whole(), game.leave_one_out()])
        ...         return (scores[:1] - scores[1:]).T
        >>> LeaveOneOut(lambda x: x.prod(1)).attribute(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[6., 6., 6.]])
    """

    token_rows = True
    # The name of the method whose attributions `LLMAttribution` hands to `run` as `game.guide`.
    guide: str | None = None

    def run(self, game: Game) -> Run:
        raise NotImplementedError(f"{type(self).__name__} needs run(self, game), a generator")

    def attribute(
        self,
        inputs: Tensor | Tensors,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensor | Tensors | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Tensor | Tensors:
        """Attribute the outputs of `forward_func` to the features of the inputs.

        The arguments are those of ``captum.attr.FeatureAblation.attribute``.

        Returns:
            Attributions of the shape that `FeatureAblation` gives.

        Raises:
            ValueError: baselines or masks that do not fit the inputs, or masks or attributions of
                `run` that do not fit the features.
        """
        check_counts(perturbations_per_eval=perturbations_per_eval)
        masked = MaskedTensors(
            self.forward_func, inputs, baselines, feature_mask, target, additional_forward_args
        )
        seed = new_seed()  # shared, since one output in all takes the same masks of all examples
        with torch.no_grad(), tqdm(disable=not show_progress, desc=type(self).__name__) as bar:
            plays = [Play(self, Game.of_numbers(n, seed)) for n in masked.n_features]
            while any(play.is_waiting for play in plays):
                masks = [play.masks for play in plays]
                scores = masked.scores(masks, perturbations_per_eval, bar.update)
                for play, rows in zip(plays, scores, strict=True):
                    if play.is_waiting:
                        play.send(rows)
        attr = masked.shaped([play.outcome.attributions for play in plays])
        return attr if isinstance(inputs, tuple) else attr[0]

    def attribute_masked(
        self,
        masked: Masked,
        guide: Tensor | None = None,
        feature_mask: Tensor | None = None,
        **reserved: Any,
    ) -> Outcome:
        """What is found of a prompt or a picture: attributions (1 + n_output or 1, n_features).

        Args:
            masked: its masked prompts.
            guide: (n_features,) attributions of a cheaper method.
            feature_mask: (1, n_features) numbers that put features into groups.
            **reserved: options of Captum's methods, without effect here.
        """
        group_of = torch.arange(masked.inp.n_itp_features)
        if feature_mask is not None:
            if feature_mask.numel() != len(group_of):
                raise ValueError(
                    f"expected a feature_mask (1, {len(group_of)}), one number for each feature; "
                    f"got {tuple(feature_mask.shape)}"
                )
            group_of = feature_mask.cpu().flatten().unique(return_inverse=True)[1]
        game = Game.of_input(masked.inp, group_of)
        if guide is not None:
            of_groups = torch.zeros(game.n_features).index_add(0, group_of, guide.float().cpu())
            game = replace(game, guide=of_groups)
        play = Play(self, game)
        while play.is_waiting:
            play.send(masked.scores(play.masks[:, group_of]).cpu())
        outcome = play.outcome.by_column(group_of)
        return replace(outcome, attributions=outcome.attributions.to(masked.device))


class Play:
    """A method's run over one game: `masks` that wait for their scores, then the `outcome`."""

    def __init__(self, method: PerturbationMethod, game: Game) -> None:
        self.game, self.masks, self.outcome = game, game.whole(), Outcome(game.whole())
        self._name, self._n_columns, self.is_waiting = type(method).__name__, 1, True
        self._run = method.run(game)
        if not isinstance(self._run, Generator):
            raise TypeError(
                f"{self._name}.run must be a generator, which yields masks; got a "
                f"{type(self._run).__name__}"
            )
        self._resume(None)

    def send(self, scores: Tensor) -> None:
        """Go on with the scores (n_rows, n_columns) of `masks`."""
        self._n_columns = scores.size(1)
        self._resume(scores)

    def _resume(self, scores: Any) -> None:
        n_features = self.game.n_features
        try:
            masks = self._run.send(scores)
        except StopIteration as stop:
            outcome = stop.value if isinstance(stop.value, Outcome) else Outcome(stop.value)
            attr = checked_rows(outcome.attributions, self._n_columns, n_features, self._name)
            self.outcome, self.is_waiting = replace(outcome, attributions=attr), False
            return
        if masks.dim() != 2 or masks.size(1) != n_features or not len(masks):
            raise ValueError(
                f"{self._name}.run must yield masks (n_rows, {n_features}) of at least one row; "
                f"got {tuple(masks.shape)}"
            )
        self.masks = masks


def checked_rows(attr: Any, n_columns: int, n_features: int, name: str) -> Tensor:
    """Attributions (n_columns or 1, n_features), of any shape that holds as many numbers."""
    sizes = (n_columns * n_features, n_features)
    if not isinstance(attr, Tensor) or attr.numel() not in sizes:
        shape = tuple(attr.shape) if isinstance(attr, Tensor) else type(attr).__name__
        raise ValueError(
            f"{name} must return attributions ({n_columns}, {n_features}), a row for each output, "
            f"or ({n_features},) of the first alone; got {shape}"
        )
    return attr.detach().reshape(-1, n_features)
