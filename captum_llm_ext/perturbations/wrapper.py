"""`LLMAttribution`: asks Captum's method which perturbations it wants, and scores them together."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from captum.attr import FeatureAblation, KernelShap, Lime
from torch import Tensor

from captum_llm_ext.compat import (
    CaptumLLMAttribution,
    CaptumTextTemplateInput,
    ImageMaskInput,
    InterpretableInput,
    PerturbationAttribution,
    default_perturb_func,
)
from captum_llm_ext.inputs.baselines import BaselineSpec
from captum_llm_ext.inputs.targets import PERTURBATION_TARGETS, check_attr_target
from captum_llm_ext.inputs.templates import check_template, drawn
from captum_llm_ext.inputs.tokens import with_baselines
from captum_llm_ext.model.layers import input_device
from captum_llm_ext.model.quantized import quietly
from captum_llm_ext.model.random_state import same_random_state
from captum_llm_ext.perturbations.masked_prompts import (
    Coalitions,
    prompt_scorer,
    teacher_forcing,
)
from captum_llm_ext.perturbations.two_stage import TwoStageAblation
from captum_llm_ext.results import LLMAttributionResult
from captum_llm_ext.scoring.checks import (
    check_counts,
    warn_of_dropout,
)
from captum_llm_ext.scoring.tasks import Request, task_of

# Arguments of Captum's methods that this class gives itself.
RESERVED = {
    "inputs",
    "target",
    "baselines",
    "additional_forward_args",
    "perturbations_per_eval",
    "show_progress",
    "kwargs",
}

# Methods whose later perturbations depend on the scores of the first ones, and what asks for those.
STAGED = {TwoStageAblation: FeatureAblation}

InspectForward = Callable[[str, str, list[float]], None]


class LLMAttribution(CaptumLLMAttribution):
    """Perturbation attribution of language models, right on transformers 5 and in batches.

    A drop-in replacement for ``captum.attr.LLMAttribution``. The model may also be an
    encoder-decoder model, or a question answering model; of the latter an absent part keeps its
    places, with as many tokens of its baseline or else mask tokens in them, so that the answer's
    positions stay.

    Args:
        attr_method: `FeatureAblation`, `ShapleyValueSampling`, `ShapleyValues`, `Lime` or
            `KernelShap` (Captum's classes) or `TwoStageAblation`, made with the model. Lime and
            KernelShap need scikit-learn (the extra ``lime``) and give the sequence attribution
            alone.
        tokenizer: the model's tokenizer.
        attr_target: what is attributed of each target token: "log_prob" (natural logarithm, the
            default), "prob", "logit" or "rank" (minus the number of likelier tokens, so that an
            attribution is the rank displacement). The sequence score is the sum over target
            tokens; for "prob" it is the product of the probabilities.

    Raises:
        ValueError: an unsupported method or an unknown `attr_target`.

    Feature ablation and the wrapper: Miglani et al. 2023, https://arxiv.org/abs/2312.05491;
    Shapley sampling: Castro et al. 2009; LIME: https://arxiv.org/abs/1602.04938; Kernel SHAP:
    https://arxiv.org/abs/1705.07874.

    Example:
        >>> inp = TextTemplateInput("The capital of {} is", ["France"], baselines=["Japan"])
        >>> result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, " Paris")
        >>> result.token_attr.shape
        torch.Size([1, 1])
    """

    SUPPORTED_METHODS = (*CaptumLLMAttribution.SUPPORTED_METHODS, *STAGED)
    SUPPORTED_PER_TOKEN_ATTR_METHODS = (
        *CaptumLLMAttribution.SUPPORTED_PER_TOKEN_ATTR_METHODS,
        *STAGED,
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
        super().__init__(attr_method, tokenizer)
        self.attr_target = check_attr_target(attr_target, PERTURBATION_TARGETS)

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
        **kwargs: Any,
    ) -> LLMAttributionResult:
        """Attribute the target's scores to the features of the input.

        Args:
            inp: a `TextTokenInput`, `TextTemplateInput` or `ImageMaskInput`.
            target: a string (encoded without special tokens), a 1-D tensor of token ids, or None
                to let the model generate it. Of a question answering model: an answer, of which
                the first place in the context counts, the positions (start, end) of its tokens in
                the prompt, or None for the likeliest span of the context.
            num_trials: average over so many trials; a callable baseline is drawn once in each.
            gen_args: arguments of ``model.generate`` when `target` is None. Default: greedy, 25
                new tokens.
            use_cached_outputs: accepted for Captum's sake; the result does not depend on it.
            _inspect_forward: called with (prompt, target, probabilities of the sequence and of
                each token) for every perturbation that the method asks for.
            forward_in_tokens: accepted for Captum's sake; the result does not depend on it.
            baselines: for a token input, instead of its own: a token id, a token string, "pad",
                "eos", "unk", "nearest", ("nearest", n), ("text", a text) or a tensor of ids.
            contrast_target: attribute score(target) − score(contrast) instead, at the same places
                and after the target's own tokens; as many tokens as the target, or one.
            skip_tokens: ids or strings of tokens to leave out of a given target, as in Captum 0.8
                (a string is encoded without special tokens in any case).
            perturbations_per_eval: accepted for Captum's sake; see `internal_batch_size`.
            internal_batch_size: prompts per pass. Default: chosen by their length.
            reuse_prefix: take what a prompt shares with the unperturbed one from the key/value
                cache.
            show_progress: show a progress bar.
            **kwargs: the method's own, such as `n_samples`.

        Returns:
            An `LLMAttributionResult`: `seq_attr` (n_input,) and, but for Lime and KernelShap,
            `token_attr` (n_output, n_input), in units of the score.

        Raises:
            ValueError: an argument that has no meaning; the message says what was expected.
            ImportError: Lime or KernelShap without scikit-learn.
        """
        check_counts(
            num_trials=num_trials,
            perturbations_per_eval=perturbations_per_eval,
            internal_batch_size=internal_batch_size,
            n_samples=kwargs.get("n_samples"),
        )
        self._check_method(inp, kwargs)
        if isinstance(inp, ImageMaskInput):
            if self.attr_target not in ("log_prob", "prob") or contrast_target is not None:
                raise ValueError("an ImageMaskInput takes attr_target 'log_prob' or 'prob' alone")
            if baselines is not None or skip_tokens:
                raise ValueError("an ImageMaskInput has its own baseline and no skip_tokens")
            by_token = _inspect_forward is not None  # Captum inspects on that path alone
            return self._as_captum(
                inp,
                target,
                num_trials,
                gen_args,
                use_cached_outputs=False,
                _inspect_forward=_inspect_forward,
                forward_in_tokens=by_token,
                **kwargs,
            )
        with torch.inference_mode(False), torch.no_grad(), quietly():
            if isinstance(inp, CaptumTextTemplateInput):
                check_template(inp)
            inp = with_baselines(inp, baselines, self.model)
            task = task_of(self.model)
            request = Request(target, gen_args, contrast_target, self.attr_target, skip_tokens)
            forcing = teacher_forcing(self.model, self.tokenizer, inp, request)
            warn_of_dropout(forcing)
            tokens = task.names(forcing, self.tokenizer)
            scorer = prompt_scorer(forcing, reuse_prefix, internal_batch_size)
            staged = type(self.attr_method) in STAGED
            at_once = inp.n_itp_features if staged else perturbations_per_eval
            kwargs["perturbations_per_eval"] = at_once
            known: dict[tuple[int, ...], Tensor] = {}
            trials = []
            for _ in range(num_trials):
                perturbed = task.perturbed(drawn(inp), self.tokenizer)
                asked = Coalitions(perturbed, self.tokenizer, scorer, known, show_progress)
                if self._repeats_itself():
                    self._collect(asked, kwargs)
                    asked.score()
                trials.append(self._attribute_once(asked, _inspect_forward, kwargs))
            return self._result(torch.stack(trials).mean(0), inp, tokens)

    def _as_captum(self, inp: ImageMaskInput, *args: Any, **kwargs: Any) -> LLMAttributionResult:
        """Captum's own path, one pass per perturbation, for inputs that are more than token ids."""
        result = super().attribute(inp, *args, **kwargs)
        return LLMAttributionResult(
            seq_attr=result.seq_attr,
            token_attr=result.token_attr,
            input_tokens=result.input_tokens,
            output_tokens=result.output_tokens,
            inp=inp,
        )

    def _check_method(self, inp: InterpretableInput, options: dict[str, Any]) -> None:
        name = type(self.attr_method).__name__
        known = set(inspect.signature(self.attr_method.attribute).parameters) - RESERVED
        if unknown := sorted(set(options) - known):
            raise TypeError(
                f"{name} does not take {', '.join(unknown)} (its own: {', '.join(sorted(known))})"
            )
        if not isinstance(inp, self.SUPPORTED_INPUTS):
            kinds = ", ".join(kind.__name__ for kind in self.SUPPORTED_INPUTS)
            raise ValueError(f"expected one of {kinds}; got {type(inp).__name__}")
        if inp.n_itp_features == 0:
            raise ValueError("the input has no features: all its tokens are skipped")
        if isinstance(self.attr_method, Lime) and importlib.util.find_spec("sklearn") is None:
            raise ImportError(
                f"{name} needs scikit-learn: pip install 'captum-llm-ext[lime]'", name="sklearn"
            )
        if isinstance(self.attr_method, KernelShap) and inp.n_itp_features < 2:
            raise ValueError(f"{name} needs at least 2 features, got {inp.n_itp_features}")

    def _repeats_itself(self) -> bool:
        """Whether the method draws from the global random state alone, and so can run twice."""
        own_draws = getattr(self.attr_method, "perturb_func", None)
        return isinstance(self.attr_method, KernelShap) or own_draws in (None, default_perturb_func)

    def _collect(self, asked: Coalitions, kwargs: dict[str, Any]) -> None:
        """Let the method run on scores of zero, to learn which perturbations it wants.

        They do not depend on the scores (of a method in stages, the first ones), and the random
        state is put back, so that it wants the same ones when it runs in earnest.
        """
        width = 1 + len(asked.scorer.target) if self.include_per_token_attr else None

        def zeros(rows: Tensor) -> Tensor:
            asked.add(rows)
            return torch.zeros((len(rows), width) if width else len(rows), device=rows.device)

        with same_random_state():
            self._run(zeros, asked.inp, kwargs, rehearsal=True)

    def _attribute_once(
        self, asked: Coalitions, inspect: InspectForward | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """Attributions (1 + n_output or 1, n_features) of one trial."""

        def scores(rows: Tensor) -> Tensor:
            asked.add(rows)  # so that what was not foreseen is scored together
            found = [asked.found(row) for row in rows]
            if inspect is not None:
                self._inspect(inspect, asked, rows, found)
            asked_for = torch.stack([one[0] for one in found]).to(rows.device)
            return asked_for if self.include_per_token_attr else asked_for[:, 0]

        attr = self._run(scores, asked.inp, kwargs)
        return attr.detach().float().reshape(-1, asked.inp.n_itp_features)

    def _run(
        self,
        forward: Callable[[Tensor], Tensor],
        inp: Any,
        kwargs: dict[str, Any],
        rehearsal: bool = False,
    ) -> Tensor:
        method = copy(self.attr_method)
        if rehearsal and type(method) in STAGED:
            method = STAGED[type(method)](forward)
        method.forward_func = forward
        if rehearsal and isinstance(method, Lime):  # its surrogate must not learn from zeros
            method.interpretable_model = deepcopy(method.interpretable_model)
        present = inp.to_tensor().to(input_device(self.model, self.device))
        result: Tensor = method.attribute(present, **kwargs)
        return result

    def _inspect(
        self, inspect: InspectForward, asked: Coalitions, rows: Tensor, found: list[Tensor]
    ) -> None:
        response = self.tokenizer.decode(asked.scorer.target.ids)
        for row, one in zip(rows, found, strict=True):
            probabilities = one[1].exp().tolist()
            kept = probabilities if self.include_per_token_attr else probabilities[:1]
            inspect(self.tokenizer.decode(asked.prompt(row)), response, kept)

    def _result(
        self, attr: Tensor, inp: InterpretableInput, tokens: list[str]
    ) -> LLMAttributionResult:
        attr = inp.format_attr(attr)
        return LLMAttributionResult(
            seq_attr=attr[0],
            token_attr=attr[1:] if self.include_per_token_attr else None,
            input_tokens=list(inp.values),
            output_tokens=tokens,
            inp=inp,
        )
