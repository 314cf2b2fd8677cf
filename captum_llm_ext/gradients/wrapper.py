"""`LLMGradientAttribution`: reads what is asked for, differentiates, and makes the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from captum.attr import LayerConductance
from torch import Tensor

from captum_llm_ext.compat import (
    CaptumLLMGradientAttribution,
    CaptumTextTemplateInput,
    CaptumTextTokenInput,
    GradientAttribution,
    InterpretableInput,
)
from captum_llm_ext.gradients.assemble import (
    check_totals,
    layer_columns,
    layered_result,
    single_result,
    warn_of_leaps,
    warn_of_zeros,
    warn_unless_converged,
)
from captum_llm_ext.gradients.differentiate import (
    holds_whole_state,
    is_conductance,
)
from captum_llm_ext.gradients.forward_mode import is_cheaper
from captum_llm_ext.gradients.job import Job, check_choices, draws, forward_mode_of, rows_per_pass
from captum_llm_ext.gradients.methods import RULES, PathRule, Rule, check_baselines, read_rule
from captum_llm_ext.gradients.totals import LayerTotal, Plan
from captum_llm_ext.inputs.baselines import (
    BaselineSpec,
    PathStart,
    each_baseline,
    path_start,
    template_start,
)
from captum_llm_ext.inputs.features import Features, baseline_tokens, read_features
from captum_llm_ext.inputs.targets import GRADIENT_TARGETS, check_attr_target
from captum_llm_ext.inputs.tokens import attributed_with
from captum_llm_ext.model.adapter import sites_in
from captum_llm_ext.model.encoder_decoder import check_start
from captum_llm_ext.model.hooks import evaluating, frozen_parameters, without_checkpointing
from captum_llm_ext.model.layers import Site, resolve_sites
from captum_llm_ext.model.parts import input_device
from captum_llm_ext.model.prefix_cache import FEWEST_REUSED, PrefixCache, can_be_cut, keeps_cache
from captum_llm_ext.model.quantized import dequantized_products, quietly
from captum_llm_ext.results import LLMAttributionResult
from captum_llm_ext.scoring.checks import (
    check_causal,
    check_context,
    check_gradients,
    check_ids,
    probed,
    warn_of_dropout,
    warn_of_low_precision,
)
from captum_llm_ext.scoring.tasks import Request, task_of
from captum_llm_ext.scoring.teacher_forcing import Pass, TeacherForcing


class LLMGradientAttribution(CaptumLLMGradientAttribution):
    """Gradient attribution of language models, in one pass and over any set of layers.

    A drop-in replacement for ``captum.attr.LLMGradientAttribution``. The model may also be an
    encoder-decoder model, whose encoder reads the prompt, or a question answering model, whose
    output tokens are the start and the end of an answer (see `qa_input`).

    Args:
        attr_method: `LayerIntegratedGradients`, `LayerGradientXActivation`, `LayerGradientShap`,
            `LayerConductance` (Captum's classes) or `LayerSaliency`, made with the model and a
            layer, a list of layers, or names and patterns of layers (see `find_layers`).
        tokenizer: the model's tokenizer.
        attr_target: what is attributed of each target token: "log_prob" (natural logarithm, the
            default), "prob" or "logit". The sequence score is the sum over target tokens; for
            "prob" it is the product of the probabilities.

    Raises:
        ValueError: an unsupported method, an unknown `attr_target`, or no such layer.

    Integrated gradients: Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365. Captum's
    wrappers: Miglani et al. 2023, https://arxiv.org/abs/2312.05491.

    Example:
        >>> method = LayerGradientXActivation(model, model.get_input_embeddings())
        >>> inp = TextTokenInput("The capital of France is", tokenizer)
        >>> result = LLMGradientAttribution(method, tokenizer).attribute(inp, target=" Paris")
        >>> result.token_attr.shape
        torch.Size([1, 5])
    """

    SUPPORTED_METHODS = tuple(RULES)
    SUPPORTED_INPUTS = (CaptumTextTokenInput, CaptumTextTemplateInput)

    def __init__(
        self, attr_method: GradientAttribution, tokenizer: Any, attr_target: str = "log_prob"
    ) -> None:
        if not isinstance(attr_method, self.SUPPORTED_METHODS):
            names = ", ".join(kind.__name__ for kind in self.SUPPORTED_METHODS)
            raise ValueError(f"expected one of {names}; got {type(attr_method).__name__}")
        super().__init__(copy(attr_method), tokenizer)
        self.attr_target = check_attr_target(attr_target, GRADIENT_TARGETS)
        # Found now, so that a layer that is not in the model is an error where it was written.
        self._sites, self._several = resolve_sites(self.model, attr_method.layer)  # type: ignore[attr-defined]

    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        include_per_token_attr: bool = True,
        baselines: BaselineSpec | list[BaselineSpec] = None,
        layer_mode: str = "independent",
        include_generated: bool = False,
        include_hidden_attr: bool = False,
        contrast_target: str | Tensor | None = None,
        skip_tokens: Sequence[int] | Sequence[str] | None = None,
        num_trials: int = 1,
        show_progress: bool = False,
        internal_batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        reuse_prefix: bool = True,
        forward_mode: bool | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Mapping[str, Any] | None = None,
        **method_options: Any,
    ) -> LLMAttributionResult:
        """Attribute the target's scores to the features of the input.

        Args:
            inp: the prompt, a `TextTokenInput` or a `TextTemplateInput`, also of `chat_input` and
                `segment_input`. Of a template each value is a feature, and its path starts at its
                baseline: token by token where both have as many tokens, otherwise at the mean of
                the baseline's embeddings, and where it is empty at `baselines` ("mean"). A token
                that straddles a border belongs to the value that it mostly covers.
            target: a string (encoded without special tokens), a 1-D tensor of token ids, or None
                to let the model generate it. Of a question answering model: an answer, of which
                the first place in the context counts, the positions (start, end) of its tokens in
                the prompt, or None for the likeliest span of the context.
            gen_args: arguments of ``model.generate`` when `target` is None. Default: greedy, 25
                new tokens.
            include_per_token_attr: False computes the sequence attribution alone, with one
                backward pass in all; `token_attr` is then None.
            baselines: where the path of integrated gradients and GradientShap starts: None (the
                input's own), a token id, a token string, "pad", "eos", "unk", "zero", "mean" (of
                all embeddings), "nearest" (each token's nearest other one), ("nearest", n),
                ("text", a text) for the tokens of another text in order (the easiest path), a
                tensor of ids or embeddings, for all positions or one each, or a list of several
                of these, over which the attributions are averaged. An error for methods that have
                no path.
                For a hidden layer it means that layer's output when the embeddings are so replaced.
            layer_mode: of several layers, "independent" (each as if it were alone) or "joint" (all
                move along the path together).
            include_generated: earlier target tokens are features too: n_input + n_output columns,
                zero from the target token itself on. The baseline then replaces them as well. Of
                an encoder-decoder model these are the decoder's positions, but for its start
                token; its decoder's layers hold no other features.
            include_hidden_attr: keep the attribution before it is summed over hidden units (of
                LayerSaliency: the gradient), (n_output, n_input, hidden).
            contrast_target: attribute score(target) − score(contrast) instead, at the same places
                and after the target's own tokens; as many tokens as the target, or one.
            skip_tokens: ids or strings of tokens to leave out of a given target, as in Captum 0.8
                (a string is encoded without special tokens in any case).
            num_trials: average over so many runs of a method or baseline that draws at random.
            show_progress: show a progress bar.
            internal_batch_size: rows (path points) per pass. Default: chosen for the device and
                its free memory. Halved where memory runs out.
            dtype: torch.bfloat16 or torch.float16 runs the passes under ``torch.autocast``: faster,
                less exact. Default: the model's own. Scores and sums are float32 in any case.
            reuse_prefix: run what precedes all features once, and take it from the key/value cache
                in every other pass.
            forward_mode: True takes one directional derivative per feature instead of one backward
                pass per target token, False never does; None, the default, where it is cheaper.
                Of the methods with a path, for each token, of layers that are not joint.
            return_convergence_delta: accepted for Captum's sake; the delta is on the result.
            attribute_to_layer_input: attribute to the layers' input instead of their output.
            grad_kwargs: further arguments of ``torch.autograd.grad``.
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
        check_choices(layer_mode, num_trials, internal_batch_size, grad_kwargs, dtype)
        with _differentiable(self.model):
            rule = read_rule(self.attr_method, method_options)
            check_baselines(rule, baselines, type(self.attr_method).__name__)
            if layer_mode == "joint" and is_conductance(rule):
                raise ValueError("LayerConductance reads its layers: layer_mode='joint' moves them")
            request = Request(target, gen_args, contrast_target, self.attr_target, skip_tokens)
            forcing, features, tokens = self._asked(inp, request)
            forcing = replace(forcing, dtype=dtype)
        # The target is generated above by the model as it is, and differentiated here.
        with _differentiable(self.model), dequantized_products(self.model):
            warn_of_dropout(forcing)
            check_gradients(forcing)
            if include_generated:
                features = features.with_generated(forcing.target.ids, self.tokenizer)
            forcing, probe, causal = self._probed(forcing, features, reuse_prefix)
            joint = layer_mode == "joint" and len(self._sites) > 1
            possible = include_per_token_attr and not (include_hidden_attr or joint)
            cheap = is_cheaper(features.n_columns, len(forcing.target))
            plan = Plan(
                per_token=include_per_token_attr,
                joint=layer_mode == "joint",
                keep_hidden=include_hidden_attr,
                rows=internal_batch_size or rows_per_pass(forcing, rule),
                causal=causal,
                column_at=features.column_at(forcing.ids.size(1))[forcing.cut :],
                forward_mode=forward_mode_of(forward_mode, rule, possible, cheap),
                grad_kwargs=grad_kwargs or {},
            )
            found = sites_in(forcing.model, self._sites)
            sites = [replace(site, at_input=attribute_to_layer_input) for site in found]
            if isinstance(rule, PathRule):
                warn_of_low_precision(forcing, probe, sites)
            trials = num_trials if isinstance(rule, PathRule) and draws(rule, inp) else 1
            starts = [
                self._path_start(rule, baseline, inp, features, forcing)
                for _ in range(trials)
                for baseline in each_baseline(baselines, inp)
            ]
            more = [read_rule(self.attr_method, method_options) for _ in starts[1:]]
            job = Job(forcing, sites, plan)
            totals = job.run([rule, *more], starts, show_progress)
            known = attributed_with(inp, baselines)
            return self._result(job, totals, features, tokens, known, layer_mode)

    def _asked(
        self, inp: InterpretableInput, request: Request
    ) -> tuple[TeacherForcing, Features, list[str]]:
        """Prompt and target, the features in it, and the names of the target's tokens."""
        device = input_device(self.model, self.device)
        features = read_features(inp, self.tokenizer, device)
        task = task_of(self.model)
        forcing = task.forcing(self.model, self.tokenizer, features.prompt_ids, request)
        check_ids(forcing)
        check_context(forcing)
        tokens = task.names(forcing, self.tokenizer)
        return forcing, features.of_prompt(forcing.prompt_ids), tokens

    def _probed(
        self, forcing: TeacherForcing, features: Features, reuse_prefix: bool
    ) -> tuple[TeacherForcing, Pass, bool]:
        """The pass with what precedes all features cached, its probe, and whether it is causal."""
        cut = features.first if reuse_prefix and keeps_cache(forcing.model) else 0
        reused = cut >= FEWEST_REUSED
        probe = probed(forcing, use_cache=reused, filled_up=reused)
        causal = check_causal(forcing, probe)
        if not causal or not can_be_cut(probe.cache):
            return forcing, probe, causal
        cache = PrefixCache(self.model, forcing.prompt_ids[0], probe.cache, forcing.ids.size(1))
        shorter = replace(forcing, prefix=cache, cut=cut)
        with torch.no_grad(), evaluating(self.model):
            found = shorter.run(shorter.fed(shorter.ids, shorter.whole), shorter.whole)
        return (shorter if found.agrees_with(probe) else forcing), probe, True

    def _path_start(
        self,
        rule: Rule,
        baselines: BaselineSpec,
        inp: InterpretableInput,
        features: Features,
        forcing: TeacherForcing,
    ) -> PathStart | None:
        if not isinstance(rule, PathRule):
            return None
        ids, length = forcing.ids, forcing.ids.size(1)
        if not isinstance(inp, CaptumTextTemplateInput):
            replaced = features.column_at(length) >= 0
            start = path_start(baselines, inp, ids, replaced, self.model)
        else:
            neutral = "mean" if baselines is None else baselines
            values = baseline_tokens(inp, self.tokenizer)
            value_at = features.value_at(length)
            start = template_start(neutral, values, value_at, ids, self.tokenizer, self.model)
        check_start(forcing.model, start)
        return start

    def _result(
        self,
        job: Job,
        totals: Mapping[Site, LayerTotal],
        features: Features,
        tokens: list[str],
        inp: InterpretableInput,
        layer_mode: str,
    ) -> LLMAttributionResult:
        plan, model = job.plan, job.forcing.model
        columns = {
            site: layer_columns(total, features, plan.per_token, plan.keep_hidden)
            for site, total in totals.items()
        }
        by_site = {site: columns[site] for site in job.sites}
        checked = list(by_site.values())
        if isinstance(self.attr_method, LayerConductance):
            checked = [x for site, x in columns.items() if holds_whole_state(site, model)]
        check_totals(totals)
        warn_of_zeros(totals)
        warn_of_leaps(checked)
        warn_unless_converged(checked, plan.joint, tokens)
        if self._several:
            return layered_result(by_site, layer_mode, features, tokens, inp)
        return single_result(next(iter(by_site.values())), features, tokens, inp)


@contextmanager
def _differentiable(model: torch.nn.Module) -> Iterator[None]:
    """Gradients of activations and not of weights, whatever mode the caller is in."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        frozen_parameters(model),
        without_checkpointing(model),
        quietly(),
    ):
        yield
