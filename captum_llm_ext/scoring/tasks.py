"""The tasks: how each kind of model is run, and what of its output is scored.

A new task is an adapter in `model/`, a function that makes the pass of a request, and one line in
`TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs.features import with_fixed_positions
from captum_llm_ext.inputs.targets import (
    Target,
    contrast_ids,
    encode_target,
    generated_ids,
    output_tokens,
    without_tokens,
)
from captum_llm_ext.model.adapter import CAUSAL, QA, SEQ2SEQ, kind_of
from captum_llm_ext.model.encoder_decoder import EncoderDecoder, decoder_start
from captum_llm_ext.model.question_answering import (
    QuestionAnswering,
    checked_positions,
    find_answer,
    find_context,
    predict_answer,
)
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing


@dataclass(frozen=True)
class Request:
    """What is to be scored: the caller's target and how it counts.

    target: a string, token ids or None to generate it; gen_args: for the generated one; contrast:
    the target to compare with; skip_tokens: ids or strings left out of a target that is a text.
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
    output_tokens: the names of the target's tokens; perturbed: the input that perturbation asks
    for masked prompts.
    """

    name: str
    teacher_forcing: Callable[[nn.Module, Any, Tensor, Request], TeacherForcing]
    output_tokens: Callable[[TeacherForcing, Any], list[str]]
    perturbed: Callable[[InterpretableInput, Any], InterpretableInput] = lambda inp, tokenizer: inp


def task_of(model: nn.Module) -> Task:
    """The task of a model, by its configuration and the classes that it is made of."""
    class_names = [type(module).__name__ for module in model.modules()]
    return TASKS[kind_of(getattr(model, "config", None), class_names)]


def _causal(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The target follows the prompt."""
    return TeacherForcing(model, prompt, _target(model, tokenizer, prompt, request))


def _seq2seq(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The prompt is the encoder's; the target follows the decoder's start token."""
    adapter = EncoderDecoder(model, prompt.size(1), decoder_start(model))
    target = _target(model, _InTargetLanguage(tokenizer), prompt, request, n_start=1)
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
    model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request, n_start: int | None = None
) -> Target:
    """The request's target, which the model generates where it is None."""
    if request.target is None:
        ids = generated_ids(model, prompt, request.gen_args, n_start)
    elif request.gen_args is not None:
        raise ValueError("gen_args is only for a generated target; got gen_args and a target")
    else:
        ids = encode_target(tokenizer, request.target)
        if request.skip_tokens:
            ids = without_tokens(ids, request.skip_tokens, tokenizer)
    contrast = None
    if request.contrast is not None:
        contrast = contrast_ids(tokenizer, request.contrast, len(ids))
        contrast = contrast.to(prompt.device, copy=True)
    return Target(ids.to(prompt.device, copy=True), request.attr_target, contrast)


@dataclass(frozen=True)
class _InTargetLanguage:
    """The target's side of a tokenizer: Marian's have a vocabulary for each language."""

    tokenizer: Any

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self.tokenizer(text_target=text, add_special_tokens=add_special_tokens)["input_ids"]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        vocabulary = getattr(self.tokenizer, "target_encoder", None)
        if vocabulary is None:
            return list(self.tokenizer.convert_tokens_to_ids(tokens))
        return [vocabulary.get(token) for token in tokens]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _token_names(forcing: TeacherForcing, tokenizer: Any) -> list[str]:
    return output_tokens(forcing.target.ids, tokenizer)


def _ends(forcing: TeacherForcing, tokenizer: Any) -> list[str]:
    tokens = output_tokens(forcing.prompt_ids[0, forcing.target.ids], tokenizer)
    return [f"{end}: {token}" for end, token in zip(("start", "end"), tokens, strict=True)]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(CAUSAL, _causal, _token_names),
        Task(SEQ2SEQ, _seq2seq, _token_names),
        Task(QA, _qa, _ends, with_fixed_positions),
    )
}
