"""A target without the space before it: a hint, and a label of its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from captum_llm_ext import chat_input, explain, segment_input
from captum_llm_ext.inputs.targets import torn_word, warn_of_torn_word
from captum_llm_ext.results import LLMAttributionResult
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import tiny_model, tiny_tokenizer

PROMPT = "Dave lives in Palm Coast and"


def hints(prompt: Any, target: Any, method: str = "saliency", **options: Any) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        explain(tiny_model("llama"), tiny_tokenizer(), prompt, target, method, **options)
    return [w for w in caught if "no space stands" in str(w.message)]


def test_a_missing_space_is_hinted_at_on_the_callers_line() -> None:
    (hint,) = hints(PROMPT, "golf")
    assert "end of 'andgolf'" in str(hint.message)
    assert "begin it with a space, ' golf'" in str(hint.message)
    assert hint.filename == __file__
    assert not hints(PROMPT, " golf")


@pytest.mark.parametrize("method", ["ablation", "attention", "ig"])
def test_every_method_hints_once(method: str) -> None:
    options = {"n_steps": 2} if method == "ig" else {}
    with warnings.catch_warnings():
        assert len(hints(PROMPT, "golf", method, **options)) == 1


@pytest.mark.parametrize(
    ("prompt", "target", "expected"),
    [
        ("The capital is", "Paris", ("is", "Paris")),
        ("Le mot est", "école, oui", ("est", "école,")),
        ("The number is", "42", ("is", "42")),
        ("Room 4", "b", ("4", "b")),
        ("The capital is", " Paris", None),
        ("The capital is ", "Paris", None),
        ("The capital is:", "Paris", None),
        ("The capital is", "'Paris'", None),
        ("The capital is\n", "Paris", None),
        ("It isn", "'t", None),
        ("The capital is", "東京", None),
        ("日本の首都は", "Tokyo", None),
        ("日本の首", "都", None),
        ("เมืองหลวง", "คือ", None),
        ("수도는", "서울", ("수도는", "서울")),  # words in Hangul have spaces
    ],
)
def test_words_are_torn_between_letters_alone(prompt: str, target: str, expected: Any) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    rest = torch.tensor(tokenizer.encode(target, add_special_tokens=False))
    assert torn_word(ids, rest, tokenizer) == expected


class Digits:
    """One token for each character, or for pairs of digits from the left."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, pairs: bool) -> None:
        self.pairs = pairs

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        step = 2 if self.pairs else 1
        return [int("1" + text[i : i + step]) for i in range(0, len(text), step)]

    def decode(self, ids: list[int]) -> str:
        return "".join(str(int(i))[1:] for i in ids)


@pytest.mark.parametrize(("pairs", "warns"), [(False, False), (True, True)])
def test_digits_go_on_with_a_number_that_is_cut_there(pairs: bool, warns: bool) -> None:
    tokenizer = Digits(pairs)
    prompt = torch.tensor([tokenizer.encode("198")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_torn_word(prompt, "45", tokenizer)
    assert bool(caught) == warns


def test_contrasts_are_hinted_at_too() -> None:
    (hint,) = hints(PROMPT, " golf", contrast_target="a")
    assert "the contrast target" in str(hint.message)


def test_targets_of_ids_and_generated_ones_are_taken_as_they_are() -> None:
    ids = tiny_tokenizer().encode("golf", add_special_tokens=False)
    assert not hints(PROMPT, torch.tensor(ids))
    assert not hints(PROMPT, None, gen_args={"max_new_tokens": 2, "do_sample": False})


def test_chats_and_prompts_that_end_a_line_are_not_hinted_at() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    chat = chat_input([{"role": "user", "content": PROMPT}], tokenizer)
    assert not hints(chat, "golf")
    assert not hints(segment_input(f"{PROMPT}:\n", by="word"), "golf")
    assert hints(segment_input(PROMPT, by="word"), "golf")


def test_translations_begin_a_text_of_their_own() -> None:
    model = tiny_seq2seq("t5")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no space stands")
        explain(model, tiny_tokenizer(), PROMPT, "golf", "ablation")


def labels(target: str, method: str = "saliency") -> LLMAttributionResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, target, method)


@pytest.mark.parametrize("method", ["saliency", "ablation", "attention"])
def test_tables_and_plots_show_the_missing_space(method: str) -> None:
    apart, joined = labels(" golf", method), labels("golf", method)
    assert [r.output_tokens[0] for r in (apart, joined)] == ["golf", "go"]  # as Captum has them
    assert apart.output_labels == [" golf"]
    assert joined.output_labels == ["‿go", "lf"]
    assert "‿go" in joined.to_text(color=False)
    assert "‿go" in joined.to_html()
    assert joined.plot_token_attr()[1].get_yticklabels()[0].get_text() == "‿go"
    assert LLMAttributionResult.from_json(joined.to_json()).output_labels == joined.output_labels
