"""`LLMAttentionAttribution`: reads the attention of target tokens to the prompt, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from captum_llm_ext.attention.cross_attention import read_cross_attention
from captum_llm_ext.attention.hooks import configs
from captum_llm_ext.attention.maps import LAYER_MAPS, LayerAttention
from captum_llm_ext.attention.reading import Wanted, read_attention
from captum_llm_ext.compat import (
    Attribution,
    BaseLLMAttribution,
    CaptumTextTemplateInput,
    CaptumTextTokenInput,
    InterpretableInput,
)
from captum_llm_ext.inputs.features import Features, read_features
from captum_llm_ext.model.adapter import QA, SEQ2SEQ
from captum_llm_ext.model.encoder_decoder import EncoderDecoder
from captum_llm_ext.model.layers import LayerSpec, Site, decoder_blocks, input_device, resolve_sites
from captum_llm_ext.results.attention import LLMAttentionAttributionResult
from captum_llm_ext.scoring.checks import warn_of_dropout
from captum_llm_ext.scoring.positions import Positions
from captum_llm_ext.scoring.preparation import prepare
from captum_llm_ext.scoring.tasks import Request, task_of

AttentionLayers: TypeAlias = int | LayerSpec | Iterable[int | LayerSpec]
CROSSING = ("mean", "max")  # reductions of the attention of a decoder to an encoder


class LLMAttentionAttribution(BaseLLMAttribution):
    """The attention that each target token's prediction pays to the input, of any layers and heads.

    The weights are the softmaxed ones that the model itself computes, with its masks, grouped
    heads, soft caps and sinks, in one pass over prompt and target, in float32. For the time of
    that pass the model's attention implementation is "eager", which alone gives them. Attention
    says where a head looks, not what made the model say what it said.

    Args:
        model: a causal language model of transformers, or an encoder-decoder model, of which the
            cross-attention is read: that of the decoder to the encoder's tokens.
        tokenizer: the model's tokenizer.
        layers: decoder blocks or their attention modules: names, patterns (see `find_layers`),
            modules, indices of blocks, or a list of these; a module chooses all attention that is
            in it. Default: every layer that has attention.
        heads: indices of heads, the same in every layer. Default: all.
        reduction: how heads and layers become one map of target tokens by features: "mean" or
            "max" over heads and layers; "rollout", the mean over heads multiplied through the
            chosen layers with the residual connection as attention to oneself (Abnar & Zuidema
            2020, https://arxiv.org/abs/2005.00928); "value_norm", the mean of α ‖f(x)‖: attention
            times the norm of the vector it carries, the head's value after its part of the
            output projection (Kobayashi et al. 2020, https://arxiv.org/abs/2004.10102), in units
            of the hidden state. The full tensor on the result is of plain weights always.

    Raises:
        ValueError: an unknown reduction, a layer that is not in the model, heads that are not
            distinct indices, a model that is not one of transformers, or is not causal.

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
        if reduction not in LAYER_MAPS:
            known = ", ".join(LAYER_MAPS)
            raise ValueError(f"reduction must be one of {known}; got {reduction!r}")
        _check_model(model)
        super().__init__(Attribution(model), tokenizer)
        self.reduction = reduction
        # Found now, so that a layer that is not in the model is an error where it was written.
        self._chosen = _chosen_layers(model, layers)
        self._heads = _checked_heads(heads)

    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        include_generated: bool = False,
        include_prompt_attention: bool = False,
        show_progress: bool = False,
    ) -> LLMAttentionAttributionResult:
        """Read the attention of every target token to every feature of the input.

        Args:
            inp: the prompt, a `TextTokenInput` or a `TextTemplateInput`, also of `chat_input` and
                `segment_input`. Attention to a span of several tokens is the sum over them.
            target: a string (encoded without special tokens), a 1-D tensor of token ids, or None
                to let the model generate it.
            gen_args: arguments of ``model.generate`` when `target` is None. Default: greedy, 25
                new tokens.
            include_generated: earlier target tokens are features too: n_input + n_output columns,
                zero from the target token itself on. Where every token of the prompt is a feature,
                each row of `attention` and its `sink_attention` then sum to 1.
            include_prompt_attention: keep the attention among the tokens of the prompt too.
                Neither is had of an encoder-decoder model.
            show_progress: accepted for the sake of one signature; there is but one pass.

        Returns:
            An `LLMAttentionAttributionResult`: `token_attr` (n_output, n_input), row t the
            attention of the position that predicts target token t; `seq_attr` (n_input,), the mean
            over target tokens; the same of each layer; and `attention` (n_layers, n_heads,
            n_output, n_input), the weights of each head. What a row lacks of 1 went to tokens that
            are no feature, to earlier target tokens, and to sinks (`sink_attention`).

        Raises:
            ValueError: the model gives no attention weights, or is not causal; a head is out of
                range, or a layer has no attention; or the input or target has no meaning.

        Warns:
            when dropout is active.
        """
        features = read_features(inp, self.tokenizer, input_device(self.model))
        prompt = features.prompt_ids
        prepared = prepare(self.model, self.tokenizer, prompt, Request(target, gen_args))
        forcing = prepared.forcing
        warn_of_dropout(forcing)
        wanted = Wanted(
            layers=self._chosen,
            heads=self._heads,
            prompt=include_prompt_attention,
            mean=self.reduction == "rollout",
            norms=self.reduction == "value_norm",
        )
        crosses = isinstance(forcing.model, EncoderDecoder)
        if crosses:
            _check_crossing(self.reduction, include_generated, include_prompt_attention)
        read = read_cross_attention if crosses else read_attention
        layers, log_probs = read(forcing, wanted)
        if include_generated:
            features = features.with_generated(forcing.target.ids, self.tokenizer)
        return self._result(layers, log_probs, features, prepared.output_tokens, inp, prompt)

    @classmethod
    def of_method(
        cls, name: str, model: nn.Module, tokenizer: Any, layers: Any, settings: Mapping[str, Any]
    ) -> LLMAttentionAttribution:
        """The wrapper of a method of the registry, which needs no method of Captum's."""
        del name
        return cls(model, tokenizer, layers, **settings)

    def method_options(self) -> set[str]:
        """The keywords of `attribute` that belong to the method: none beside the wrapper's."""
        return set()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Nothing to refuse: every option of `attribute` has a meaning for every reduction."""

    def _result(
        self,
        layers: Sequence[LayerAttention],
        log_probs: Tensor,
        features: Features,
        tokens: list[str],
        inp: InterpretableInput,
        prompt: Tensor,
    ) -> LLMAttentionAttributionResult:
        targets = torch.stack([layer.targets for layer in layers])
        prompts = [layer.prompt for layer in layers if layer.prompt is not None]
        positions = Positions(0, targets.size(-1), features)
        maps = LAYER_MAPS[self.reduction](layers, positions.by_feature)
        names = self.tokenizer.convert_ids_to_tokens(prompt[0].tolist())
        return LLMAttentionAttributionResult(
            input_tokens=features.names,
            output_tokens=tokens,
            layer_names=[layer.name for layer in layers],
            layer_token_attr=torch.stack(maps),
            attention=positions.by_feature(targets),
            sink_attention=(1 - targets.sum(-1)).clamp(min=0),
            reduction=self.reduction,
            heads=self._heads,
            prompt_attention=torch.stack(prompts) if prompts else None,
            prompt_tokens=list(names) if prompts else None,
            output_probs=log_probs,
            inp=inp,
        )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model first, got {type(model).__name__}")
    found = configs(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} gives no attention weights: expected a causal language model "
            "of transformers, whose attention can be computed with the implementation 'eager'"
        )
    if task_of(model).name == QA:
        raise ValueError(
            f"{type(model).__name__} is not causal: expected a causal language model or an "
            "encoder-decoder model"
        )


def _check_crossing(reduction: str, include_generated: bool, include_prompt: bool) -> None:
    """Refuse what the attention of a decoder to an encoder does not have."""
    if reduction not in CROSSING:
        raise ValueError(
            f"reduction={reduction!r} is not defined for the attention of a decoder to an "
            f"encoder: use one of {', '.join(CROSSING)}"
        )
    if include_generated or include_prompt:
        raise ValueError(
            "of an encoder-decoder model the decoder's attention to the encoder's tokens is read: "
            "leave out include_generated and include_prompt_attention"
        )


def _chosen_layers(
    model: nn.Module, layers: AttentionLayers | None
) -> dict[str, set[nn.Module]] | None:
    """Each layer as it was asked for, and all modules in it; None for every layer."""
    if layers is None:
        return None
    one = isinstance(layers, int | str) or (
        isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList)
    )
    specs: list[Any] = [layers] if one else list(layers)  # type: ignore[arg-type]
    if not specs:
        raise ValueError("layers must hold at least one layer, got an empty list")
    chosen: dict[str, set[nn.Module]] = {}
    for spec in specs:
        sites = _block(model, spec) if isinstance(spec, int) else resolve_sites(model, spec)[0]
        name = sites[0].name if isinstance(spec, nn.Module) else repr(spec)
        chosen[name] = {part for site in sites for part in site.module.modules()}
    return chosen


def _block(model: nn.Module, index: int) -> list[Site]:
    found: Any = model
    blocks = decoder_blocks(found.get_decoder() if task_of(model).name == SEQ2SEQ else model)
    if isinstance(index, bool) or not -len(blocks) <= index < len(blocks):
        raise ValueError(
            f"expected the index of a decoder block in 0…{len(blocks) - 1}, got layer {index!r}"
        )
    return resolve_sites(model, blocks[index])[0]


def _checked_heads(heads: int | Sequence[int] | None) -> list[int] | None:
    if heads is None:
        return None
    listed = [heads] if isinstance(heads, int) else list(heads)
    counts = all(isinstance(h, int) and not isinstance(h, bool) and h >= 0 for h in listed)
    if not listed or not counts or len(set(listed)) < len(listed):
        raise ValueError(f"heads must be distinct indices of heads, from 0; got {heads!r}")
    return listed
