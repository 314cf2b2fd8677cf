"""The result of one attribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from captum.attr import InterpretableInput, TextTokenInput
from captum.attr import LLMAttributionResult as CaptumLLMAttributionResult
from torch import Tensor

from captum_llm_ext.display import clean_labels, distinct_names
from captum_llm_ext.inputs.token_text import readable_tokens
from captum_llm_ext.results.arithmetic import ArithmeticMixin
from captum_llm_ext.results.display_mixin import DisplayMixin
from captum_llm_ext.results.export_mixin import ExportMixin
from captum_llm_ext.results.json_format import fields_of
from captum_llm_ext.results.merge import Spans, merged_fields, selected_fields
from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.tables import Table, top_table
from captum_llm_ext.results.values import (
    NamedValues,
    array,
    checked_flags,
    checked_labels,
    checked_norm,
    checked_tensor,
    equal,
    optional_tensor,
    token_list,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class LLMAttributionResult(ArithmeticMixin, DisplayMixin, ExportMixin, CaptumLLMAttributionResult):
    """Attribution of each input token to each output token and to the whole output.

    A `captum.attr.LLMAttributionResult` whose tensors are float32, detached, and on the device of
    the values passed in.

    Args:
        input_tokens: n_input tokens or features.
        output_tokens: n_output target tokens.
        seq_attr: attribution to the sequence score, shape (n_input,), in units of the score (nats
            for "log_prob"); gradient norms are in units of the score per unit of the layer.
        token_attr: attribution to each token's score, shape (n_output, n_input); None (default)
            where only the sequence was attributed.
        output_probs: log probability of each output token, shape (n_output,), or None (default).
        inp: the attributed interpretable input, or None (default).
        convergence_delta: sum of the attributions minus the score difference that they should sum
            to, shape (n_output,), or (1,) for the sequence alone; None (default) for methods
            without a path. Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365.
        hidden_attr: attribution per hidden unit, shape (n_output, n_input, hidden), or (1, n_input,
            hidden) for the sequence alone; None (default) if not kept.
        n_evaluations: number of path points whose gradient was taken, or None (default).
        converged: whether adaptive quadrature met its tolerance, or None (default).
        score_path: points of the path and the sequence scores there, shape (2, n_points), or None
            (default); see `plot_path`.
        norm: "l1", "l2" or "linf" where values are norms of gradients; None (default) where values
            are attributions that add up.
        output_labels: names of the output tokens in tables and plots, which keep leading spaces;
            None (default) for `output_tokens`.
        measured: whether each input token's value was measured alone, shape (n_input,), bool; None
            (default) for methods that do not tell. The others share what was measured of a group.
        lds: rank correlation of the scores with what the attributions predict, on masks that they
            were not learned from; None (default) for methods that are no surrogate.
        starts_prompt: whether the first input token is the first token of the prompt, where
            attention sinks are; None (default) for what `inp` says, False without it.
        provenance: what made the result, see `Provenance`; None (default) where it is not known. It
            does not count when results are compared.
        spread: standard deviation of `seq_attr` over the results of which this is the mean, shape
            (n_input,), or None (default).

    Raises:
        ValueError: a shape does not fit the tokens, or the norm is unknown.
        TypeError: tokens are one string, not a list.

    Example:
        >>> result = LLMAttributionResult(
        ...     input_tokens=["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"],
        ...     output_tokens=["ĠParis"],
        ...     seq_attr=[80.8, 61.4, 17.6, 26.4, 10.7],
        ... )
        >>> result  # doctest: +NORMALIZE_WHITESPACE
        LLMAttributionResult(5 input tokens -> 1 output token,
        top: 'The' 80.8, ' capital' 61.4, ' France' 26.4)
        >>> round(result.seq_attr_dict["ĠFrance"], 1)
        26.4
    """

    convergence_delta: Tensor | None
    __hash__ = None  # type: ignore[assignment]  # compared by value, and mutable

    def __init__(
        self,
        *,
        input_tokens: list[str],
        output_tokens: list[str],
        seq_attr: npt.ArrayLike,
        token_attr: npt.ArrayLike | None = None,
        output_probs: npt.ArrayLike | None = None,
        inp: InterpretableInput | None = None,
        convergence_delta: Tensor | None = None,
        hidden_attr: Tensor | None = None,
        n_evaluations: int | None = None,
        converged: bool | None = None,
        norm: str | None = None,
        score_path: Tensor | None = None,
        output_labels: list[str] | None = None,
        starts_prompt: bool | None = None,
        provenance: Provenance | None = None,
        spread: Tensor | None = None,
        measured: Tensor | None = None,
        lds: float | None = None,
    ) -> None:
        self.provenance = provenance
        self.n_evaluations, self.converged, self.norm = n_evaluations, converged, checked_norm(norm)
        super().__init__(
            input_tokens=token_list("input_tokens", input_tokens),
            output_tokens=token_list("output_tokens", output_tokens),
            seq_attr=seq_attr,
            token_attr=token_attr,
            output_probs=output_probs,
            inp=inp,
        )
        n_output = len(self.output_tokens)
        self.output_labels = checked_labels(output_labels, n_output)
        self.starts_prompt = _starts_prompt(inp) if starts_prompt is None else starts_prompt
        self.convergence_delta = optional_tensor(
            "convergence_delta", convergence_delta, {"n_output": n_output}, {"sequence": 1}
        )
        self.spread = optional_tensor("spread", spread, {"n_input": len(self.input_tokens)})
        self._hidden_attr: Any = self._checked_hidden("hidden_attr", hidden_attr)
        self.measured = checked_flags("measured", measured, len(self.input_tokens))
        self.lds = lds
        self.score_path = optional_tensor("score_path", score_path, {"rows": 2, "points": None})

    @property
    def method(self) -> str | None:
        """The name of the method that made the result, where it is known."""
        return None if self.provenance is None else self.provenance.method

    @property
    def seq_attr(self) -> Tensor:
        """Attribution to the sequence score, shape (n_input,)."""
        return self._seq_attr

    @seq_attr.setter
    def seq_attr(self, seq_attr: npt.ArrayLike) -> None:
        self._seq_attr = checked_tensor("seq_attr", seq_attr, {"n_input": len(self.input_tokens)})

    @property
    def token_attr(self) -> Tensor | None:
        """Attribution to each token's score, shape (n_output, n_input), or None."""
        return self._token_attr

    @token_attr.setter
    def token_attr(self, token_attr: npt.ArrayLike | None) -> None:
        shape = {"n_output": len(self.output_tokens), "n_input": len(self.input_tokens)}
        self._token_attr = optional_tensor("token_attr", token_attr, shape)

    @property
    def output_probs(self) -> Tensor | None:
        """Log probability of each output token, shape (n_output,), or None."""
        return self._output_probs

    @output_probs.setter
    def output_probs(self, output_probs: npt.ArrayLike | None) -> None:
        shape = {"n_output": len(self.output_tokens)}
        self._output_probs = optional_tensor("output_probs", output_probs, shape)

    @property
    def hidden_attr(self) -> Any:
        """Attribution per hidden unit, shape (n_output, n_input, hidden), or None.

        A result of several layers has a dict from layer name to tensor, since widths differ.
        """
        return self._hidden_attr

    @property
    def labels(self) -> list[str]:
        """Names of the input tokens in tables and plots, as text.

        They have no marks of a vocabulary ("Ġ", "▁", bytes) and no outer spaces. Where two tokens
        differ by their spaces alone, these stay.
        """
        return clean_labels(self.input_tokens)

    @property
    def seq_attr_dict(self) -> dict[str, float]:
        """Label → attribution; repeated ones are named "the", "the (2)", "the (3)".

        `input_tokens` as the vocabulary has them ("ĠFrance") are found too.
        """
        values = self.seq_attr.tolist()
        raw = zip(distinct_names(self.input_tokens), values, strict=True)
        return NamedValues(zip(distinct_names(self.labels), values, strict=True), dict(raw))

    def top(self, k: int | None = 10, merge: str | Spans | None = None) -> Table:
        """The features of largest sequence attribution, the largest magnitude first.

        Args:
            k: how many (default 10); None for all.
            merge: "word" or spans to `merge` first; None (default) for tokens.

        Returns:
            A `Table` that prints as text, shows as HTML, and has `to_dataframe`. Each row has the
            feature's `name`, `attribution`, `share` of the sum of all magnitudes, and `position`.

        Raises:
            ValueError: k is not a whole number of at least 1.

        Example:
            >>> result = LLMAttributionResult(
            ...     input_tokens=["ĠFrance", "Ġis"], output_tokens=["ĠParis"], seq_attr=[3.0, -1.0]
            ... )
            >>> result.top(1)
            name    attribution  share  position
            France            3   0.75         0
        """
        result = self._merged(merge)
        return top_table(array(result.seq_attr), result.labels, k)

    def merge(self, spans: str | Spans = "word") -> Self:
        """The result with several input tokens as one: the tokens of each word, or of each span.

        The attribution of a word is the sum over its tokens. A norm of `LayerSaliency` becomes the
        norm of the gradient of the whole word: the root of the sum of squares for "l2", the
        largest for "linf".

        Args:
            spans: "word" (default) for words, which are runs of letters and digits without a
                space inside; or spans (start, stop) of input tokens. Tokens outside them do not
                change, nor do tokens of punctuation or of scripts without spaces. "word" does not
                change features that are not tokens, such as the values of a template.

        Returns:
            A result with the words as `input_tokens` and without `inp`; scores and convergence
            deltas do not change.

        Raises:
            ValueError: spans overlap or exceed the input.

        Example:
            >>> result = LLMAttributionResult(
            ...     input_tokens=["Ġun", "believ", "able", "Ġnews"],
            ...     output_tokens=["!"],
            ...     seq_attr=[1.0, 2.0, 3.0, 4.0],
            ... )
            >>> result.merge("word").seq_attr_dict
            {'unbelievable': 6.0, 'news': 4.0}
        """
        return type(self)(**merged_fields(self._stored_fields(), spans, self.inp))

    def _selected(self, kept: list[int]) -> Self:
        """The result with some of its input tokens alone, without `inp`."""
        starts = self.starts_prompt and kept[0] == 0
        fields = selected_fields(self._stored_fields(), kept)
        return type(self)(**fields | {"starts_prompt": starts})

    def _stored_fields(self) -> dict[str, Any]:
        """The arguments that make this result, but `inp`."""
        stored = [name for name in fields_of(self) if name not in self._computed]
        return {name: getattr(self, name) for name in stored}

    def __repr__(self) -> str:
        values, tokens = array(self.seq_attr), readable_tokens(self.input_tokens, 20)
        largest = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:3]
        top = ", ".join(f"'{tokens[i]}' {values[i]:.3g}" for i in largest)
        known = self.provenance.summary() if self.provenance else ""
        said = ", ".join(filter(None, [self._title(), known]))
        return f"{type(self).__name__}({said}, top: {top})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = vars(self), vars(other)
        return all(
            equal(mine[name], theirs.get(name)) for name in mine.keys() - {"inp", "provenance"}
        )

    def _checked_hidden(self, name: str, hidden_attr: Tensor | None) -> Tensor | None:
        inputs = {"n_input": len(self.input_tokens), "hidden": None}
        outputs = {"n_output": len(self.output_tokens)}
        return optional_tensor(name, hidden_attr, outputs | inputs, {"sequence": 1} | inputs)


def _starts_prompt(inp: InterpretableInput | None) -> bool:
    """Whether the first feature of an input is the first token of its prompt."""
    mask = getattr(inp, "itp_mask", None)
    return isinstance(inp, TextTokenInput) and (mask is None or bool(mask[0, 0]))
