"""Extractive question answering: equal to Captum's own methods, start and end one at a time."""

from __future__ import annotations

from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor

from captum_llm_ext import (
    LayerIntegratedGradients,
    LayerSaliency,
    LLMAttribution,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
    qa_input,
)
from tests.models.question_answering import (
    ANSWER,
    BASELINE,
    CONTEXT,
    FAMILIES,
    LAYERS,
    QUESTION,
    answer_span,
    encoded,
    log_p,
    qa_tokenizer,
    question_input,
    tiny_qa,
    types_of,
)
from tests.oracles.cases import METHODS, STEPS, assert_close, our_attribution

# Few steps are enough to compare; that they do not converge is another test's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def attribution(family: str, method: Any, layer: Any, inp: Any, **how: Any) -> Any:
    how.setdefault("target", ANSWER)
    how["tokenizer"] = qa_tokenizer(family)
    return our_attribution(method, tiny_qa(family), layer, inp, **how)


def ablation(family: str, inp: Any, target: Any = ANSWER, **how: Any) -> Any:
    wrapper = LLMAttribution(
        captum.attr.FeatureAblation(tiny_qa(family)), qa_tokenizer(family), **how
    )
    return wrapper.attribute(inp, target=target)


def baseline_of(inp: Any) -> Tensor:
    return torch.where(inp.itp_mask, BASELINE, inp.inp_tensor)


def scores(family: str, ids: Tensor, span: list[int] | None = None) -> Tensor:
    """log p of start and end, (2,)."""
    with torch.no_grad():
        found = [
            log_p(tiny_qa(family), ids, types_of(family), end, position)
            for end, position in enumerate(span or answer_span(family))
        ]
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_is_the_tokenizers_own_pair(family: str) -> None:
    inp = question_input(family)
    assert torch.equal(inp.inp_tensor, encoded(family)["input_ids"])
    special = set(qa_tokenizer(family).all_special_ids)
    assert inp.itp_mask[0].tolist() == [int(i) not in special for i in inp.inp_tensor[0]]


@pytest.mark.parametrize("kind", ["embedding", "block", "projection", "mlp"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_captum(family: str, method: str, kind: str) -> None:
    model, inp = tiny_qa(family), question_input(family)
    layer = model.get_submodule(LAYERS[family][kind])
    result = attribution(family, METHODS[method], layer, inp)
    how: dict[str, Any] = {}
    if method == "integrated_gradients":
        how = {"baselines": baseline_of(inp), "n_steps": STEPS}
    rows = []
    for end, position in enumerate(answer_span(family)):

        def forward(ids: Tensor, end: int = end, position: int = position) -> Tensor:
            return log_p(model, ids, types_of(family), end, position)

        oracle = getattr(captum.attr, METHODS[method].__name__)(forward, layer)
        rows.append(oracle.attribute(inp.inp_tensor, **how).sum(-1)[0])
    expected = torch.stack(rows)[:, inp.itp_mask[0]]
    assert result.output_tokens == ["start: his", "end: ily"]
    assert_close(result.token_attr, expected)
    assert_close(result.seq_attr, expected.sum(0), 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_equals_captum(family: str) -> None:
    model, inp = tiny_qa(family), question_input(family)
    rows = []
    for end, position in enumerate(answer_span(family)):

        def forward(ids: Tensor, end: int = end, position: int = position) -> Tensor:
            with torch.no_grad():
                return log_p(model, ids, types_of(family), end, position)

        oracle = captum.attr.FeatureAblation(forward)
        rows.append(oracle.attribute(inp.inp_tensor, baselines=BASELINE)[0])
    expected = torch.stack(rows)[:, inp.itp_mask[0]]
    assert_close(ablation(family, inp).token_attr, expected)


@pytest.mark.parametrize("by", ["part", "sentence", "word"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_of_parts_keeps_the_answers_place(family: str, by: str) -> None:
    """Absent parts leave their places, with the mask in them."""
    inp = question_input(family, by)
    ids, pair = encoded(family)["input_ids"], encoded(family)
    result = ablation(family, inp)
    expected = []
    for value, (part, start) in zip(inp.values, starts(inp.values), strict=True):
        absent = ids.clone()
        for i, (a, b) in enumerate(pair["offset_mapping"][0].tolist()):
            shared = min(b, start + len(value)) - max(a, start)
            if pair.sequence_ids()[i] == part and shared > (b - a) / 2:
                absent[0, i] = qa_tokenizer(family).mask_token_id
        expected.append(scores(family, ids) - scores(family, absent))
    assert_close(result.token_attr, torch.stack(expected, dim=1))


def starts(values: list[str]) -> list[tuple[int, int]]:
    """Of the values in their order: question (0) or context (1), and the first character."""
    found, at = [], 0
    text = QUESTION + CONTEXT
    for value in values:
        at = text.index(value, at)
        part = int(at >= len(QUESTION))
        found.append((part, at - part * len(QUESTION)))
        at += len(value)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_baselines_of_as_many_tokens(family: str) -> None:
    tokenizer, ids = qa_tokenizer(family), encoded(family)["input_ids"]
    separator = "</s>" if family == "bert" else "</s></s>"
    template = QUESTION.replace("golf", "{}") + separator + CONTEXT.replace("Palm", "{}", 1)
    inp = TextTemplateInput(template, ["golf", "Palm"], baselines=["hiking", "golf with friends"])
    words = {w: tokenizer.encode(f" {w}", add_special_tokens=False) for w in ("golf", "Palm")}
    result = ablation(family, inp)
    expected = []
    for word, other in (("golf", " hiking"), ("Palm", " golf with friends")):
        new = tokenizer.encode(other, add_special_tokens=False)
        absent = ids.clone()
        place = ids[0].tolist().index(words[word][0])
        old = words[word]
        mask = [tokenizer.mask_token_id] * len(old)
        filled = new if len(new) == len(old) else mask
        absent[0, place : place + len(old)] = torch.tensor(filled)
        expected.append(scores(family, ids) - scores(family, absent))
    assert_close(result.token_attr, torch.stack(expected, dim=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_of_question_and_context(family: str) -> None:
    model, inp = tiny_qa(family), question_input(family, "part")
    layer: Any = model.get_submodule(LAYERS[family]["embedding"])
    result = attribution(family, LayerIntegratedGradients, layer, inp)
    ids = encoded(family)["input_ids"]
    part_of = torch.tensor([-1 if p is None else p for p in encoded(family).sequence_ids()])
    with torch.no_grad():
        end_value = layer(ids)
        mean = layer.weight.mean(0)
        start_value = torch.where((part_of >= 0)[None, :, None], mean, end_value)
    expected = torch.zeros(2, 2)
    points, weights = np.polynomial.legendre.leggauss(STEPS)
    for end, position in enumerate(answer_span(family)):
        for point, weight in zip((1 + points) / 2, weights / 2, strict=True):
            value = start_value + float(point) * (end_value - start_value)
            value.requires_grad_()
            hook = layer.register_forward_hook(lambda *_, value=value: value)
            score = log_p(model, ids, types_of(family), end, position)
            hook.remove()
            gradient = torch.autograd.grad(score.sum(), value)[0]
            per_token = float(weight) * (gradient * (end_value - start_value)).sum(-1)[0]
            for part in (0, 1):
                expected[end, part] += per_token[part_of == part].sum().detach()
    assert result.input_tokens == [QUESTION, CONTEXT]
    assert_close(result.token_attr, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_match_the_score_difference(family: str) -> None:
    inp, layer = question_input(family), LAYERS[family]["embedding"]
    wrapper = LLMGradientAttribution(
        LayerIntegratedGradients(tiny_qa(family), layer), qa_tokenizer(family)
    )
    how: dict[str, Any] = {"method": "adaptive", "tol": 0.02, "max_rows": 4000}
    result = wrapper.attribute(inp, target=ANSWER, **how)
    difference = scores(family, inp.inp_tensor) - scores(family, baseline_of(inp))
    assert (result.token_attr.sum(1) - difference).abs().max() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_predicted_answer(family: str) -> None:
    model, ids, pair = tiny_qa(family), encoded(family)["input_ids"], encoded(family)
    context = [i for i, part in enumerate(pair.sequence_ids()) if part == 1]
    best = max(
        ((s, e) for s in context for e in context if s <= e),
        key=lambda span: float(scores(family, ids, list(span)).sum()),
    )
    predicted, given = (
        attribution(
            family,
            METHODS["gradient_x_activation"],
            model.get_input_embeddings(),
            question_input(family),
            target=target,
        )
        for target in (None, best)
    )
    assert predicted.output_tokens == given.output_tokens
    assert_close(predicted.token_attr, given.token_attr)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_contrast_of_two_answers(family: str) -> None:
    inp = question_input(family)
    wrapper = LLMAttribution(captum.attr.FeatureAblation(tiny_qa(family)), qa_tokenizer(family))
    found = wrapper.attribute(inp, target=ANSWER, contrast_target="Palm Coast").token_attr
    apart = [ablation(family, inp, target).token_attr for target in (ANSWER, "Palm Coast")]
    assert_close(found, apart[0] - apart[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_prob_is_the_product_of_both_ends(family: str) -> None:
    inp = question_input(family)
    result = ablation(family, inp, attr_target="prob")
    ids = inp.inp_tensor
    first = ids.clone()
    first[0, inp.itp_mask[0].long().argmax()] = BASELINE
    expected = scores(family, ids).sum().exp() - scores(family, first).sum().exp()
    assert (result.seq_attr[0] - expected).abs() <= 1e-4 * expected.abs()


@pytest.mark.parametrize("family", FAMILIES)
def test_which_part_holds_the_features(family: str) -> None:
    both = attribution(
        family, METHODS["gradient_x_activation"], "*word_embeddings", question_input(family)
    )
    question = attribution(
        family,
        METHODS["gradient_x_activation"],
        "*word_embeddings",
        question_input(family, parts="question"),
    )
    n = len(question.input_tokens)
    assert 0 < n < len(both.input_tokens)
    assert_close(question.token_attr, both.token_attr[:, :n])


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ["Tokyo", QUESTION, "famil", ""])
def test_an_answer_that_is_not_in_the_context(family: str, answer: str) -> None:
    inp = question_input(family)
    with pytest.raises(ValueError, match="not in the context"):
        ablation(family, inp, answer)
    with pytest.raises(ValueError, match="not in the context"):
        attribution(family, LayerIntegratedGradients, "*word_embeddings", inp, target=answer)


@pytest.mark.parametrize("span", [(3, 2), (-1, 2), (0, 500), (1,), (1, 2, 3), (0.5, 2.0)])
def test_positions_that_are_no_span(span: Any) -> None:
    with pytest.raises(ValueError, match=r"start <= end|\(start, end\)"):
        ablation("bert", question_input("bert"), span)


def test_no_context() -> None:
    with pytest.raises(ValueError, match="qa_input"):
        ablation("bert", TextTokenInput("Who plays golf", qa_tokenizer("bert")))


def test_generation_arguments() -> None:
    wrapper = LLMGradientAttribution(
        LayerSaliency(tiny_qa("bert"), "*word_embeddings"), qa_tokenizer("bert")
    )
    with pytest.raises(ValueError, match="not generated"):
        wrapper.attribute(question_input("bert"), gen_args={"max_new_tokens": 3})


def test_an_answer_has_no_tokens_to_skip() -> None:
    inp, model = question_input("bert"), tiny_qa("bert")
    for method in (captum.attr.FeatureAblation(model), LayerSaliency(model, "*word_embeddings")):
        kind = LLMGradientAttribution if isinstance(method, LayerSaliency) else LLMAttribution
        wrapper: Any = kind(method, qa_tokenizer("bert"))
        with pytest.raises(ValueError, match="two positions"):
            wrapper.attribute(inp, target=ANSWER, skip_tokens=["<s>"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "text"), "at least one character"),
        (("text", " "), "at least one character"),
        (("a", "b", None, "syllable"), "by must be one of"),
        (("a", "b", None, "token", ("answer",)), "parts must be of"),
        (("a", "b", None, "token", ()), "parts must be of"),
    ],
)
def test_questions_that_have_no_meaning(arguments: Any, message: str) -> None:
    question, context, *rest = arguments
    with pytest.raises(ValueError, match=message):
        qa_input(question, context, qa_tokenizer("bert"), *rest[1:])
