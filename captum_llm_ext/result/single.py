"""The result of one attribution."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from captum.attr import InterpretableInput
from captum.attr import LLMAttributionResult as CaptumLLMAttributionResult
from torch import Tensor

from captum_llm_ext.display import (
    AttributionText,
    distinct_names,
    draw_bars,
    draw_heat_map,
    draw_shaded_text,
    print_text,
    readable_tokens,
    render_text,
)
from captum_llm_ext.result.export import fields_of
from captum_llm_ext.result.merge import Spans, merged_fields
from captum_llm_ext.result.stored import StoredResult
from captum_llm_ext.result.values import (
    array,
    checked_tensor,
    count,
    equal,
    known_norm,
    optional_tensor,
    token_list,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from typing_extensions import Self

_MOST_BARS = 60  # input tokens; a longer prompt is plotted as shaded text


class LLMAttributionResult(StoredResult, CaptumLLMAttributionResult):
    """Attribution of every input token to every output token and to the whole output.

    A `captum.attr.LLMAttributionResult` that keeps every value in float32, detached, on the device
    it came from.

    Args:
        input_tokens: n_input tokens or features.
        output_tokens: n_output target tokens.
        seq_attr: attribution to the sequence score, shape (n_input,). In units of the score (nats
            for "log_prob"), or of the score per unit of the layer for gradient norms.
        token_attr: attribution to each token's score, shape (n_output, n_input); None (default)
            where only the sequence was attributed.
        output_probs: log probability of each output token, shape (n_output,), or None (default).
        inp: the interpretable input explained, or None (default).
        convergence_delta: sum of the attributions less the score difference they should sum to,
            shape (n_output,), or (1,) for the sequence alone; None (default) for methods without
            a path. Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365.
        hidden_attr: attribution before it was summed over hidden units, shape (n_output, n_input,
            hidden), or (1, n_input, hidden) for the sequence alone; None (default) if not kept.
        n_evaluations: points of the path whose gradient was taken, or None (default).
        converged: whether adaptive quadrature met its tolerance, or None (default).
        norm: of gradients of which the values are, "l1", "l2" or "linf"; None (default) for
            attributions that add up.

    Raises:
        ValueError: a shape does not fit the tokens, or an unknown norm.
        TypeError: tokens are one string rather than a list.

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
    __hash__ = None  # type: ignore[assignment]  # compared by value, and can be changed

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
    ) -> None:
        self.n_evaluations, self.converged, self.norm = n_evaluations, converged, known_norm(norm)
        super().__init__(
            input_tokens=token_list("input_tokens", input_tokens),
            output_tokens=token_list("output_tokens", output_tokens),
            seq_attr=seq_attr,
            token_attr=token_attr,
            output_probs=output_probs,
            inp=inp,
        )
        n_output = len(self.output_tokens)
        self.convergence_delta = optional_tensor(
            "convergence_delta", convergence_delta, {"n_output": n_output}, {"sequence": 1}
        )
        self._hidden_attr: Any = self._checked_hidden("hidden_attr", hidden_attr)

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

        Of several layers: a dict from layer name to such a tensor, since widths differ.
        """
        return self._hidden_attr

    @property
    def seq_attr_dict(self) -> dict[str, float]:
        """Token → attribution; repeated tokens are told apart as "the", "the (2)", "the (3)"."""
        names = distinct_names(self.input_tokens)
        return dict(zip(names, self.seq_attr.tolist(), strict=True))

    def merge(self, spans: str | Spans = "word") -> Self:
        """The same with several input tokens as one: the words of sub-words, or given spans.

        Attributions of a word are the sum of its tokens'. Norms (`norm` "l2" and "linf" of
        `LayerSaliency`) are combined to what the norm of the word's whole gradient is: the root of
        the sum of squares, and the largest.

        Args:
            spans: "word" (default): runs of letters and digits that no space divides; punctuation
                and tokens of scripts without spaces stay as they are, and so do features that are
                no tokens (values of a template). Or (start, stop) places of input tokens; those
                outside all spans stay as they are.

        Returns:
            A result with the words as `input_tokens` and without `inp`; scores and convergence
            deltas stay as they were.

        Raises:
            ValueError: spans that overlap or leave the input.

        Example:
            >>> result = LLMAttributionResult(
            ...     input_tokens=["Ġun", "believ", "able", "Ġnews"],
            ...     output_tokens=["!"],
            ...     seq_attr=[1.0, 2.0, 3.0, 4.0],
            ... )
            >>> result.merge("word").seq_attr_dict
            {' unbelievable': 6.0, ' news': 4.0}
        """
        stored = [name for name in fields_of(self) if name not in self._computed]
        fields = {name: getattr(self, name) for name in stored}
        return type(self)(**merged_fields(fields, spans, self.inp))

    def _merged(self, merge: str | Spans | None) -> Self:
        return self if merge is None else self.merge(merge)

    def plot_seq_attr(
        self, show: bool = False, ax: Axes | None = None, merge: str | Spans | None = None
    ) -> tuple[Figure, Axes] | None:
        """Plot the sequence attribution: bars, or shaded text for more than 60 input tokens.

        Args:
            show: True shows the plot and returns None; False (default) returns (figure, axes).
            ax: axes to draw into; None (default) for a new figure.
            merge: "word" or spans to `merge` first; None (default) for tokens.
        """
        result = self._merged(merge)
        draw = draw_bars if len(result.input_tokens) <= _MOST_BARS else draw_shaded_text
        drawn = draw(array(result.seq_attr), result.input_tokens, "Sequence Attribution", ax)
        return shown(drawn, show)

    def plot_token_attr(
        self, show: bool = False, ax: Axes | None = None, merge: str | Spans | None = None
    ) -> tuple[Figure, Axes] | None:
        """Plot output tokens by input tokens; more than 60 input tokens continue in blocks below.

        Args:
            show: True shows the plot and returns None; False (default) returns (figure, axes).
            ax: axes to draw into; None (default) for a new figure.
            merge: "word" or spans to `merge` first; None (default) for tokens.

        Raises:
            ValueError: there is no `token_attr`; plot `plot_seq_attr` instead.
        """
        result = self._merged(merge)
        if result.token_attr is None:
            raise ValueError(
                "token_attr is None, since only the sequence was attributed: use plot_seq_attr, "
                "or attribute with include_per_token_attr=True"
            )
        values, rows = array(result.token_attr), result.output_tokens
        drawn = draw_heat_map(values, rows, result.input_tokens, "Token Attribution", ax)
        return shown(drawn, show)

    def to_text(
        self, color: bool = True, width: int | None = None, merge: str | Spans | None = None
    ) -> str:
        """Table for a terminal: a row per input token, columns sequence and output tokens.

        More than 60 input tokens are shown as shaded text and a table of the 20 largest.

        Args:
            color: shade the cells with ANSI colours (default True).
            width: columns of the terminal; None (default) for the present one.
            merge: "word" or spans to `merge` first; None (default) for tokens.
        """
        return render_text(self._merged(merge)._text(), color, width)

    def print(self, file: IO[str] | None = None, merge: str | Spans | None = None) -> None:
        """Print the table of `to_text`, in colours where the terminal or notebook has them.

        Args:
            file: where to; None (default) for standard output.
            merge: "word" or spans to `merge` first; None (default) for tokens.
        """
        print_text(self._merged(merge)._text(), file)

    def _text(self) -> AttributionText:
        footers = {"log probability": self.output_probs, "convergence delta": self._footer_delta()}
        return AttributionText(
            self._title(),
            self.input_tokens,
            self.output_tokens,
            array(self.seq_attr),
            None if self.token_attr is None else array(self.token_attr),
            {name: array(values) for name, values in footers.items() if values is not None},
        )

    def _footer_delta(self) -> Tensor | None:
        return self.convergence_delta

    def _title(self) -> str:
        n_input, n_output = len(self.input_tokens), len(self.output_tokens)
        return f"{count(n_input, 'input token')} -> {count(n_output, 'output token')}"

    def _top(self, number: int = 3) -> str:
        values = array(self.seq_attr)
        largest = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:number]
        tokens = readable_tokens(self.input_tokens, 20)
        return ", ".join(f"'{tokens[place]}' {values[place]:.3g}" for place in largest)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._title()}, top: {self._top()})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = vars(self), vars(other)
        return all(equal(mine[name], theirs.get(name)) for name in mine if name != "inp")

    def _checked_hidden(self, name: str, hidden_attr: Tensor | None) -> Tensor | None:
        inputs = {"n_input": len(self.input_tokens), "hidden": None}
        outputs = {"n_output": len(self.output_tokens)}
        return optional_tensor(name, hidden_attr, outputs | inputs, {"sequence": 1} | inputs)


def shown(drawn: tuple[Figure, Axes], show: bool) -> tuple[Figure, Axes] | None:
    if not show:
        return drawn
    import matplotlib.pyplot as plt

    plt.show()
    return None
