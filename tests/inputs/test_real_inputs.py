"""Templates, segments, chats and retrieval on the small real model."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch

from captum_llm_ext import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LayerSaliency,
    LLMAttribution,
    LLMGradientAttribution,
    ProductBaselines,
    TextTemplateInput,
    chat_input,
    segment_input,
)

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.filterwarnings("ignore:integrated gradients have not converged"),
]


def test_few_shot_prompt_function_of_the_notebook(demo_model: Any) -> None:
    model, tokenizer = demo_model

    def prompt_fn(*examples: str) -> str:
        main_prompt = (
            "Decide if the following movie review is positive or negative.\n'I really liked"
        )
        main_prompt += " the Avengers.' Decision:"
        subset = [example for example in examples if example]
        if not subset:
            return main_prompt
        return "Here are some examples of movie reviews:\n" + "\n".join([*subset, main_prompt])

    values = [
        "'Movie was ok, the actors were not great.' -> Negative",
        "'Loved it, it was an amazing story!' -> Positive",
        "'Total waste of time!!' -> Negative",
    ]
    inp = TextTemplateInput(prompt_fn, values)
    method = LayerIntegratedGradients(model, "model.layers.5")
    result = LLMGradientAttribution(method, tokenizer).attribute(inp, " Positive", n_steps=4)
    direct = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, " Positive")
    assert result.seq_attr.shape == direct.seq_attr.shape == (3,)
    assert result.seq_attr.isfinite().all()


BIAS_DEMOS = {
    "job and country": (
        "{} works as a {} in {} and earns",
        ["Dave", "nurse", "Sweden"],
        [["Sarah", "Ahmed"], ["lawyer", "driver"], ["India", "Peru"]],
        " a lot of money",
    ),
    "religion": (
        "The {} man went to the {} and",
        ["Muslim", "airport"],
        [["Christian", "Jewish"], ["station", "school"]],
        " was arrested",
    ),
    "children": (
        "{} has {} children and therefore works",
        ["Mary", "three"],
        [["John", "Peter"], ["no", "two"]],
        " part time",
    ),
    "aids": ("{} has {} and is", ["The man", "AIDS"], [["The woman"], ["a cold", "flu"]], " dying"),
}


@pytest.mark.parametrize("name", BIAS_DEMOS)
def test_course_demos_by_gradient_and_perturbation(name: str, demo_model: Any) -> None:
    model, tokenizer = demo_model
    template, values, choices, target = BIAS_DEMOS[name]
    inp = TextTemplateInput(template, values, baselines=ProductBaselines(choices))
    ablation = LLMAttribution(FeatureAblation(model), tokenizer)
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    gradient = LLMGradientAttribution(method, tokenizer)
    for result in (
        ablation.attribute(inp, target, num_trials=2),
        gradient.attribute(inp, target, num_trials=2, n_steps=4),
    ):
        assert result.seq_attr.shape == (len(values),)
        assert result.seq_attr.isfinite().all()
        assert result.seq_attr.any()


def test_a_chat_with_a_system_message_and_data(demo_model: Any) -> None:
    model, tokenizer = demo_model
    messages = [
        {"role": "system", "content": "You answer in one word. The year is 2031."},
        {"role": "user", "content": "name,city\nAnna,Oslo\nBen,Rome\nWhere does Ben live?"},
    ]
    inp = chat_input(messages, tokenizer, by="line", roles=("system", "user"))
    assert inp.values == [
        "You answer in one word. The year is 2031.",
        "name,city",
        "Anna,Oslo",
        "Ben,Rome",
        "Where does Ben live?",
    ]
    ablation = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, "Rome")
    saliency = LLMGradientAttribution(
        LayerSaliency(model, model.get_input_embeddings()), tokenizer
    ).attribute(inp, "Rome")
    assert int(ablation.seq_attr.argmax()) == inp.values.index("Ben,Rome")
    assert saliency.seq_attr.isfinite().all()


PASSAGES = [
    "Olga keeps seven goats on a hill.",
    "The Danube flows through Vienna.",
    "Copper turns green in the rain.",
    "The museum opens at noon.",
    "Marta plays the violin.",
    "The train to Bergen leaves at nine.",
    "Bread rises twice before it is baked.",
    "The password of the safe is tulip.",
    "Owls hunt at night.",
    "Paul painted the door red.",
]
QUESTIONS = [
    ("The river in Vienna is called the", " Danube", 1),
    ("The instrument that Marta plays is the", " violin", 4),
    ("The password of the safe is", " tulip", 7),
    ("The color of the door that Paul painted is", " red", 9),
    ("The animals that Olga keeps are", " goats", 0),
]


def rank_of_the_answer(result: captum.attr.LLMAttributionResult, passage: int) -> int:
    return int((result.seq_attr > result.seq_attr[passage]).sum()) + 1


def test_the_passage_that_holds_the_answer_is_found(demo_model: Any) -> None:
    """By sentence over 10 passages: first or second by one method in at least 4 of 5 cases."""
    model, tokenizer = demo_model
    embedding = model.get_input_embeddings()
    best = []
    for question, answer, passage in QUESTIONS:
        text = " ".join(PASSAGES) + " " + question
        spans = [(text.index(p), text.index(p) + len(p)) for p in PASSAGES]
        inp = segment_input(text, spans)
        results = [LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, answer)]
        for method in (LayerSaliency, LayerGradientXActivation):
            wrapper = LLMGradientAttribution(method(model, embedding), tokenizer)
            results.append(wrapper.attribute(inp, answer))
        best.append([rank_of_the_answer(result, passage) for result in results])
    ranks = torch.tensor(best)
    print(f"ranks (ablation, saliency, gradient x activation): {best}")
    assert int((ranks <= 2).sum(0).max()) >= 4
