"""What a method knows of its features: names, borders in the text, masks, a generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_llm_ext import TextTemplateInput, segment_input
from captum_llm_ext.perturbations.game import Border, Game
from tests.perturbations.cases import image_input, token_input

TOKEN, WORD, SENTENCE, PARAGRAPH = Border


def game_of(inp: Any) -> Game:
    return Game.of_input(inp, torch.arange(inp.n_itp_features))


def test_words_of_a_text() -> None:
    game = game_of(segment_input("It rains.\n\nStay in", by="word"))
    assert game.n_features == 4
    assert game.names == ["It", "rains.", "Stay", "in"]
    assert game.borders == [WORD, PARAGRAPH, WORD]
    assert game.whole().tolist() == [[1, 1, 1, 1]]
    assert game.leave_one_out()[1].tolist() == [1, 0, 1, 1]


BORDERS: dict[str, tuple[Any, list[Border]]] = {
    "sentences": (segment_input("It rains. Stay! Now?\nNo"), [SENTENCE] * 3),
    "a mark in quotes": (
        segment_input('He said "No." So we go', "word"),
        [WORD] * 2 + [SENTENCE] + [WORD] * 2,
    ),
    "a number": (segment_input("at 3.5 or 4", "word"), [WORD] * 3),
    "paragraphs": (segment_input("One.\n \nTwo.\n\n\nThree", "paragraph"), [PARAGRAPH] * 2),
    "lines": (segment_input("a b\nc", "line"), [SENTENCE]),
    "tokens": (token_input("Dave lives."), [TOKEN, WORD, TOKEN, TOKEN]),
    "tokens after a sentence": (token_input("golf. Palm"), [TOKEN, TOKEN, TOKEN, SENTENCE]),
    "fixed text": (
        TextTemplateInput("{} and {}. Then {}\n\n{}", ["a", "b", "c", "d"]),
        [WORD, SENTENCE, PARAGRAPH],
    ),
    "side by side": (TextTemplateInput("{}{}", ["un", "done"]), [WORD]),
    "used twice": (TextTemplateInput(lambda a, b: f"{b}. {a} {a}", ["a", "b"]), [WORD]),
    "one": (TextTemplateInput("{}", ["a"]), []),
    "a picture": (image_input(), [TOKEN, TOKEN]),
}


@pytest.mark.parametrize("name", BORDERS)
def test_borders(name: str) -> None:
    inp, expected = BORDERS[name]
    game = game_of(inp)
    assert [Border(border).name for border in game.borders] == [one.name for one in expected]
    assert len(game.names) == inp.n_itp_features == len(expected) + 1


def test_features_of_several_values_begin_at_their_first() -> None:
    inp = TextTemplateInput("{} a. {} b {}", ["x", "y", "z"], mask=[4, 2, 4])
    game = game_of(inp)
    assert game.names == ["y", "x z"]  # the mask's ids in order
    assert game.borders == [PARAGRAPH]  # "x" begins the text
    grouped = Game.of_input(
        TextTemplateInput("{} {}. {}", ["x", "y", "z"]), torch.tensor([0, 1, 1])
    )
    assert (grouped.names, grouped.borders) == (["x", "y z"], [WORD])


def test_a_generator_for_each_game() -> None:
    torch.manual_seed(0)
    draws = [torch.rand(3, generator=Game(["a"], []).generator) for _ in range(2)]
    assert not torch.equal(*draws)
    torch.manual_seed(0)
    game = Game(["a"], [], guide=torch.ones(1))
    assert game.generator is game.generator
    assert torch.equal(torch.rand(3, generator=game.generator), draws[0])
