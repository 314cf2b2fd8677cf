"""`LLMGradientAttribution`: prepares the request, runs the method, and makes the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import (
    CaptumLLMGradientAttribution,
    CaptumTextTemplateInput,
    CaptumTextTokenInput,
    GradientAttribution,
    InterpretableInput,
)
from captum_llm_ext.gradients.method import (
    GradientMethod,
    SupportedMethods,
    driver_of,
    gradient_method,
)
from captum_llm_ext.gradients.run import mean_over_runs
from captum_llm_ext.gradients.to_result import check_totals, to_result
from captum_llm_ext.gradients.totals import Plan
from captum_llm_ext.inputs.baselines import (
    BaselineSpec,
    PathStart,
    baselines_to_average,
    path_start,
    template_start,
    with_named_baseline,
)
from captum_llm_ext.inputs.features import Features, baseline_tokens, read_features
from captum_llm_ext.inputs.statements import check_by_output, statements_of
from captum_llm_ext.inputs.targets import GRADIENT_TARGETS, check_attr_target
from captum_llm_ext.model.adapter import layout_of
from captum_llm_ext.model.check_cache import forget
from captum_llm_ext.model.hooks import differentiable
from captum_llm_ext.model.layers import input_device, owner_of, resolve_sites
from captum_llm_ext.model.lock import one_call_at_a_time
from captum_llm_ext.model.quantized import dequantized_products, quiet_bitsandbytes
from captum_llm_ext.model.random_state import same_random_state
from captum_llm_ext.model.suitability import check_pair, check_weights
from captum_llm_ext.registry import load, method_named
from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.recording import recorded, settings_of
from captum_llm_ext.results.single import LLMAttributionResult
from captum_llm_ext.scoring.checks import check_counts, check_gradients
from captum_llm_ext.scoring.preparation import prepare
from captum_llm_ext.scoring.tasks import Request, check_has_sentences
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing
from captum_llm_ext.warning import warn

LAYER_MODES = ("independent", "joint")


class LLMGradientAttribution(CaptumLLMGradientAttribution):
    """Gradient attribution of language models, in one pass and over any set of layers.

    A drop-in replacement for ``captum.attr.LLMGradientAttribution``. The model may also be an
    encoder-decoder model, whose encoder reads the prompt, or a question answering model, whose
    output tokens are the start and the end of an answer (see `qa_input`).

    Args:
        attr_method: `LayerIntegratedGradients`, `LayerGradientXActivation`, `LayerGradientShap`,
            `LayerConductance` (Captum's classes), `LayerSaliency` or `LayerRelevance`, made with
            the model and a layer, a list of layers, or names and patterns of layers (see
            `find_layers`).
        tokenizer: the model's tokenizer.
        attr_target: what is attributed of each target token: "log_prob" (natural logarithm, the
            default), "prob" or "logit". The sequence score is the sum over target tokens; for
            "prob" it is the product of the probabilities.

    Raises:
        ValueError: an unsupported method, an unknown `attr_target`, or no such layer; a masked
            language model, a classifier, or a model without a language-model head.
        TypeError: no model, or no tokenizer.

    Integrated gradients: Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365. Captum's
    wrappers: Miglani et al. 2023, https://arxiv.org/abs/2312.05491.

    Example:
        >>> method = LayerGradientXActivation(model, model.get_input_embeddings())
        >>> inp = TextTokenInput("The capital of France is", tokenizer)
        >>> result = LLMGradientAttribution(method, tokenizer).attribute(inp, target=" Paris")
        >>> result.token_attr.shape
        torch.Size([1, 5])
    """

    SUPPORTED_METHODS = SupportedMethods()
    SUPPORTED_INPUTS = (CaptumTextTokenInput, CaptumTextTemplateInput)

    def __init__(
        self, attr_method: GradientAttribution, tokenizer: Any, attr_target: str = "log_prob"
    ) -> None:
        if not isinstance(attr_method, self.SUPPORTED_METHODS):
            names = ", ".join(kind.__name__ for kind in self.SUPPORTED_METHODS)
            raise ValueError(f"expected one of {names}; got {type(attr_method).__name__}")
        check_pair(attr_method.forward_func, tokenizer)  # type: ignore[attr-defined]
        super().__init__(copy(attr_method), tokenizer)
        self.attr_target = check_attr_target(attr_target, GRADIENT_TARGETS)
        self._driver = driver_of(attr_method)
        # Resolved now, so that a layer that is not in the model is an error where it was written.
        self._sites, self._several = resolve_sites(self.model, attr_method.layer)  # type: ignore[attr-defined]

    def record_settings(self) -> dict[str, Any]:
        """The layers, and what the method was made with, for the provenance of results."""
        return {"layers": [site.name for site in self._sites], **settings_of(self.attr_method)}

    @one_call_at_a_time
    @recorded
    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        include_per_token_attr: bool = True,
        baselines: BaselineSpec | list[BaselineSpec] | tuple[Tensor] = None,
        layer_mode: str = "independent",
        include_generated: bool = False,
        include_hidden_attr: bool = False,
        contrast_target: str | Tensor | None = None,
        skip_tokens: Sequence[int] | Sequence[str] | None = None,
        num_trials: int = 1,
        show_progress: bool = False,
        check: bool = False,
        internal_batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        reuse_prefix: bool = True,
        forward_mode: bool | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Mapping[str, Any] | None = None,
        by_output: str = "token",
        **method_options: Any,
    ) -> LLMAttributionResult:
        """Attribute the target's scores to the features of the input.

        Args:
            inp: the prompt, a `TextTokenInput` or a `TextTemplateInput`, also of `chat_input` and
                `segment_input`. Each value of a template is a feature, and its path starts at its
                baseline: token by token where both have as many tokens, otherwise at the mean of
                the baseline's embeddings, and where it is empty at `baselines` ("mean"). A token
                that straddles a border belongs to the value that it mostly covers.
            target: a string (encoded without special tokens), a 1-D tensor of token ids, or None
                to let the model generate it. Of a question answering model: an answer, of which
                the first place in the context counts, the positions (start, end) of its tokens in
                the prompt, or None for the likeliest span of the context.
            gen_args: arguments of ``model.generate`` when `target` is None. Default: greedy, 25
                new tokens. An encoder-decoder model takes some of them with a `target` too:
                `forced_bos_token_id` (such as the target's language), `decoder_start_token_id` and
                `decoder_input_ids`, the ids after which the target is scored. These are never part
                of the target. Default: as ``generate`` has them, of `model.generation_config`.
            include_per_token_attr: False computes the sequence attribution alone, with one
                backward pass in all; `token_attr` is then None.
            baselines: where the path of integrated gradients and GradientShap starts: None (the
                input's own), a token id, a token string, "pad", "eos", "unk", "zero", "mean" (of
                all embeddings), "nearest" (each token's nearest other one), ("nearest", n),
                ("text", a text) for the tokens of another text in order (the easiest path), a
                tensor of ids or embeddings, for all positions or one each, or a list of several
                of these, over which the attributions are averaged. Or, as for Captum's
                LayerGradientShap, a tuple of one tensor (n_rows, n_features): each row is the
                input's own baseline, in which the features with 1 keep their tokens and those
                with 0 do not; the rows are averaged. An error for methods that have no path.
                For a hidden layer it means that layer's output when the embeddings are so replaced.
            layer_mode: of several layers, "independent" (each as if it were alone) or "joint" (all
                move along the path together).
            include_generated: earlier target tokens are features too: n_input + n_output columns,
                zero from the target token itself on. The baseline then replaces them as well. Of
                an encoder-decoder model these are the decoder's positions, but for those that it
                begins with; its decoder's layers hold no other features.
            include_hidden_attr: keep the attribution before it is summed over hidden units (of
                LayerSaliency: the gradient), (n_output, n_input, hidden).
            contrast_target: attribute score(target) − score(contrast) instead, at the same places
                and after the target's own tokens; as many tokens as the target, or one.
            skip_tokens: ids or strings of tokens to leave out of a given target, as in Captum 0.8
                (a string is encoded without special tokens in any case).
            num_trials: average over so many runs of a method or baseline that draws at random.
            show_progress: show a progress bar.
            check: ask the model again what earlier calls found out: whether it is causal, takes
                several rows, and has forward mode. That is remembered for each model, until its
                modules, flags, hooks, configuration or weights change. A change of code elsewhere
                is not seen, such as of a function that a module calls.
            internal_batch_size: rows (path points) per pass. Default: chosen for the device and
                its free memory. Halved where memory runs out.
            dtype: torch.bfloat16 or torch.float16 runs the passes under ``torch.autocast``: faster,
                less exact. Default: the model's own. Scores and sums are float32 in any case.
            reuse_prefix: run what precedes all features once, and take it from the key/value cache
                in every other pass.
            forward_mode: accepted; the package takes one derivative per feature instead of one
                backward pass per target token where that is cheaper, with the same attributions.
            return_convergence_delta: accepted for Captum's sake; the delta is on the result.
            attribute_to_layer_input: attribute to the layers' input instead of their output.
            grad_kwargs: further arguments of ``torch.autograd.grad``.
            by_output: "token" (default), or "sentence": the rows of `token_attr` are then of the
                sentences of the target, whose score is the sum over their tokens (LayerSaliency:
                the norm of that sum's gradient). `output_tokens` are their texts.
            **method_options: the method's own. Of LayerIntegratedGradients and LayerConductance
                `n_steps` (50) and `method`: "gausslegendre", one of Captum's Riemann rules, or
                "adaptive", which takes the gradient where the path needs it until the attributions
                sum to the score difference within `tol` (0.05, relative) or `max_rows` (1000)
                points are spent (LayerConductance: at the embeddings and decoder blocks, since
                the rest of a score does not pass through a part of a block). Of
                LayerGradientShap `n_samples` (5) and `stdevs` (0.0, of noise on the layer).

        Returns:
            An `LLMAttributionResult`: `seq_attr` (n_input,), `token_attr` (n_output, n_input) and,
            for integrated gradients, `convergence_delta` (n_output,): what the attributions over
            all positions exceed the difference of scores by, `n_evaluations`, the path points
            taken, and `converged`, whether "adaptive" met its tolerance. For several layers an
            `LLMLayerAttributionResult`.

        Raises:
            ValueError: an argument that has no meaning; the message says what was expected.
            TypeError: an option that the method does not have.

        Warns:
            when integrated gradients miss the score difference by more than 10 %, or start at the
            embeddings in 16 bits or fewer; when dropout is active, when the model is not causal,
            and when it has 8-bit layers, which are not quite so.
        """
        if isinstance(baselines, list) and not baselines:
            raise ValueError("baselines must hold at least one baseline, got an empty list")
        if check:
            forget(self.model)
        check_by_output(by_output, include_per_token_attr, self.attr_target)
        check_has_sentences(by_output, self.model)
        _check_choices(layer_mode, num_trials, internal_batch_size, grad_kwargs, dtype)
        check_weights(self.model)
        request = Request(target, gen_args, contrast_target, self.attr_target, skip_tokens)
        with differentiable(self.model), quiet_bitsandbytes():
            method = gradient_method(self._driver, self.attr_method, method_options)
            _check_method(method, baselines, layer_mode, type(self.attr_method).__name__)
            features = read_features(inp, self.tokenizer, input_device(self.model))
            kept = _kept_features(baselines, features.n_columns)
            absent: Any = None if len(kept) else baselines  # rows keep features of the input's own
            prepared = prepare(self.model, self.tokenizer, inp, features.prompt_ids, request)
        # The target is generated above by the model as it is, and differentiated here.
        with (
            differentiable(self.model),
            quiet_bitsandbytes(),
            dequantized_products(self.model),
        ):
            forcing = replace(prepared.forcing, dtype=dtype)
            if include_generated:
                features = features.with_generated(
                    forcing.target.ids, self.tokenizer, forcing.row.n_prompt
                )
            check_gradients(forcing)
            prepared = replace(prepared, forcing=forcing).probed_for(features, reuse_prefix)
            forcing = prepared.forcing
            plan = Plan(
                per_token=include_per_token_attr,
                joint=layer_mode == "joint",
                keep_hidden=include_hidden_attr or (by_output != "token" and method.norm != "sum"),
                rows=internal_batch_size or 0,
                grad_kwargs=grad_kwargs or {},
            )
            sites = [
                replace(layout_of(forcing.model).site(site), at_input=attribute_to_layer_input)
                for site in self._sites
            ]
            starts = [
                self._path_start(baseline, inp, features, forcing, row) if method.has_path else None
                for _ in range(num_trials if _draws(method, inp) else 1)
                for baseline in baselines_to_average(absent, inp)
                for row in (kept if len(kept) else [None])
            ]
            others = (
                gradient_method(self._driver, self.attr_method, method_options) for _ in starts[1:]
            )
            totals = mean_over_runs(
                prepared, [method, *others], sites, features, starts, plan, show_progress
            )
            checked = method.checked(totals, forcing.model)
            check_totals(totals, checked, plan.joint, prepared.output_tokens)
            statements = None
            if by_output != "token":
                statements = statements_of(forcing.target.ids, self.tokenizer)
            return to_result(
                {site: totals[site] for site in sites},
                self._several,
                layer_mode,
                include_hidden_attr,
                prepared.output_tokens,
                prepared.output_labels,
                with_named_baseline(inp, absent),
                Provenance(target_ids=forcing.target.ids.tolist(), evaluations=1),
                statements,
            )

    @classmethod
    def of_method(
        cls, name: str, model: nn.Module, tokenizer: Any, layers: Any, settings: Mapping[str, Any]
    ) -> LLMGradientAttribution:
        """The wrapper of a method of the registry.

        Args:
            name: the method's name in `captum_llm_ext.registry.METHODS`.
            model: the model.
            tokenizer: the model's tokenizer.
            layers: the layers; None for the input embeddings.
            settings: what the method and the wrapper are made with.
        """
        method = method_named(name)
        layers = _input_embeddings(model) if layers is None else layers
        made_with = {key: settings[key] for key in method.settings if key in settings}
        others = {key: value for key, value in settings.items() if key not in made_with}
        return cls(load(method.path)(model, layers, **made_with), tokenizer, **others)

    def method_options(self) -> set[str]:
        """The keywords of `attribute` that belong to the method."""
        return set(self._driver.options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options of the method, and baselines, that have no meaning.

        Raises:
            ValueError, TypeError: as `attribute` does.
        """
        chosen = {name: x for name, x in options.items() if name in self._driver.options}
        with same_random_state():  # a method that draws at random draws now
            method = gradient_method(self._driver, self.attr_method, chosen)
        name = type(self.attr_method).__name__
        _check_method(method, options.get("baselines"), "independent", name)

    def _path_start(
        self,
        baseline: BaselineSpec,
        inp: InterpretableInput,
        features: Features,
        forcing: TeacherForcing,
        kept: Tensor | None = None,
    ) -> PathStart:
        """Where the path starts, from the baseline of a token input or of each template value.

        kept: (n_features,) whether each feature stays as it is.
        """
        ids, length = forcing.ids, forcing.row.length
        if not isinstance(inp, CaptumTextTemplateInput):
            replaced = features.column_at(length) >= 0
            start = path_start(baseline, ids, replaced, inp.tokenizer, self.model)
        else:
            values = baseline_tokens(inp, self.tokenizer)
            value_at = features.value_at(length)
            start = template_start(baseline, values, value_at, ids, self.tokenizer, self.model)
        if kept is not None:
            columns = kept.nonzero().flatten().to(ids.device)
            stays = torch.isin(features.column_at(length), columns)
            start = replace(
                start, ids=torch.where(stays, ids, start.ids), replaced=start.replaced & ~stays
            )
        if start.embeddings is not None:
            layout_of(forcing.model).check_embedding_baseline(start.replaced)
        return start


def _check_choices(
    layer_mode: str,
    num_trials: int,
    internal_batch_size: int | None,
    grad_kwargs: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
) -> None:
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or None, got {dtype!r}")
    reserved = {"retain_graph", "grad_outputs", "outputs", "inputs"} & set(grad_kwargs or {})
    if reserved:
        raise ValueError(f"grad_kwargs cannot set {', '.join(sorted(reserved))}")
    if layer_mode not in LAYER_MODES:
        raise ValueError(f"layer_mode must be one of {', '.join(LAYER_MODES)}; got {layer_mode!r}")
    check_counts(num_trials=num_trials, internal_batch_size=internal_batch_size)


def _check_method(method: GradientMethod, baselines: Any, layer_mode: str, name: str) -> None:
    """Refuse a baseline where no path could start at it, and layers that cannot move jointly."""
    if baselines is not None and not method.has_path:
        raise ValueError(f"baselines mean nothing to {name}, which has no path")
    if layer_mode == "joint" and not method.moves_layers:
        raise ValueError(f"{name} reads its layers: layer_mode='joint' moves them")


def _kept_features(baselines: Any, n_features: int) -> Tensor:
    """Which features stay in each baseline, (n_rows, n_features); no rows for other baselines.

    Raises:
        ValueError: a tuple of a tensor whose rows are not of as many features, or not of 0 and 1.
    """
    if isinstance(baselines, Tensor) and _is_rows(baselines, n_features):
        warn(
            f"a tensor {tuple(baselines.shape)} of {baselines.dtype} as baselines holds token ids "
            "or embeddings: for Captum's rows of 0 and 1, which features the baseline keeps, pass "
            "the tuple (tensor,)"
        )
    if not (isinstance(baselines, tuple) and any(isinstance(x, Tensor) for x in baselines)):
        return torch.zeros(0, n_features, dtype=torch.bool)
    if len(baselines) != 1 or not _is_rows(baselines[0], n_features):
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in baselines]
        raise ValueError(
            f"a tuple as baselines must hold one tensor (n_rows, {n_features}) of 0 and 1, which "
            f"features each baseline keeps; got {shapes}"
        )
    rows: Tensor = baselines[0] == 1
    return rows


def _is_rows(values: Tensor, n_features: int) -> bool:
    """Whether the values have the form of rows of features that are kept (1) or not (0)."""
    fits = values.dim() == 2 and len(values) > 0 and values.size(1) == n_features
    return fits and bool(((values == 0) | (values == 1)).all())


def _draws(method: GradientMethod, inp: InterpretableInput) -> bool:
    """Whether another trial would give another result."""
    return method.has_path and (method.is_random or callable(getattr(inp, "baselines", None)))


def _input_embeddings(model: nn.Module) -> nn.Module:
    owner = owner_of(model, "get_input_embeddings")
    getter = getattr(owner, "get_input_embeddings", None)
    embeddings = getter() if callable(getter) else None
    if not isinstance(embeddings, nn.Module):
        raise ValueError(
            f"cannot tell which layer of {type(model).__name__} holds the input embeddings: name "
            'it with layers, for example layers="embed_tokens"'
        )
    return embeddings
