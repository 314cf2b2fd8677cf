"""`LLMAttentionAttribution`: the attention of target tokens to the prompt, read in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from captum_llm_ext.attention.cross_attention import CROSS_REDUCTIONS, read_cross_attention
from captum_llm_ext.attention.hooks import configs
from captum_llm_ext.attention.maps import REDUCTIONS, LayerAttention
from captum_llm_ext.attention.reading import Selection, read_attention
from captum_llm_ext.compat import (
    Attribution,
    BaseLLMAttribution,
    CaptumTextTemplateInput,
    CaptumTextTokenInput,
    InterpretableInput,
)
from captum_llm_ext.inputs.features import Features, read_features
from captum_llm_ext.inputs.statements import Statements, check_by_output, statements_of
from captum_llm_ext.model.adapter import QA, SEQ2SEQ
from captum_llm_ext.model.check_cache import forget
from captum_llm_ext.model.encoder_decoder import EncoderDecoder
from captum_llm_ext.model.layers import (
    LayerSpec,
    Site,
    decoder_blocks,
    input_device,
    owner_of,
    resolve_sites,
)
from captum_llm_ext.model.lock import one_call_at_a_time
from captum_llm_ext.model.suitability import UnreadableAttentionError, check_pair
from captum_llm_ext.registry import did_you_mean
from captum_llm_ext.results.attention import LLMAttentionAttributionResult
from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.recording import recorded
from captum_llm_ext.scoring.checks import warn_of_dropout
from captum_llm_ext.scoring.positions import Positions
from captum_llm_ext.scoring.preparation import Prepared, prepare
from captum_llm_ext.scoring.tasks import Request, task_of

AttentionLayers: TypeAlias = int | LayerSpec | Iterable[int | LayerSpec]


class LLMAttentionAttribution(BaseLLMAttribution):
    """The attention that the prediction of each target token pays to the input.

    One pass over prompt and target reads the softmaxed weights that the model itself computes, with
    its masks, grouped heads, soft caps and sinks, and returns them in float32. "rollout",
    `include_prompt_attention` and models that call no attention kernel of transformers need the
    attention implementation "eager" for that pass, and a second pass shows that the scores are
    those of the model as it is. Attention shows where a head looks. It does not show what made the
    model say what it said.

    Args:
        model: a causal language model of transformers; or an encoder-decoder model, whose
            cross-attention is read: the attention of the decoder to the encoder's tokens.
        tokenizer: the model's tokenizer.
        layers: decoder blocks or their attention modules: names, patterns (see `find_layers`),
            modules, indices of blocks, or a list of these. A module selects all attention modules
            in it. Default: every layer that has attention.
        heads: indices of heads, the same in every layer. Default: all.
        reduction: how heads and layers become one map of target tokens by features. "mean" or
            "max": over heads and layers. "rollout": the mean over heads, multiplied through the
            selected layers, where the residual connection counts as attention of a token to itself
            (Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928). "value_norm": the mean of
            α ‖f(x)‖, the attention times the norm of the vector that it carries, in units of the
            hidden state; f(x) is the head's value after its part of the output projection
            (Kobayashi et al. 2020, https://arxiv.org/abs/2004.10102). "flow": the share of each
            position in the state after the attention of each layer, summed over the layers.
            "flow_rollout": these shares multiplied through the layers (Ferrando & Voita 2024,
            https://arxiv.org/abs/2403.00824). The result's `attention` always holds the plain
            weights.

    Raises:
        ValueError: the reduction is unknown, a layer is not in the model, the heads are not
            distinct indices, or the model is not one of transformers, not causal, or has no
            language-model head.
        TypeError: no model, or no tokenizer.

    Example:
        >>> inp = TextTokenInput("The capital of France is", tokenizer)
        >>> result = LLMAttentionAttribution(model, tokenizer).attribute(inp, target=" Paris")
        >>> result.token_attr.shape, result.attention.shape
        (torch.Size([1, 5]), torch.Size([30, 9, 1, 5]))
    """

    SUPPORTED_METHODS = (Attribution,)
    SUPPORTED_INPUTS = (CaptumTextTokenInput, CaptumTextTemplateInput)

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        layers: AttentionLayers | None = None,
        heads: int | Sequence[int] | None = None,
        reduction: str = "mean",
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}"
                + did_you_mean(reduction, REDUCTIONS)
            )
        check_pair(model, tokenizer)
        _check_attention(model)
        super().__init__(Attribution(model), tokenizer)
        self.reduction = reduction
        # Resolved now, so that a layer that is not in the model fails where the caller wrote it.
        self._layers = _modules_in(model, layers)
        self._heads = _checked_heads(heads)

    def record_settings(self) -> dict[str, Any]:
        """The layers, heads and reduction, for the provenance of results."""
        layers = None if self._layers is None else [name.strip("'") for name in self._layers]
        settings = {"layers": layers, "heads": self._heads, "reduction": self.reduction}
        return {name: value for name, value in settings.items() if value is not None}

    @one_call_at_a_time
    @recorded
    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        include_per_token_attr: bool = True,
        include_generated: bool = False,
        include_prompt_attention: bool = False,
        show_progress: bool = False,
        check: bool = False,
        by_output: str = "token",
    ) -> LLMAttentionAttributionResult:
        """Read the attention of every target token to every feature of the input.

        Args:
            inp: the prompt: a `TextTokenInput` or a `TextTemplateInput`, also from `chat_input` or
                `segment_input`. The attention to a span of several tokens is the sum over them.
            target: a string (encoded without special tokens), a 1-D tensor of token ids, or None
                to let the model generate it.
            gen_args: arguments of ``model.generate`` when `target` is None. Default: greedy, 25
                new tokens. An encoder-decoder model takes some of them with a `target` too:
                `forced_bos_token_id` (such as the target's language), `decoder_start_token_id` and
                `decoder_input_ids`, the ids after which the target is scored. These are never part
                of the target. Default: as ``generate`` has them, of `model.generation_config`.
            include_per_token_attr: False leaves out the rows per target token, `token_attr` and
                `layer_token_attr` are None; "flow" is then faster, and `seq_attr` the same.
            include_generated: earlier target tokens are features too. The result then has n_input
                + n_output columns, zero from the target token itself on. Where every token of the
                prompt is a feature, each row of `attention` and its `sink_attention` sum to 1. An
                encoder-decoder model does not have this.
            include_prompt_attention: also keep the attention among the tokens of the prompt. An
                encoder-decoder model does not have this.
            show_progress: has no effect, since there is one pass; other wrappers take it too.
            check: ask the model again what earlier calls measured, such as whether it is causal. It
                is remembered for each model, until its modules, flags, hooks, configuration or
                weights change.
            by_output: "token" (default), or "sentence": rows, `attention` and sinks are then of the
                sentences of the target: the means over their tokens, and for "flow" the shares in
                the state of a sentence's tokens together. `output_tokens` are their texts.

        Returns:
            An `LLMAttentionAttributionResult`: `token_attr` (n_output, n_input), whose row t is the
            attention of the position that predicts target token t; `seq_attr` (n_input,), the mean
            over target tokens; both for each layer too; and `attention` (n_layers, n_heads,
            n_output, n_input), the weights of each head. A row that sums to less than 1 paid the
            remainder to tokens that are no features, to earlier target tokens, or to sinks
            (`sink_attention`).

        Raises:
            ValueError: the model gives no attention weights, or other scores with eager attention;
                an attention that runs cannot be read, or the model is not causal; a head is out of
                range, or a layer has no attention; or the input or target has no meaning.

        Warns:
            when dropout is active.
        """
        if check:
            forget(self.model)
        check_by_output(by_output, include_per_token_attr)
        if by_output != "token" and include_generated:
            raise ValueError("by_output='sentence' has no columns of generated tokens: choose one")
        features = read_features(inp, self.tokenizer, input_device(self.model))
        prompt = features.prompt_ids
        prepared = prepare(self.model, self.tokenizer, inp, prompt, Request(target, gen_args))
        forcing = prepared.forcing
        warn_of_dropout(forcing)
        statements = None
        if by_output != "token":
            statements = statements_of(forcing.target.ids, self.tokenizer)
        selection = Selection(
            layers=self._layers,
            heads=self._heads,
            prompt=include_prompt_attention,
            needs=REDUCTIONS[self.reduction].needs,
            per_token=include_per_token_attr,
            statements=statements,
        )
        read = read_attention
        if isinstance(forcing.model, EncoderDecoder):
            _check_cross(self.reduction, include_generated, include_prompt_attention)
            read = read_cross_attention
        layers, log_probs = read(forcing, selection)
        if include_generated:
            features = features.with_generated(
                forcing.target.ids, self.tokenizer, forcing.row.n_prompt
            )
        return self._result(
            layers, log_probs, features, prepared, inp, prompt, include_per_token_attr, statements
        )

    @classmethod
    def of_method(
        cls, name: str, model: nn.Module, tokenizer: Any, layers: Any, settings: Mapping[str, Any]
    ) -> LLMAttentionAttribution:
        """The wrapper for a row of the registry; it needs no attribution method of Captum.

        Args:
            name: the method's name in `captum_llm_ext.registry.METHODS`.
            model: the model.
            tokenizer: the model's tokenizer.
            layers: as of the class.
            settings: what the method and the wrapper are made with.
        """
        del name
        return cls(model, tokenizer, layers, **settings)

    def method_options(self) -> set[str]:
        """The keywords of `attribute` that belong to the method: none here."""
        return set()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses nothing: every option of `attribute` has a meaning for every reduction."""

    def _result(
        self,
        layers: Sequence[LayerAttention],
        log_probs: Tensor,
        features: Features,
        prepared: Prepared,
        inp: InterpretableInput,
        prompt: Tensor,
        per_token: bool,
        statements: Statements | None,
    ) -> LLMAttentionAttributionResult:
        targets = torch.stack([layer.targets for layer in layers])
        prompts = [layer.prompt for layer in layers if layer.prompt is not None]
        by_feature = Positions(0, targets.size(-1), features).by_feature
        reduction = REDUCTIONS[self.reduction]
        maps = reduction.layer_maps(layers, by_feature)
        spans = reduction.span_maps
        of_span = [m.mean(0) for m in maps] if spans is None else spans(layers, by_feature)
        outputs, labels = prepared.output_tokens, prepared.output_labels
        if statements is not None:
            # "flow" has rows of statements already.
            maps = [m if len(m) == len(statements) else statements.means(m) for m in maps]
            targets = statements.means(targets, dim=2)
            log_probs, outputs, labels = statements.sums(log_probs), statements.texts, None
        names = self.tokenizer.convert_ids_to_tokens(prompt[0].tolist())
        return LLMAttentionAttributionResult(
            input_tokens=features.names,
            output_tokens=outputs,
            output_labels=labels,
            layer_names=[layer.name for layer in layers],
            layer_token_attr=torch.stack(maps) if per_token else None,
            layer_seq_attr=torch.stack(of_span),
            attention=by_feature(targets),
            sink_attention=(1 - targets.sum(-1)).clamp(min=0),
            reduction=self.reduction,
            heads=self._heads,
            prompt_attention=torch.stack(prompts) if prompts else None,
            prompt_tokens=list(names) if prompts else None,
            output_probs=log_probs,
            inp=inp,
            provenance=Provenance(target_ids=prepared.forcing.target.ids.tolist(), evaluations=1),
        )


def _check_attention(model: nn.Module) -> None:
    if not configs(model):
        raise UnreadableAttentionError(
            f"{type(model).__name__} gives no attention weights: expected a causal language model "
            "of transformers, whose attention can be computed with the implementation 'eager'"
        )
    if task_of(model).name == QA:
        raise UnreadableAttentionError(
            f"{type(model).__name__} is not causal: expected a causal language model or an "
            "encoder-decoder model"
        )


def _check_cross(reduction: str, include_generated: bool, include_prompt: bool) -> None:
    """Refuse what the attention of a decoder to an encoder does not have."""
    if reduction not in CROSS_REDUCTIONS:
        raise UnreadableAttentionError(
            f"reduction={reduction!r} is not defined for the attention of a decoder to an "
            f"encoder: use one of {', '.join(CROSS_REDUCTIONS)}"
        )
    if include_generated or include_prompt:
        raise ValueError(
            "only the decoder's attention to the encoder's tokens is read from an encoder-decoder "
            "model: leave out include_generated and include_prompt_attention"
        )


def _modules_in(
    model: nn.Module, layers: AttentionLayers | None
) -> dict[str, set[nn.Module]] | None:
    """All modules in each layer, by the name that the caller used; None for every layer."""
    if layers is None:
        return None
    one = isinstance(layers, int | str) or (
        isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList)
    )
    specs: list[Any] = [layers] if one else list(layers)  # type: ignore[arg-type]
    if not specs:
        raise ValueError("layers must hold at least one layer, got an empty list")
    modules: dict[str, set[nn.Module]] = {}
    for spec in specs:
        sites = _block(model, spec) if isinstance(spec, int) else resolve_sites(model, spec)[0]
        name = sites[0].name if isinstance(spec, nn.Module) else repr(spec)
        modules[name] = {part for site in sites for part in site.module.modules()}
    return modules


def _block(model: Any, index: int) -> list[Site]:
    owner: Any = owner_of(model, "get_decoder")
    blocks = decoder_blocks(owner.get_decoder() if task_of(model).name == SEQ2SEQ else model)
    if isinstance(index, bool) or not -len(blocks) <= index < len(blocks):
        raise ValueError(
            f"expected the index of a decoder block in 0…{len(blocks) - 1}, got layer {index!r}"
        )
    return resolve_sites(model, blocks[index])[0]


def _checked_heads(heads: int | Sequence[int] | None) -> list[int] | None:
    if heads is None:
        return None
    indices = [heads] if isinstance(heads, int) else list(heads)
    valid = all(isinstance(h, int) and not isinstance(h, bool) and h >= 0 for h in indices)
    if not indices or not valid or len(set(indices)) < len(indices):
        raise ValueError(f"heads must be distinct indices of heads, from 0; got {heads!r}")
    return indices
