"""The result of an attribution at several layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy.typing as npt
from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext.display import (
    ColorScale,
    View,
    draw_heat_map,
    relative_to_rows,
    short_layer_names,
    sized_axes,
)
from captum_llm_ext.results.frames import layered_frame
from captum_llm_ext.results.merge import Spans
from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.single import LLMAttributionResult
from captum_llm_ext.results.values import (
    array,
    checked_tensor,
    count,
    equal,
    optional_tensor,
    token_list,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


_T = TypeVar("_T")


class LLMLayerAttributionResult(LLMAttributionResult, Mapping[str, LLMAttributionResult]):
    """Attribution at several layers: one result for all, and a mapping from layer name to result.

    `seq_attr` and `token_attr` are the mean over layers attributed independently, or the sum over
    layers moved jointly along the path.

    Args:
        input_tokens: n_input tokens or features.
        output_tokens: n_output target tokens.
        layer_names: n_layers distinct names, in the order of the rows below.
        layer_seq_attr: shape (n_layers, n_input).
        layer_token_attr: shape (n_layers, n_output, n_input), or None (default).
        layer_mode: "independent" (default) or "joint".
        convergence_delta: for independent layers shape (n_layers, n_output), or (n_layers, 1) for
            the sequence alone; for joint layers (n_output,) or (1,); None (default) without a path.
        hidden_attr: layer name → shape (n_output, n_input, hidden); None (default) if not kept.
        output_probs: log probability of each output token, shape (n_output,), or None (default).
        inp: the attributed interpretable input, or None (default).
        layer_n_evaluations: for each layer the number of path points whose gradient was taken, or
            None (default).
        layer_converged: for each layer whether adaptive quadrature met its tolerance, or None
            (default).
        layer_score_paths: for each layer the points of its path and the sequence scores there,
            shape (2, n_points), or None (default).
        norm: "l1", "l2" or "linf" where values are norms of gradients; None (default) where values
            are attributions that add up.
        output_labels: names of the output tokens in tables and plots, which keep leading spaces;
            None (default) for `output_tokens`.
        starts_prompt: whether the first input token is the first token of the prompt, where
            attention sinks are; None (default) for what `inp` says, False without it.
        provenance: what made the result, see `Provenance`; None (default) where it is not known. It
            does not count when results are compared.
        spread: standard deviation of `seq_attr` over the results of which this is the mean, shape
            (n_input,), or None (default).

    Raises:
        ValueError: a shape does not fit the tokens and layers, or a name comes twice.

    Example:
        >>> result = LLMLayerAttributionResult(
        ...     input_tokens=["ĠFrance", "Ġis"],
        ...     output_tokens=["ĠParis"],
        ...     layer_names=["model.layers.0.mlp", "model.layers.1.mlp"],
        ...     layer_seq_attr=[[1.0, 2.0], [3.0, -1.0]],
        ... )
        >>> result["model.layers.1.mlp"].seq_attr
        tensor([ 3., -1.])
        >>> result.seq_attr
        tensor([2.0000, 0.5000])
    """

    _computed: ClassVar[tuple[str, ...]] = ("seq_attr", "token_attr")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        *,
        input_tokens: list[str],
        output_tokens: list[str],
        layer_names: Sequence[str],
        layer_seq_attr: npt.ArrayLike,
        layer_token_attr: npt.ArrayLike | None = None,
        layer_mode: str = "independent",
        convergence_delta: Tensor | None = None,
        hidden_attr: Mapping[str, Tensor] | None = None,
        output_probs: npt.ArrayLike | None = None,
        inp: InterpretableInput | None = None,
        layer_n_evaluations: Sequence[int | None] | None = None,
        layer_converged: Sequence[bool | None] | None = None,
        norm: str | None = None,
        layer_score_paths: Sequence[Tensor | None] | None = None,
        output_labels: list[str] | None = None,
        starts_prompt: bool | None = None,
        provenance: Provenance | None = None,
        spread: Tensor | None = None,
    ) -> None:
        self.layer_names = _distinct_layer_names(layer_names)
        n_layers = len(self.layer_names)
        self.layer_n_evaluations = _per_layer("layer_n_evaluations", layer_n_evaluations, n_layers)
        self.layer_converged = _per_layer("layer_converged", layer_converged, n_layers)
        self.layer_score_paths = _per_layer("layer_score_paths", layer_score_paths, n_layers)
        if layer_mode not in ("independent", "joint"):
            raise ValueError(f'layer_mode: expected "independent" or "joint", got {layer_mode!r}')
        self.layer_mode = layer_mode
        layers, inputs = {"n_layers": n_layers}, {"n_input": len(input_tokens)}
        outputs = {"n_output": len(output_tokens)}
        self.layer_seq_attr = checked_tensor("layer_seq_attr", layer_seq_attr, layers | inputs)
        self.layer_token_attr = optional_tensor(
            "layer_token_attr", layer_token_attr, layers | outputs | inputs
        )
        token_attr = self.layer_token_attr
        evaluations = _without_none(self.layer_n_evaluations)
        converged = _without_none(self.layer_converged)
        super().__init__(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            seq_attr=self._over_layers(self.layer_seq_attr),
            token_attr=None if token_attr is None else self._over_layers(token_attr),
            output_probs=output_probs,
            inp=inp,
            n_evaluations=sum(evaluations) if evaluations else None,
            converged=all(converged) if converged else None,
            norm=norm,
            score_path=_common_path(self.layer_score_paths),
            output_labels=output_labels,
            starts_prompt=starts_prompt,
            provenance=provenance,
            spread=spread,
        )
        rows = layers if layer_mode == "independent" else {}
        self.convergence_delta = optional_tensor(
            "convergence_delta", convergence_delta, rows | outputs, rows | {"sequence": 1}
        )
        self._hidden_attr = self._checked_hidden_of_layers(hidden_attr)

    def __getitem__(self, layer: str | int) -> LLMAttributionResult:
        """The result of one layer, by its name or index.

        Raises:
            KeyError: no layer has this name; the message lists similar names.
            IndexError: there are fewer layers.
        """
        name = layer if isinstance(layer, str) else self.layer_names[layer]
        if name not in self.layer_names:
            close = difflib.get_close_matches(name, self.layer_names, n=3, cutoff=0.3)
            raise KeyError(
                f"no layer named {name!r} among the {count(len(self), 'layer')} of this result"
                + (f"; close ones: {', '.join(close)}" if close else "")
            )
        index, delta = self.layer_names.index(name), self.convergence_delta
        return LLMAttributionResult(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            seq_attr=self.layer_seq_attr[index],
            token_attr=None if self.layer_token_attr is None else self.layer_token_attr[index],
            output_probs=self.output_probs,
            inp=self.inp,
            # joint layers share one delta
            convergence_delta=None if delta is None or delta.dim() == 1 else delta[index],
            hidden_attr=None if self.hidden_attr is None else self.hidden_attr.get(name),
            n_evaluations=self.layer_n_evaluations[index],
            converged=self.layer_converged[index],
            norm=self.norm,
            score_path=self.layer_score_paths[index],
            output_labels=self.output_labels,
            provenance=self.provenance,
            starts_prompt=self.starts_prompt,
        )

    def without_layers(self) -> LLMAttributionResult:
        """The attribution over all layers alone, which is small to store.

        Example:
            >>> result = LLMLayerAttributionResult(
            ...     input_tokens=["ĠFrance", "Ġis"],
            ...     output_tokens=["ĠParis"],
            ...     layer_names=["model.layers.0.mlp", "model.layers.1.mlp"],
            ...     layer_seq_attr=[[1.0, 2.0], [3.0, -1.0]],
            ... )
            >>> result.without_layers().seq_attr
            tensor([2.0000, 0.5000])
        """
        return LLMAttributionResult(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            seq_attr=self.seq_attr,
            token_attr=self.token_attr,
            output_probs=self.output_probs,
            inp=self.inp,
            convergence_delta=self._footer_delta(),
            n_evaluations=self.n_evaluations,
            converged=self.converged,
            norm=self.norm,
            score_path=self.score_path,
            output_labels=self.output_labels,
            starts_prompt=self.starts_prompt,
            provenance=self.provenance,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer_names)

    def __len__(self) -> int:
        return len(self.layer_names)

    def __contains__(self, name: object) -> bool:
        return name in self.layer_names

    def plot_layer_attr(
        self,
        show: bool = False,
        ax: Axes | None = None,
        normalize: bool = True,
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
            normalize: divide each layer by its largest absolute value, but for an attention sink
                at the first token (default True, since layers differ by orders of magnitude).
            merge: "word" or spans to `merge` first; None (default) for tokens.
            figsize: width and height of a new figure in inches; None (default) for what fits.
            title: a line above the plot; None (default) for none.
            top: only the features of largest sequence attribution; None (default) for all.
            provenance: write where the result comes from below the plot (default False).
        """
        result = self._merged(merge)._kept(top)
        values, label = array(result.layer_seq_attr), "Sequence Attribution"
        scale, ax = ColorScale.of(values, result.starts_prompt), sized_axes(ax, figsize)
        if normalize:
            values, scale = relative_to_rows(values, result.starts_prompt)
            label += " / largest of the layer"
        names = short_layer_names(self.layer_names)
        drawn = draw_heat_map(values[::-1], names[::-1], result.input_tokens, label, ax, scale)
        return self._finished(drawn, show, title, provenance)

    def to_dataframe(self, long: bool = False) -> DataFrame:
        frames = {name: layer.to_dataframe(long) for name, layer in self.items()}
        return layered_frame(frames, long)

    def _over_layers(self, values: Tensor) -> Tensor:
        return values.mean(dim=0) if self.layer_mode == "independent" else values.sum(dim=0)

    def _checked_hidden_of_layers(
        self, hidden_attr: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor | None] | None:
        if hidden_attr is None:
            return None
        unknown = [name for name in hidden_attr if name not in self.layer_names]
        if unknown:
            raise ValueError(
                f"hidden_attr: expected names of the layers, got {unknown[0]!r}; use layer_names"
            )
        return {
            name: self._checked_hidden(f"hidden_attr[{name!r}]", values)
            for name, values in hidden_attr.items()
        }

    def _footer_delta(self) -> Tensor | None:
        """The delta that all layers share: independent layers have one each."""
        return self.convergence_delta if self.layer_mode == "joint" else None

    def _views(self) -> list[View]:
        whole = [replace(view, name=self._reduction_name()) for view in super()._views()]
        return whole + [replace(layer._views()[0], name=name) for name, layer in self.items()]

    def _title(self) -> str:
        return f"{super()._title()}, {self._reduction_name()}"

    def _reduction_name(self) -> str:
        reduction = "mean over" if self.layer_mode == "independent" else "sum of"
        return f"{reduction} {count(len(self), 'layer')}"


def _distinct_layer_names(names: Sequence[str]) -> list[str]:
    listed = token_list("layer_names", names)
    repeated = [name for name in listed if listed.count(name) > 1]
    if repeated or not listed:
        problem = f"{repeated[0]!r} more than once" if repeated else "none"
        raise ValueError(
            f"layer_names: expected distinct names, got {problem}; name each layer once"
        )
    return listed


def _per_layer(name: str, values: Sequence[_T | None] | None, n_layers: int) -> list[_T | None]:
    listed: list[_T | None] = [None] * n_layers if values is None else list(values)
    if len(listed) != n_layers:
        raise ValueError(
            f"{name}: expected one value for each of {count(n_layers, 'layer')}, got {len(listed)}"
        )
    return listed


def _common_path(paths: Sequence[Tensor | None]) -> Tensor | None:
    """The path that all layers share, as layers of conductance and joint layers do."""
    return paths[0] if all(equal(path, paths[0]) for path in paths) else None


def _without_none(values: Sequence[_T | None]) -> list[_T]:
    return [value for value in values if value is not None]
