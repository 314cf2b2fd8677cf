"""Inputs of the faithfulness tests, and curves by plain forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import captum.attr
import torch
from torch import Tensor, nn

from captum_llm_ext import (
    LLMAttributionResult,
    TextTemplateInput,
    TextTokenInput,
    chat_input,
    segment_input,
)
from captum_llm_ext.metrics import Faithfulness, faithfulness
from tests.inputs.template_cases import chat_tokenizer
from tests.models.families import tiny_tokenizer
from tests.oracles.cases import target_ids
from tests.perturbations.cases import (
    KEYED_TEMPLATE,
    OTHERS,
    SHORT,
    TEMPLATE,
    VALUES,
    Game,
    filled_template,
    keyed,
    replaced_tokens,
)

SIX = "Dave lives in Palm Coast"
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Dave lives"}]
ATTRIBUTIONS = [0.5, -2.0, 3.0, 0.1, -0.3, 1.0]
ORDERS = {False: [2, 5, 0, 3, 4, 1], True: [2, 1, 5, 0, 4, 3]}  # of all six, by value or size


def result_of(inp: Any, attr: Sequence[float], target: Tensor, **more: Any) -> LLMAttributionResult:
    tokenizer = more.pop("tokenizer", tiny_tokenizer())
    return LLMAttributionResult(
        input_tokens=list(inp.values),
        output_tokens=tokenizer.convert_ids_to_tokens(target.tolist()),
        seq_attr=attr,
        inp=inp,
    )


def judged(model: nn.Module, inp: Any, attr: Sequence[float], **more: Any) -> Faithfulness:
    target = more.pop("target", target_ids(2))
    tokenizer = more.pop("tokenizer", tiny_tokenizer())
    result = result_of(inp, attr, target, tokenizer=tokenizer)
    return faithfulness(model, tokenizer, result, target, **{"n_random": 2, **more})


def curves_by_hand(value: Game, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Deletion and insertion, (1 + n_features,) each, a plain forward for every point."""
    points = range(len(order) + 1)
    deletion = [value(frozenset(order[k:]))[0] for k in points]
    insertion = [value(frozenset(order[:k]))[0] for k in points]
    return torch.stack(deletion), torch.stack(insertion)


def assert_curves(found: Faithfulness, value: Game, order: Sequence[int]) -> None:
    deletion, insertion = curves_by_hand(value, order)
    assert deletion.std() > 0.05
    torch.testing.assert_close(found.curves.deletion[0], deletion, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.curves.insertion[0], insertion, atol=2e-4, rtol=1e-4)
    assert found.curves.counts.tolist() == list(range(len(order) + 1))


# --- every kind of input -------------------------------------------------------------------------


def tokens() -> tuple[Any, Callable, Any]:
    ids = tiny_tokenizer().encode(SHORT)
    return TextTokenInput(SHORT, tiny_tokenizer(), baselines=7), replaced_tokens(ids, 7), None


def _tokens_with_skipped() -> tuple[Any, Callable, Any]:
    ids = tiny_tokenizer().encode(SHORT)
    inp = TextTokenInput(SHORT, tiny_tokenizer(), baselines=7, skip_tokens=["<s>"])
    whole = replaced_tokens(ids, 7)
    return inp, lambda present: whole(frozenset({0} | {i + 1 for i in present})), None


def _template() -> tuple[Any, Callable, Any]:
    inp = TextTemplateInput(TEMPLATE, list(VALUES), list(OTHERS))
    return inp, filled_template(TEMPLATE, VALUES, OTHERS), None


def _captums_template() -> tuple[Any, Callable, Any]:
    inp = captum.attr.TextTemplateInput(KEYED_TEMPLATE, keyed(VALUES))
    return inp, filled_template(TEMPLATE, VALUES, [""] * 4), None


def _segments() -> tuple[Any, Callable, Any]:
    text = "Dave lives. In Palm Coast! Hiking golf."
    parts = ["Dave lives.", "In Palm Coast!", "Hiking golf."]
    return segment_input(text), filled_template("{} {} {}", parts, [""] * 3), None


def _chat() -> tuple[Any, Callable, Any]:
    tokenizer = chat_tokenizer()
    inp = chat_input(MESSAGES, tokenizer)
    ids: list[int] = inp.inp_tensor[0].tolist()
    places = [i for i, inside in enumerate(inp.itp_mask[0].tolist()) if inside]
    assert tokenizer.decode([ids[i] for i in places]) == "Dave lives"

    def prompt_of(present: frozenset[int]) -> list[int]:
        absent = {place for i, place in enumerate(places) if i not in present}
        return [token for i, token in enumerate(ids) if i not in absent]

    return inp, prompt_of, tokenizer


KINDS = {
    "tokens": tokens,
    "skipped tokens": _tokens_with_skipped,
    "template": _template,
    "Captum's template": _captums_template,
    "segments": _segments,
    "chat": _chat,
}
