"""The tasks: how each kind of model is run, and what of its output is scored.

A new task is an adapter in `model/`, a function that makes the pass of a request, and one line in
`TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from captum_llm_ext.compat import DEFAULT_GEN_ARGS, InterpretableInput
from captum_llm_ext.inputs.features import with_fixed_positions
from captum_llm_ext.inputs.targets import (
    contrast_ids,
    encode_target,
    generated_ids,
    output_labels,
    output_tokens,
    warn_of_torn_word,
    without_tokens,
)
from captum_llm_ext.model.adapter import CAUSAL, QA, SEQ2SEQ, kind_of
from captum_llm_ext.model.encoder_decoder import (
    BEGINNING_ARGS,
    EncoderDecoder,
    decoder_beginning,
    reached_forced_end,
)
from captum_llm_ext.model.layers import owner_of
from captum_llm_ext.model.question_answering import (
    QuestionAnswering,
    checked_positions,
    find_answer,
    find_context,
    predict_answer,
)
from captum_llm_ext.scoring.target_scores import Target
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing
from captum_llm_ext.warning import warn


@dataclass(frozen=True)
class Request:
    """What is to be scored: the caller's target and how it counts.

    target: a string, token ids or None to generate it; gen_args: for the generated one, and what
    the decoder begins with; contrast: the target to compare with; skip_tokens: ids or strings left
    out of a target that is a text.
    """

    target: Any = None
    gen_args: dict[str, Any] | None = None
    contrast: Any = None
    attr_target: str = "log_prob"
    skip_tokens: Sequence[int] | Sequence[str] | None = None


@dataclass(frozen=True)
class Task:
    """What a kind of model does with a prompt.

    name: "causal", "seq2seq" or "qa"; teacher_forcing: from model, tokenizer, prompt ids
    (1, n_prompt) and request to the pass that scores it, whose row begins with the prompt's ids;
    output_tokens: the target's tokens as Captum names them; output_labels: as tables and plots
    name them, None for the same; perturbed: the input that perturbation asks
    for masked prompts.
    """

    name: str
    teacher_forcing: Callable[[nn.Module, Any, Tensor, Request], TeacherForcing]
    output_tokens: Callable[[TeacherForcing, Any], list[str]]
    output_labels: Callable[[TeacherForcing, Any], list[str] | None] = lambda forcing, tokenizer: (
        None
    )
    perturbed: Callable[[InterpretableInput, Any], InterpretableInput] = lambda inp, tokenizer: inp


def task_of(model: nn.Module) -> Task:
    """The task of a model, by its configuration and the classes that it is made of."""
    class_names = [type(module).__name__ for module in model.modules()]
    config = getattr(owner_of(model, "config"), "config", None)
    return TASKS[kind_of(config, class_names)]


def check_has_sentences(by_output: str, model: nn.Module) -> None:
    """Refuse rows per sentence of a model whose target is no text."""
    if by_output != "token" and task_of(model).name == QA:
        raise ValueError(
            "by_output='sentence' is for targets that are texts, and the target of a question "
            "answering model is two positions"
        )


def _causal(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The target follows the prompt."""
    for name, text in (("target", request.target), ("contrast target", request.contrast)):
        if isinstance(text, str):
            warn_of_torn_word(prompt, text, tokenizer, name)
    return TeacherForcing(model, prompt, _target(model, tokenizer, prompt, request))


def gen_args_of_target(
    model: nn.Module, gen_args: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Those of `gen_args` that a target keeps which is not generated: how its decoder begins."""
    if gen_args is None or task_of(model).name != SEQ2SEQ:
        return None
    return {name: gen_args[name] for name in BEGINNING_ARGS if name in gen_args}


def _seq2seq(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The prompt is the encoder's; the target follows the ids that the decoder begins with."""
    gen_args = request.gen_args or (DEFAULT_GEN_ARGS if request.target is None else {})
    beginning = decoder_beginning(model, gen_args)
    target_side = _InTargetLanguage(tokenizer)
    if request.target is not None:
        others = {name: x for name, x in gen_args.items() if name not in BEGINNING_ARGS}
        request = replace(request, gen_args=others or None)
    if isinstance(request.target, str) and not set(BEGINNING_ARGS[1:]) & set(gen_args):
        target_side.warn_of_first_token(request.target, beginning)
    target = _target(model, target_side, prompt, request, beginning)
    if request.target is None and reached_forced_end(model, gen_args, beginning, target.ids):
        warn(
            "generate() ended at its limit, where forced_eos_token_id puts the last token of the "
            "target whatever the model scores: raise max_new_tokens, or pass "
            'gen_args={"forced_eos_token_id": None, …}'
        )
    adapter = EncoderDecoder(model, prompt.size(1), beginning)
    return TeacherForcing(adapter, adapter.prompt(prompt[0])[None], target)


def _qa(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The target is the answer's start and end in the prompt."""
    if request.gen_args is not None:
        raise ValueError("gen_args is for a generated target, and an answer is not generated")
    if request.skip_tokens:
        raise ValueError("skip_tokens leaves tokens out of a text, and an answer is two positions")
    ids = prompt[0]
    adapter = QuestionAnswering(model, find_context(ids, tokenizer))

    def positions(answer: Any) -> Tensor:
        if isinstance(answer, str):
            return find_answer(ids, adapter.context_span, answer, tokenizer)
        return checked_positions(answer, len(ids)).to(ids.device)

    predicted = request.target is None
    answer = predict_answer(adapter, ids) if predicted else positions(request.target)
    contrast = None if request.contrast is None else positions(request.contrast)
    return TeacherForcing(
        adapter, prompt, Target(answer, request.attr_target, contrast, of_positions=True)
    )


def _target(
    model: nn.Module,
    tokenizer: Any,
    prompt: Tensor,
    request: Request,
    beginning: Sequence[int] | None = None,
) -> Target:
    """The request's target, which the model generates where it is None.

    beginning: what an encoder-decoder model's decoder begins with.
    """
    first = [] if beginning is None else list(beginning[1:])
    if request.target is None:
        ids = generated_ids(model, prompt, request.gen_args, tokenizer, beginning)
    elif request.gen_args is not None:
        raise ValueError(
            "gen_args is only for a generated target; got gen_args and a target (which, of an "
            f"encoder-decoder model, may have {', '.join(BEGINNING_ARGS)})"
        )
    else:
        ids = _without_first(first, encode_target(tokenizer, request.target))
        if request.skip_tokens:
            ids = without_tokens(ids, request.skip_tokens, tokenizer)
    contrast = None
    if request.contrast is not None:
        contrast = encode_target(tokenizer, request.contrast)
        contrast = contrast if len(contrast) == 1 else _without_first(first, contrast)
        contrast = contrast_ids(tokenizer, contrast, len(ids))
        contrast = contrast.to(prompt.device, copy=True)
    return Target(ids.to(prompt.device, copy=True), request.attr_target, contrast)


def _without_first(first: Sequence[int], ids: Tensor) -> Tensor:
    """A target's ids without the `first` ones, which its decoder begins with."""
    if not first or ids[: len(first)].tolist() != list(first):
        return ids
    if len(ids) == len(first):
        raise ValueError(
            f"the target holds only the ids {list(first)} that the decoder begins with, which are "
            'not scored: give more, or gen_args={"forced_bos_token_id": None} to score them'
        )
    return ids[len(first) :]


@dataclass(frozen=True)
class _InTargetLanguage:
    """The target's side of a tokenizer: Marian's have a vocabulary for each language."""

    tokenizer: Any

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        options = {"add_special_tokens": add_special_tokens}
        try:
            return self.tokenizer(text_target=text, **options)["input_ids"]
        except KeyError:  # M2M100's without tgt_lang, whose languages share a vocabulary
            return self.tokenizer(text, **options)["input_ids"]

    def warn_of_first_token(self, text: str, beginning: Sequence[int]) -> None:
        """Warn where the tokenizer begins a target with a token that the decoder is not fed."""
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            return
        ids, whole = (self.encode(text, add_special_tokens=added) for added in (False, True))
        starts = range(len(whole) - len(ids) + 1)
        n_first = next((i for i in starts if whole[i : i + len(ids)] == ids), 0)
        if n_first and whole[n_first - 1] != beginning[-1]:
            token = self.tokenizer.convert_ids_to_tokens(whole[n_first - 1])
            warn(
                f"the tokenizer begins a target with {token!r}, and this one is scored without "
                "such a token: name the token after which the model writes (in translation the "
                "target's language) by model.generation_config.forced_bos_token_id or "
                'gen_args={"forced_bos_token_id": id}; None means none'
            )

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        vocabulary = getattr(self.tokenizer, "target_encoder", None)
        if vocabulary is None:
            return list(self.tokenizer.convert_tokens_to_ids(tokens))
        return [vocabulary.get(token) for token in tokens]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _token_names(forcing: TeacherForcing, tokenizer: Any) -> list[str]:
    return output_tokens(forcing.target.ids, tokenizer)


def _labels(forcing: TeacherForcing, tokenizer: Any) -> list[str]:
    return output_labels(forcing.prompt_ids, forcing.target.ids, tokenizer)


def _ends(forcing: TeacherForcing, tokenizer: Any) -> list[str]:
    tokens = output_tokens(forcing.prompt_ids[0, forcing.target.ids], tokenizer)
    return [f"{end}: {token}" for end, token in zip(("start", "end"), tokens, strict=True)]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(CAUSAL, _causal, _token_names, _labels),
        Task(SEQ2SEQ, _seq2seq, _token_names),
        Task(QA, _qa, _ends, perturbed=with_fixed_positions),
    )
}
