"""The result of reading attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy.typing as npt
from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext.results.json_format import fields_of
from captum_llm_ext.results.layered import LLMLayerAttributionResult
from captum_llm_ext.results.merge import Spans
from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.single import LLMAttributionResult
from captum_llm_ext.results.values import checked_tensor, count, optional_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from typing_extensions import Self

OVER_LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda values: values.mean(0),
    "max": lambda values: values.amax(0),
    "rollout": lambda values: values[-1],  # a layer's rollout includes the layers below it
    "value_norm": lambda values: values.mean(0),
    "flow": lambda values: values.sum(0),
    "flow_rollout": lambda values: values[-1],
}


class LLMAttentionAttributionResult(LLMLayerAttributionResult):
    """Attention of target tokens to the input: a result of several layers, and all weights.

    `token_attr` reduces `layer_token_attr` over the layers: their mean ("mean", "value_norm"),
    their maximum ("max"), the last layer ("rollout", "flow_rollout") or their sum ("flow").
    `seq_attr` and `layer_seq_attr` are the means of `token_attr` and `layer_token_attr` over the
    target tokens; for "flow" and "flow_rollout" they are those of the whole target.

    Args:
        input_tokens: n_input tokens or features.
        output_tokens: n_output target tokens.
        layer_names: n_layers distinct names of attention modules.
        layer_token_attr: shape (n_layers, n_output, n_input), reduced over the heads; None where
            the target's tokens have no rows.
        attention: softmaxed weights, shape (n_layers, n_heads, n_output, n_input).
        sink_attention: weight of attention sinks that are not tokens, shape (n_layers, n_heads,
            n_output): 1 minus the sum of the weights over all keys. Without such sinks it is 0 up
            to rounding.
        reduction: "mean" (default), "max", "rollout", "value_norm", "flow" or "flow_rollout".
        heads: n_heads indices of heads of the model; None (default) for all heads.
        prompt_attention: weights among the tokens of the prompt, query by key, shape (n_layers,
            n_heads, n_prompt, n_prompt), or None (default).
        prompt_tokens: n_prompt tokens, template and skipped ones too, or None (default).
        output_probs: log probability of each output token, shape (n_output,), or None (default).
        layer_seq_attr: shape (n_layers, n_input), of the whole target; None (default) for the mean
            over its tokens.
        inp: the attributed interpretable input, or None (default).
        output_labels: names of the output tokens in tables and plots, which keep leading spaces;
            None (default) for `output_tokens`.
        starts_prompt: whether the first input token is the first token of the prompt, where
            attention sinks are; None (default) for what `inp` says, False without it.
        provenance: what made the result, see `Provenance`; None (default) where it is not known. It
            does not count when results are compared.

    Raises:
        ValueError: a shape does not fit, or the reduction is unknown.

    Example:
        >>> result = LLMAttentionAttributionResult(
        ...     input_tokens=["ĠFrance", "Ġis"],
        ...     output_tokens=["ĠParis"],
        ...     layer_names=["model.layers.0.self_attn"],
        ...     layer_token_attr=[[[0.25, 0.75]]],
        ...     attention=[[[[0.0, 1.0]], [[0.5, 0.5]]]],
        ...     sink_attention=[[[0.0], [0.0]]],
        ... )
        >>> result.attention.shape, result.seq_attr
        (torch.Size([1, 2, 1, 2]), tensor([0.2500, 0.7500]))
    """

    _computed = ()
    _of_sums = LLMAttributionResult  # its maps are not all sums over its layers
    __hash__ = None

    def __init__(
        self,
        *,
        input_tokens: list[str],
        output_tokens: list[str],
        layer_names: Sequence[str],
        layer_token_attr: npt.ArrayLike | None,
        attention: npt.ArrayLike,
        sink_attention: npt.ArrayLike,
        reduction: str = "mean",
        heads: Sequence[int] | None = None,
        prompt_attention: npt.ArrayLike | None = None,
        prompt_tokens: list[str] | None = None,
        output_probs: npt.ArrayLike | None = None,
        layer_seq_attr: npt.ArrayLike | None = None,
        inp: InterpretableInput | None = None,
        output_labels: list[str] | None = None,
        starts_prompt: bool | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        if reduction not in OVER_LAYERS:
            raise ValueError(
                f"reduction must be one of {', '.join(OVER_LAYERS)}; got {reduction!r}"
            )
        self.reduction = reduction
        layers, outputs = {"n_layers": len(layer_names)}, {"n_output": len(output_tokens)}
        inputs = {"n_input": len(input_tokens)}
        layer_token_attr = optional_tensor(
            "layer_token_attr", layer_token_attr, layers | outputs | inputs
        )
        if layer_seq_attr is None:
            if layer_token_attr is None:
                raise ValueError("expected layer_token_attr, layer_seq_attr or both; got neither")
            layer_seq_attr = layer_token_attr.mean(1)
        super().__init__(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            layer_names=layer_names,
            layer_seq_attr=layer_seq_attr,
            layer_token_attr=layer_token_attr,
            output_probs=output_probs,
            inp=inp,
            output_labels=output_labels,
            starts_prompt=starts_prompt,
            provenance=provenance,
        )
        n_heads = {"n_heads": None if heads is None else len(heads)}
        self.attention = checked_tensor("attention", attention, layers | n_heads | outputs | inputs)
        if reduction == "max":  # the maximum of means over tokens is not the mean of the maxima
            rows = self.attention.amax((0, 1)) if self.token_attr is None else self.token_attr
            self.seq_attr = rows.mean(0)
        self.heads = list(range(self.attention.size(1)) if heads is None else heads)
        per_head = layers | {"n_heads": len(self.heads)}
        self.sink_attention = checked_tensor("sink_attention", sink_attention, per_head | outputs)
        self.prompt_tokens = prompt_tokens
        n_prompt = None if prompt_tokens is None else len(prompt_tokens)
        self.prompt_attention = optional_tensor(
            "prompt_attention", prompt_attention, per_head | {"queries": n_prompt, "keys": n_prompt}
        )

    def merge(self, spans: str | Spans = "word") -> Self:
        """The result with several input tokens as one, which has the sum of their attention."""
        merged = super().merge(spans)
        if self.reduction != "max":
            return merged
        fields = {name: getattr(merged, name) for name in fields_of(merged)}
        # the maximum over heads of the sums is not the sum of the maxima
        maxima = merged.attention.amax(1)
        fields["layer_seq_attr"] = maxima.mean(1)
        if self.layer_token_attr is not None:
            fields["layer_token_attr"] = maxima
        return type(self)(**fields)

    def plot_layer_attr(
        self,
        show: bool = False,
        ax: Axes | None = None,
        normalize: bool = False,
        merge: str | Spans | None = None,
        figsize: tuple[float, float] | None = None,
        title: str | None = None,
        top: int | None = None,
        provenance: bool = False,
    ) -> tuple[Figure, Axes] | None:
        """Plot layers by input tokens, the first layer at the bottom.

        Args:
            show: True shows the plot and returns None; False (default) returns (figure, axes).
            ax: axes to draw into; None (default) for a new figure.
            normalize: divide each layer by its largest value, but for an attention sink at the
                first token (default False, since the attention of different layers can be
                compared).
            merge: "word" or spans to `merge` first; None (default) for tokens.
            figsize: width and height of a new figure in inches; None (default) for what fits.
            title: a line above the plot; None (default) for none.
            top: only the features of largest sequence attribution; None (default) for all.
            provenance: write where the result comes from below the plot (default False).
        """
        return super().plot_layer_attr(show, ax, normalize, merge, figsize, title, top, provenance)

    def _over_layers(self, values: Tensor) -> Tensor:
        return OVER_LAYERS[self.reduction](values)

    def _title(self) -> str:
        layers, heads = count(len(self), "layer"), count(len(self.heads), "head")
        return f"{self._counts()}, attention, {self.reduction} over {heads} of {layers}"
