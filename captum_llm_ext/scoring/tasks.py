"""What kinds of model there are: how each is run, and what of it is scored.

A new kind is an adapter, a function that makes the pass from a request, and one line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs import places_kept
from captum_llm_ext.inputs.targets import (
    Target,
    contrast_ids,
    output_tokens,
    target_ids,
    without_tokens,
)
from captum_llm_ext.model.answer_span import (
    AnswerSpan,
    checked_positions,
    context_span,
    find_answer,
    predicted_answer,
)
from captum_llm_ext.model.encoder_decoder import EncoderDecoder, decoder_start
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing

CAUSAL, SEQ2SEQ, QA = "causal", "seq2seq", "qa"


@dataclass(frozen=True)
class Request:
    """What is to be scored, as it was asked for."""

    target: Any = None
    gen_args: dict[str, Any] | None = None
    contrast: Any = None
    attr_target: str = "log_prob"
    skip_tokens: Sequence[int] | Sequence[str] | None = None


@dataclass(frozen=True)
class Task:
    """A kind of model.

    forcing: from model, tokenizer, the ids (1, n_prompt) of a prompt and a request to the pass
    that scores it, whose ids begin with those of the prompt; names: of the target's tokens;
    perturbed: the input that perturbation asks for prompts.
    """

    forcing: Callable[[nn.Module, Any, Tensor, Request], TeacherForcing]
    names: Callable[[TeacherForcing, Any], list[str]]
    perturbed: Callable[[InterpretableInput, Any], InterpretableInput]


def task_of(model: nn.Module) -> Task:
    """The kind of a model, by its configuration and the classes that it is made of."""
    names = [type(module).__name__ for module in model.modules()]
    return TASKS[task_name(getattr(model, "config", None), names)]


def task_name(config: Any, class_names: Iterable[str]) -> str:
    """ "causal", "seq2seq" or "qa"."""
    has_encoder = getattr(config, "is_encoder_decoder", False) is True
    if not any("ForQuestionAnswering" in name for name in class_names):
        return SEQ2SEQ if has_encoder else CAUSAL
    if has_encoder:
        raise ValueError(
            "question answering by start and end is for models of one stack (such as BERT or "
            "RoBERTa), and this one has an encoder and a decoder: load it as a seq2seq model"
        )
    return QA


def _causal(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The target follows the prompt."""
    return TeacherForcing(model, prompt, _target(model, tokenizer, prompt, request))


def _seq2seq(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The prompt is the encoder's; the target follows the decoder's start token."""
    adapter = EncoderDecoder(model, prompt.size(1), decoder_start(model))
    target = _target(model, _InTargetLanguage(tokenizer), prompt, request, n_given=1)
    return TeacherForcing(adapter, adapter.prompt(prompt[0])[None], target)


def _qa(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The target is the answer's start and end in the prompt."""
    if request.gen_args is not None:
        raise ValueError("gen_args is for a generated target, and an answer is not generated")
    if request.skip_tokens:
        raise ValueError("skip_tokens leaves tokens out of a text, and an answer is two positions")
    ids = prompt[0]
    adapter = AnswerSpan(model, context_span(ids, tokenizer))

    def positions(answer: Any) -> Tensor:
        if isinstance(answer, str):
            return find_answer(ids, adapter.context_at, answer, tokenizer)
        return checked_positions(answer, len(ids)).to(ids.device)

    given = request.target is not None
    answer = positions(request.target) if given else predicted_answer(adapter, ids)
    contrast = None if request.contrast is None else positions(request.contrast)
    return TeacherForcing(
        adapter, prompt, Target(answer, request.attr_target, contrast, of_positions=True)
    )


def _target(
    model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request, n_given: int | None = None
) -> Target:
    inputs = {"input_ids": prompt}
    ids = target_ids(model, tokenizer, inputs, request.target, request.gen_args, n_given)
    if request.target is not None:
        ids = without_tokens(ids, request.skip_tokens, tokenizer)
    ids = ids.to(prompt.device, copy=True)
    contrast = contrast_ids(tokenizer, request.contrast, len(ids))
    contrast = None if contrast is None else contrast.to(prompt.device, copy=True)
    return Target(ids, request.attr_target, contrast)


@dataclass(frozen=True)
class _InTargetLanguage:
    """A tokenizer's side of the target: some (Marian) have a vocabulary for each language."""

    tokenizer: Any

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self.tokenizer(text_target=text, add_special_tokens=add_special_tokens)["input_ids"]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        own = getattr(self.tokenizer, "target_encoder", None)
        if own is None:
            return list(self.tokenizer.convert_tokens_to_ids(tokens))
        return [own.get(token) for token in tokens]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _token_names(forcing: TeacherForcing, tokenizer: Any) -> list[str]:
    return output_tokens(forcing.target.ids, tokenizer)


def _ends(forcing: TeacherForcing, tokenizer: Any) -> list[str]:
    tokens = output_tokens(forcing.prompt_ids[0, forcing.target.ids], tokenizer)
    return [f"{end}: {token}" for end, token in zip(("start", "end"), tokens, strict=True)]


def _as_it_is(inp: InterpretableInput, tokenizer: Any) -> InterpretableInput:
    return inp


TASKS: dict[str, Task] = {
    CAUSAL: Task(_causal, _token_names, _as_it_is),
    SEQ2SEQ: Task(_seq2seq, _token_names, _as_it_is),
    QA: Task(_qa, _ends, places_kept),
}
