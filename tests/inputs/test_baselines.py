"""The `baselines` keyword: tokens by name, embeddings, and tensors."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
from captum.attr import FeatureAblation, LayerIntegratedGradients

from captum_llm_ext import LLMAttribution, LLMGradientAttribution, TextTokenInput
from captum_llm_ext.inputs.baselines import COMMON_WORDS
from captum_llm_ext.inputs.tokens import with_baselines
from tests.models.families import PROMPT, layer_names, tiny_model, tiny_tokenizer
from tests.oracles.cases import (
    assert_close,
    captum_attribution,
    formula,
    in_pairs,
    our_attribution,
    problem,
    prompt_input,
    target_ids,
)

# Few steps are enough to compare; that they do not converge is another file's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_a_path_from_the_pad_token_equals_captums() -> None:
    model, target = tiny_model("llama"), target_ids(2)
    embedding = model.model.embed_tokens
    padded = captum.attr.TextTokenInput(PROMPT, tiny_tokenizer(), baselines=3)
    expected = captum_attribution(LayerIntegratedGradients, model, embedding, padded, target=target)
    inp = TextTokenInput(PROMPT, tiny_tokenizer(), baselines="pad")
    result = our_attribution(LayerIntegratedGradients, model, embedding, inp, target=target)
    assert_close(result.token_attr, expected.token_attr)


BASELINES: dict[str, tuple[Any, int]] = {
    "pad": ("pad", 3),
    "eos": ("eos", 2),
    "unk": ("unk", 0),
    "id": (17, 17),
    "token": ("Ġgolf", -1),
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("kind", ["embedding", "block"])
def test_baseline_keyword_names_a_token(kind: str, name: str) -> None:
    keyword, number = BASELINES[name]
    if number < 0:
        number = tiny_tokenizer().vocab[keyword]
    target, model = target_ids(2), tiny_model("llama")
    layer = model.get_submodule(layer_names("llama")[kind])
    text = "Dave lives in Palm Coast"
    by_number = captum.attr.TextTokenInput(text, tiny_tokenizer(), baselines=number)
    inp = captum.attr.TextTokenInput(text, tiny_tokenizer(), baselines=9)
    expected = captum_attribution(LayerIntegratedGradients, model, layer, by_number, target=target)
    result = our_attribution(
        LayerIntegratedGradients, model, layer, inp, target=target, baselines=keyword
    )
    assert_close(result.token_attr, expected.token_attr)


@in_pairs(
    kind=["embedding", "block", "mlp"],
    form=["default", "skip_tokens"],
    name=["zero", "mean", "tensor"],
)
def test_baseline_keyword_gives_embeddings(kind: str, form: str, name: str) -> None:
    inp, target, model = prompt_input(form), target_ids(2), tiny_model("llama")
    matrix = model.get_input_embeddings().weight.detach()
    count = inp.inp_tensor.shape[1]
    start = {
        "zero": torch.zeros(count, matrix.shape[1]),
        "mean": matrix.mean(0).expand(count, -1),
        "tensor": matrix[7].expand(count, -1) * 0.5,
    }[name].clone()
    keyword: Any = matrix[7] * 0.5 if name == "tensor" else name
    if inp.itp_mask is not None:
        skipped = ~inp.itp_mask[0]
        start[skipped] = matrix[inp.inp_tensor[0][skipped]]
    question = problem(model, layer_names("llama")[kind], inp=inp, count=2)
    question.baseline, question.embedding = start, model.get_input_embeddings()
    result = our_attribution(
        LayerIntegratedGradients, model, question.layers[0], inp, target=target, baselines=keyword
    )
    assert_close(result.token_attr, formula("integrated_gradients", inp, question))


def test_several_baselines_are_averaged() -> None:
    model = tiny_model("llama")
    method = LayerIntegratedGradients(model, "model.layers.1")
    wrapper = LLMGradientAttribution(method, tiny_tokenizer())
    options = {"target": target_ids(2), "n_steps": 3}
    single = [wrapper.attribute(prompt_input(), baselines=b, **options) for b in (5, "mean")]
    both = wrapper.attribute(prompt_input(), baselines=[5, "mean"], **options)
    assert_close(both.token_attr, (single[0].token_attr + single[1].token_attr) / 2)
    delta = (single[0].convergence_delta + single[1].convergence_delta) / 2
    assert torch.allclose(both.convergence_delta, delta, atol=1e-4)
    with pytest.raises(ValueError, match="empty list"):
        wrapper.attribute(prompt_input(), baselines=[], **options)


def text_ids(text: str, inp: Any) -> torch.Tensor:
    """The text's tokens at the positions of the prompt's tokens after its <s>."""
    tokens = tiny_tokenizer()(text, add_special_tokens=False).input_ids
    ids = inp.inp_tensor[0].clone()
    for position in range(1, len(ids)):
        ids[position] = tokens[(position - 1) % len(tokens)]
    return ids


@pytest.mark.parametrize("text", ["golf", "The capital of Japan is Tokyo and France is Paris"])
def test_a_baseline_of_text_is_its_tokens_in_order(text: str) -> None:
    model, inp, target = tiny_model("llama"), prompt_input(), target_ids(2)
    assert inp.inp_tensor[0, 0] == tiny_tokenizer().bos_token_id
    ids = text_ids(text, inp)
    layer = model.model.embed_tokens
    by_text, by_ids = (
        our_attribution(LayerIntegratedGradients, model, layer, inp, target=target, baselines=b)
        for b in (("text", text), ids)
    )
    torch.testing.assert_close(by_text.token_attr, by_ids.token_attr)
    assert not by_text.token_attr[:, 0].any()
    ablation = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    by_text, by_ids = (
        ablation.attribute(inp, target=target, baselines=b) for b in (("text", text), ids)
    )
    torch.testing.assert_close(by_text.token_attr, by_ids.token_attr)
    made_with_text = TextTokenInput(PROMPT, tiny_tokenizer(), baselines=("text", text))
    torch.testing.assert_close(
        ablation.attribute(made_with_text, target=target).token_attr, by_text.token_attr
    )


def test_a_text_without_tokens_is_no_baseline() -> None:
    with pytest.raises(ValueError, match="must have a token"):
        our_attribution(
            LayerIntegratedGradients,
            tiny_model("llama"),
            tiny_model("llama").model.embed_tokens,
            prompt_input(),
            target=target_ids(1),
            baselines=("text", ""),
        )


# --- common words --------------------------------------------------------------------------------


def words_in_place(spec: Any, form: str = "default") -> tuple[list[int], list[int]]:
    """The prompt's ids, and those where all of its features are absent."""
    inp: Any = with_baselines(prompt_input(form), spec, tiny_model("llama"))
    absent = inp.to_model_input(torch.zeros(1, inp.n_itp_features))
    return inp.inp_tensor[0].tolist(), absent[0].tolist()


def test_common_words_stand_for_tokens_and_special_tokens_stay() -> None:
    ids, words = words_in_place("common")
    known = {tiny_tokenizer().decode([i]).strip() for i in range(len(tiny_tokenizer()))}
    common = known & set(COMMON_WORDS.split())
    special = set(tiny_tokenizer().all_special_ids)
    assert ids[0] in special
    assert words[0] == ids[0]
    assert {tiny_tokenizer().decode([i]).strip() for i in words[1:]} <= common
    assert len(set(words[1:])) > 1
    assert words == words_in_place("common")[1] == words_in_place(("common", 0))[1]
    assert words != words_in_place(("common", 1))[1]


def test_common_words_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="seeds the words, got 'x'"):
        words_in_place(("common", "x"))
