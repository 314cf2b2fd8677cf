"""The passages that each statement of an answer rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from captum_llm_ext.display import distinct_names
from captum_llm_ext.inputs.token_text import readable_tokens

if TYPE_CHECKING:
    from captum_llm_ext.results.single import LLMAttributionResult


@dataclass(frozen=True)
class Citation:
    """A statement and the features of the prompt that raise its score most.

    Attributes:
        statement: its text.
        passages: (number of the feature from 0 on, its name, its attribution), the largest first.
    """

    statement: str
    passages: list[tuple[int, str, float]]

    def __str__(self) -> str:
        cited = "".join(f"\n{score:6.2f}  [{i}] {name}" for i, name, score in self.passages)
        return f"{self.statement.strip()}{cited}"


def cite(result: LLMAttributionResult, k: int = 3) -> list[Citation]:
    """For each output of a result the features that carry it, for citations.

    Args:
        result: an attribution with a row for each statement (``by_output="sentence"``), whose
            features are passages; with a row for each token it cites for each token.
        k: passages of each statement at most. Those that do not raise its score are left out.

    Returns:
        A `Citation` for each row of `token_attr` (n_output, n_input), with `statement` and
        `passages`; printed, it lists these and their scores, in units of the score.

    Raises:
        ValueError: the result has no rows (its `token_attr` is None), or `k` is not an int of at
            least 1.

    Example:
        >>> result = LLMAttributionResult(
        ...     input_tokens=["Rain is due.", "Cats sleep."],
        ...     output_tokens=["It will rain."],
        ...     seq_attr=[2.0, -0.5],
        ...     token_attr=[[2.0, -0.5]],
        ... )
        >>> print(cite(result)[0])
        It will rain.
          2.00  [0] Rain is due.

    Source: Cohen-Wang et al. 2024, "ContextCite", https://arxiv.org/abs/2409.00729.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be an int of at least 1, got {k!r}")
    if result.token_attr is None:
        raise ValueError(
            "the result has no rows to cite for (token_attr is None): attribute with "
            'by_output="sentence"'
        )
    names = readable_tokens(distinct_names(result.input_tokens))
    citations = []
    for statement, row in zip(result.output_tokens, result.token_attr, strict=True):
        largest = row.cpu().argsort(descending=True, stable=True)[:k].tolist()
        cited = [(i, names[i], float(row[i])) for i in largest if row[i] > 0]
        citations.append(Citation(statement, cited))
    return citations
