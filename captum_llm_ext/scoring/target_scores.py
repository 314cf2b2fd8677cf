"""How the logits of a pass become the scores of target tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Target:
    """Target tokens and their scores.

    ids: (n_output,) token ids; attr_target: the score, "log_prob", "prob", "logit" or "rank" (minus
    how many tokens are likelier); contrast: (n_output,) token ids whose scores are subtracted, or
    None; of_positions: the ids are positions of the prompt, and the logits are over these.
    """

    ids: Tensor
    attr_target: str = "log_prob"
    contrast: Tensor | None = None
    of_positions: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fed(self) -> Tensor:
        """The ids that the model is fed so that all have scores: all but the last, or none."""
        return self.ids[:0] if self.of_positions else self.ids[:-1]

    @property
    def is_additive(self) -> bool:
        """Whether the sequence score is the sum of the token scores."""
        return self.attr_target != "prob"

    def as_log_prob(self) -> Target:
        """The same tokens, scored by their log probability."""
        return replace(self, attr_target="log_prob", contrast=None)

    def token_scores(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """Scores (rows, stop - start) of target tokens start…stop-1 from their logits."""
        scores = self._scores(logits, self.ids[start:stop])
        if self.contrast is None:
            return scores
        return scores - self._scores(logits, self.contrast[start:stop])

    def sequence_score(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """Score (rows,) of the target tokens start…stop-1 together."""
        if self.is_additive:
            return self.token_scores(logits, start, stop).sum(1)
        score = self._scores(logits, self.ids[start:stop], sequence=True)
        if self.contrast is None:
            return score
        return score - self._scores(logits, self.contrast[start:stop], sequence=True)

    def _scores(self, logits: Tensor, ids: Tensor, sequence: bool = False) -> Tensor:
        """Scores (rows, n) of ids (n,), or (rows,) of the product of their probabilities."""
        logits = logits.float()
        index = ids.to(logits.device).expand(logits.size(0), -1).unsqueeze(-1)
        chosen = logits.gather(-1, index).squeeze(-1)
        if self.attr_target == "logit":
            return chosen
        if self.attr_target == "rank":
            return -(logits > chosen.unsqueeze(-1)).sum(-1).float()
        log_probs = chosen - logits.logsumexp(-1)
        if self.attr_target == "log_prob":
            return log_probs
        return (log_probs.sum(1) if sequence else log_probs).exp()
