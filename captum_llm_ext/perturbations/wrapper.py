"""`LLMAttribution`: a perturbation method on the masked prompts of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import (
    CaptumLLMAttribution,
    ImageMaskInput,
    InterpretableInput,
    PerturbationAttribution,
    _convert_ids_to_pretty_tokens,
)
from captum_llm_ext.inputs.baselines import BaselineSpec
from captum_llm_ext.inputs.statements import check_by_output, statements_of
from captum_llm_ext.inputs.targets import (
    PERTURBATION_TARGETS,
    check_attr_target,
    generation_settings,
)
from captum_llm_ext.model.check_cache import forget
from captum_llm_ext.model.lock import one_call_at_a_time
from captum_llm_ext.model.quantized import quiet_bitsandbytes
from captum_llm_ext.model.signatures import keywords
from captum_llm_ext.model.suitability import check_pair
from captum_llm_ext.perturbations.captum_methods import CaptumMethod, check_needs
from captum_llm_ext.perturbations.guides import guide_of
from captum_llm_ext.perturbations.masked_prompts import (
    InspectForward,
    MaskedPicture,
    MaskedPrompts,
)
from captum_llm_ext.perturbations.method import Outcome, PerturbationMethod
from captum_llm_ext.perturbations.stand_in import warn_of_hiding_stand_in
from captum_llm_ext.registry import METHODS, PERTURBATION, load, method_named, methods_of
from captum_llm_ext.results import LLMAttributionResult
from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.recording import recorded, settings_of
from captum_llm_ext.scoring.checks import check_counts
from captum_llm_ext.scoring.tasks import Request, check_has_sentences

# Arguments of a method's `attribute` that this class gives.
RESERVED = {
    "inputs",
    "target",
    "baselines",
    "additional_forward_args",
    "perturbations_per_eval",
    "show_progress",
}


class LLMAttribution(CaptumLLMAttribution):
    """Perturbation attribution of language models, right on transformers 5 and in batches.

    A drop-in replacement for ``captum.attr.LLMAttribution``. The model may also be an
    encoder-decoder model, or a question answering model; an absent part of the latter keeps its
    places, with as many tokens of its baseline or else mask tokens in them, so that the answer's
    positions stay.

    Args:
        attr_method: made with the model, one of

            - Captum's `FeatureAblation`, `ShapleyValueSampling`, `ShapleyValues`, `Lime` or
              `KernelShap`, or a subclass of one. Lime and KernelShap need scikit-learn (the extra
              ``lime``) and give the sequence attribution alone.
            - `TwoStageAblation`, `GuidedAblation`, `SparseSurrogate`, or another
              `PerturbationMethod`: a generator of masks.
            - a subclass of ``captum.attr._utils.attribution.PerturbationAttribution``. Its
              ``forward_func`` takes masks (n_rows, n_features) and gives scores
              (n_rows, 1 + n_output), the sequence's first, each time it is called; its later masks
              may depend on the scores. Of its attributions (1 + n_output, n_features) the later
              rows are `token_attr`; attributions (n_features,) are of the sequence, and
              `token_attr` is None. Two attributes of the class are optional:
              ``repeatable_masks = True`` says that the masks depend neither on the scores nor on a
              random generator of its own; `attribute` then runs twice, and all its prompts are
              scored together. ``token_rows = False`` asks for scores (n_rows,) of the sequence.
        tokenizer: the model's tokenizer.
        attr_target: what is attributed of each target token: "log_prob" (natural logarithm, the
            default), "prob", "logit" or "rank" (minus the number of likelier tokens, so that an
            attribution is the rank displacement). The sequence score is the sum over target
            tokens; for "prob" it is the product of the probabilities.

    Raises:
        ValueError: an unsupported method or an unknown `attr_target`; a masked language model, a
            classifier, or a model without a language-model head.
        TypeError: no model, or no tokenizer.

    Feature ablation and the wrapper: Miglani et al. 2023, https://arxiv.org/abs/2312.05491;
    Shapley sampling: Castro et al. 2009; LIME: https://arxiv.org/abs/1602.04938; Kernel SHAP:
    https://arxiv.org/abs/1705.07874.

    Example:
        >>> inp = TextTemplateInput("The capital of {} is", ["France"], baselines=["Japan"])
        >>> result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, " Paris")
        >>> result.token_attr.shape
        torch.Size([1, 1])
    """

    SUPPORTED_METHODS = (
        *(load(method.path) for method in methods_of(PERTURBATION).values()),
        PerturbationMethod,
        PerturbationAttribution,
    )
    SUPPORTED_PER_TOKEN_ATTR_METHODS = (
        *CaptumLLMAttribution.SUPPORTED_PER_TOKEN_ATTR_METHODS,
        PerturbationMethod,
    )

    def __init__(
        self,
        attr_method: PerturbationAttribution,
        tokenizer: Any,
        attr_target: str = "log_prob",
    ) -> None:
        if not isinstance(attr_method, self.SUPPORTED_METHODS):
            names = ", ".join(kind.__name__ for kind in self.SUPPORTED_METHODS)
            raise ValueError(f"expected one of {names}; got {type(attr_method).__name__}")
        check_pair(attr_method.forward_func, tokenizer)
        super().__init__(attr_method, tokenizer)
        self.attr_target = check_attr_target(attr_target, PERTURBATION_TARGETS)
        ours = isinstance(attr_method, PerturbationMethod)
        self._method = self.attr_method if ours else CaptumMethod(self.attr_method)
        self.include_per_token_attr = self._method.token_rows

    @classmethod
    def of_method(
        cls, name: str, model: nn.Module, tokenizer: Any, layers: Any, settings: Mapping[str, Any]
    ) -> LLMAttribution:
        """The wrapper of a method of the registry.

        Args:
            name: the method's name in `captum_llm_ext.registry.METHODS`.
            model: the model.
            tokenizer: the model's tokenizer.
            layers: None, since perturbation methods have no layers.
            settings: what the method and the wrapper are made with.

        Raises:
            ValueError: layers, which perturbation methods do not have, or an unknown name.
        """
        method = method_named(name)
        if layers is not None:
            layered = [key for key, row in METHODS.items() if row.wrapped_by.has_layers]
            raise ValueError(
                f"{name} perturbs the prompt and has no layers: leave out layers, or choose one of "
                f"{', '.join(layered)}"
            )
        made_with = {key: settings[key] for key in method.settings if key in settings}
        others = {key: value for key, value in settings.items() if key not in made_with}
        return cls(load(method.path)(model, **made_with), tokenizer, **others)

    def method_options(self) -> set[str]:
        """The keywords of `attribute` that belong to the method."""
        return keywords(self.attr_method.attribute) - RESERVED

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that neither `attribute` nor the method has.

        Raises:
            TypeError: the message lists the method's options.
        """
        names = self.method_options()
        if unknown := sorted(set(options) - names - keywords(self.attribute)):
            raise TypeError(
                f"{type(self.attr_method).__name__} does not take {', '.join(unknown)} "
                f"(it takes {', '.join(sorted(names))})"
            )

    def record_settings(self) -> dict[str, Any]:
        """What the method was made with, for the provenance of results."""
        return settings_of(self.attr_method)

    @one_call_at_a_time
    @recorded
    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Tensor | None = None,
        num_trials: int = 1,
        gen_args: dict[str, Any] | None = None,
        use_cached_outputs: bool = True,
        _inspect_forward: InspectForward | None = None,
        forward_in_tokens: bool = True,
        *,
        baselines: BaselineSpec = None,
        contrast_target: str | Tensor | None = None,
        skip_tokens: Sequence[int] | Sequence[str] | None = None,
        perturbations_per_eval: int = 1,
        internal_batch_size: int | None = None,
        reuse_prefix: bool = True,
        show_progress: bool = False,
        check: bool = False,
        by_output: str = "token",
        **kwargs: Any,
    ) -> LLMAttributionResult:
        """Attribute the target's scores to the features of the input.

        Args:
            inp: a `TextTokenInput`, `TextTemplateInput` or `ImageMaskInput`.
            target: a string (encoded without special tokens), a 1-D tensor of token ids, or None
                to let the model generate it. A question answering model takes an answer, whose
                first place in the context counts, the positions (start, end) of its tokens in the
                prompt, or None for the likeliest span of the context.
            num_trials: how many trials are averaged; a callable baseline is drawn once in each.
            gen_args: arguments of ``model.generate`` when `target` is None. Default: greedy, 25
                new tokens. An encoder-decoder model takes some of them with a `target` too:
                `forced_bos_token_id` (such as the target's language), `decoder_start_token_id` and
                `decoder_input_ids`, the ids after which the target is scored. These are never part
                of the target. Default: as ``generate`` has them, of `model.generation_config`.
            use_cached_outputs: accepted for Captum's sake; the result does not depend on it.
            _inspect_forward: called with (prompt, target, probabilities of the sequence and of
                each token) for every perturbation that the method asks for.
            forward_in_tokens: accepted for Captum's sake; the result does not depend on it.
            baselines: what a token input has in place of its own baselines: a token id, a token
                string, "pad", "eos", "unk", "nearest", ("nearest", n), ("text", a text), a tensor
                of ids, or "remove", which drops absent tokens so that the others close up (where
                nothing would be left, the last token stays).
            contrast_target: attribute score(target) − score(contrast) instead, at the same places
                and after the target's tokens; as many tokens as the target, or one.
            skip_tokens: ids or strings of tokens to leave out of a given target, as in Captum 0.8
                (a string is encoded without special tokens in any case).
            perturbations_per_eval: accepted for Captum's sake; see `internal_batch_size`.
            internal_batch_size: prompts per pass. Default: chosen by their length.
            reuse_prefix: take what a prompt shares with the unperturbed one from the key/value
                cache.
            show_progress: show a progress bar.
            check: ask the model again what earlier calls found out: whether it is causal, takes
                several rows, and has forward mode. That is remembered for each model, until its
                modules, flags, hooks, configuration or weights change. A change of code elsewhere
                is not seen, such as of a function that a module calls.
            by_output: "token" (default), or "sentence": the rows of `token_attr` are then of the
                sentences of the target, whose score is the sum over their tokens.
                `output_tokens` are their texts.
            **kwargs: options of the method, such as `n_samples`.

        Returns:
            An `LLMAttributionResult`: `seq_attr` (n_input,) and `token_attr` (n_output, n_input),
            in units of the score. `token_attr` is None for Lime, KernelShap and other methods that
            have no rows per token. `GuidedAblation` gives `measured` too, and `SparseSurrogate`
            `lds`.

        Warns:
            when one token stands for every absent one and hides what stands before it, as a
            document separator does.

        Raises:
            ValueError: an argument that has no meaning; the message says what was expected.
            TypeError: an option that the method does not have.
            ImportError: Lime or KernelShap without scikit-learn.
        """
        check_counts(
            num_trials=num_trials,
            perturbations_per_eval=perturbations_per_eval,
            internal_batch_size=internal_batch_size,
            n_samples=kwargs.get("n_samples"),
        )
        check_by_output(by_output, self.include_per_token_attr, self.attr_target)
        self.check_options(kwargs)
        self._check_input(inp)
        if check:
            forget(self.model)
        check_has_sentences(by_output, self.model)
        request = Request(target, gen_args, contrast_target, self.attr_target, skip_tokens)
        with torch.inference_mode(False), torch.no_grad(), quiet_bitsandbytes():
            if isinstance(inp, ImageMaskInput):
                masked: Any = self._masked_picture(inp, request, baselines, _inspect_forward)
            else:
                masked = MaskedPrompts.of(
                    self.model,
                    self.tokenizer,
                    inp,
                    request,
                    baselines,
                    reuse_prefix,
                    internal_batch_size,
                    show_progress,
                )
                warn_of_hiding_stand_in(masked)
                masked.inspect = _inspect_forward
                masked.n_inspected = None if self.include_per_token_attr else 1
            options = {**kwargs, "perturbations_per_eval": perturbations_per_eval}
            if self._method.guide is not None and isinstance(masked, MaskedPrompts):
                options["guide"] = guide_of(self._method.guide, self.model, masked, inp, gen_args)
            trials = [
                self._method.attribute_masked(masked.drawn(), **options) for _ in range(num_trials)
            ]
            attr = inp.format_attr(torch.stack([t.attributions for t in trials]).float().mean(0))
        rows, names, labels = attr[1:], masked.output_tokens, masked.output_labels
        if by_output != "token":
            check_by_output(by_output, len(rows) > 0)
            statements = statements_of(torch.tensor(masked.target_ids), self.tokenizer)
            rows, names, labels = statements.sums(rows), statements.texts, None
        return LLMAttributionResult(
            seq_attr=attr[0],
            token_attr=rows if len(rows) else None,
            input_tokens=list(inp.values),
            output_tokens=names,
            output_labels=labels,
            inp=masked.inp,
            provenance=Provenance(target_ids=masked.target_ids, evaluations=masked.n_evaluations),
            measured=_measured_in_all(inp, trials),
            lds=_mean_lds(trials),
        )

    def _check_input(self, inp: InterpretableInput) -> None:
        if not isinstance(inp, self.SUPPORTED_INPUTS):
            kinds = ", ".join(kind.__name__ for kind in self.SUPPORTED_INPUTS)
            raise ValueError(f"expected one of {kinds}; got {type(inp).__name__}")
        if inp.n_itp_features == 0:
            raise ValueError("the input has no features: all its tokens are skipped")
        check_needs(self.attr_method, inp.n_itp_features)

    def _masked_picture(
        self,
        inp: ImageMaskInput,
        request: Request,
        baselines: BaselineSpec,
        inspect_forward: InspectForward | None,
    ) -> MaskedPicture:
        if self.attr_target not in ("log_prob", "prob") or request.contrast is not None:
            raise ValueError("an ImageMaskInput takes attr_target 'log_prob' or 'prob' alone")
        if baselines is not None or request.skip_tokens:
            raise ValueError("an ImageMaskInput has its own baseline and no skip_tokens")
        gen_args = request.gen_args
        if request.target is None and callable(generate := getattr(self.model, "generate", None)):
            gen_args = generation_settings(gen_args, self.tokenizer, generate)
        ids = self._get_target_tokens(inp, request.target, gen_args)
        forward = partial(
            self._forward_func,
            inp=inp,
            target_tokens=ids,
            _inspect_forward=inspect_forward,
            forward_in_tokens=inspect_forward is not None,  # Captum inspects on that path alone
        )
        tokens = _convert_ids_to_pretty_tokens(ids, self.tokenizer)
        return MaskedPicture(inp, forward, tokens, ids.tolist(), self.device)


def _measured_in_all(inp: InterpretableInput, trials: Sequence[Outcome]) -> Tensor | None:
    """(n_input,) bool, which features every trial left out alone, if the method tells."""
    rows = [trial.measured for trial in trials if trial.measured is not None]
    return inp.format_attr(torch.stack(rows).all(0)[None].float())[0] > 0 if rows else None


def _mean_lds(trials: Sequence[Outcome]) -> float | None:
    """The mean over the trials, None where one has none."""
    values = [trial.lds for trial in trials]
    return None if None in values else float(sum(values) / len(values))  # type: ignore[arg-type]
