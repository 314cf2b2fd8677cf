"""The page of a result in headless Chromium: what a person sees and does there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captum_llm_ext.display import ColorScale
from captum_llm_ext.results import LLMAttributionResult
from tests.results.cases import HOSTILE, layered_result_of, random_values, result_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

WORDS = ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
INPUTS, OUTPUTS = ".inputs > span", ".outputs > span"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page from a file, with everything that it complained of or asked for."""

    def __init__(self, browser: Any, file: Path, html: str, **context: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(**({"viewport": {"width": 900, "height": 700}} | context))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        file.write_text(html, encoding="utf-8")
        self.page.goto(file.as_uri())

    def all(self, selector: str, what: str) -> Any:
        """A value of JavaScript of each element `e`."""
        return self.page.eval_on_selector_all(selector, f"all => all.map(e => {what})")

    def colors(self, selector: str = INPUTS) -> np.ndarray:
        found = self.all(selector, "getComputedStyle(e).backgroundColor")
        return np.array([[int(n) for n in re.findall(r"\d+", color)[:3]] for color in found]) / 255

    def numbers(self) -> list[float]:
        return [float(title) for title in self.all(INPUTS, "e.title")]

    def texts(self, selector: str) -> list[str]:
        return self.all(selector, "e.textContent")

    def output(self, place: int) -> Any:
        return self.page.locator(OUTPUTS).nth(place)

    def readout(self) -> str:
        return self.page.inner_text(".readout")


@pytest.fixture
def opened(browser, tmp_path):
    pages: list[Opened] = []

    def opens(html: str, **context: Any) -> Opened:
        pages.append(Opened(browser, tmp_path / f"{len(pages)}.html", html, **context))
        return pages[-1]

    yield opens
    for one in pages:
        one.page.close()
        assert not one.said
        assert len(one.asked) == 1  # the page itself


def assert_shows(page: Opened, row: torch.Tensor, of: torch.Tensor | None = None) -> None:
    """The colours of matplotlib for a row on the scale of several, and its numbers."""
    scale = ColorScale.of((row if of is None else of).numpy())
    colors = scale.colors(row.numpy())[:, :3]
    np.testing.assert_allclose(page.colors(), colors, atol=0.035)  # the page has 65 levels
    np.testing.assert_allclose(page.numbers(), row, rtol=1e-3, atol=6e-3 * scale.limit)


@pytest.mark.parametrize("number", [5, 600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_token_is_seen(opened, number, scheme):
    result = result_of((WORDS * 120)[:number], ["ĠParis"] * max(1, number // 12))
    page = opened(result.to_html(), color_scheme=scheme)
    sizes = page.all(INPUTS, "e.getBoundingClientRect().width * e.getBoundingClientRect().height")
    assert len(sizes) == number
    assert min(sizes) > 20
    assert page.texts(INPUTS)[:5] == ["The", " capital", " of", " France", " is"]
    assert_shows(page, result.seq_attr)
    assert not page.page.is_visible(".layers")


def test_pointing_at_an_output_token_shows_its_row(opened):
    result = result_of(WORDS, ["ĠParis", "."])
    page = opened(result.to_html())
    for place in (1, 2):
        page.output(place).hover()
        assert_shows(page, result.token_attr[place - 1], result.token_attr)
    assert page.readout() == "Attribution to \u2068.\u2069"
    page.page.mouse.move(800, 690)
    assert_shows(page, result.seq_attr)


def test_a_click_keeps_the_row_and_a_second_one_lets_it_go(opened):
    result = result_of(WORDS, ["ĠParis", "."])
    page = opened(result.to_html())
    page.output(2).click()
    page.output(1).hover()
    assert_shows(page, result.token_attr[0], result.token_attr)
    page.page.mouse.move(800, 690)
    assert_shows(page, result.token_attr[1], result.token_attr)
    assert page.all(OUTPUTS, "e.ariaPressed") == ["false", "false", "true"]
    page.output(2).click()
    page.page.mouse.move(800, 690)
    assert_shows(page, result.seq_attr)


def test_the_keyboard_does_what_the_pointer_does(opened):
    result = result_of(WORDS, ["ĠParis", "."])
    page = opened(result.to_html())
    for _ in range(2):
        page.page.keyboard.press("Tab")
    assert_shows(page, result.token_attr[0], result.token_attr)
    page.page.keyboard.press("Enter")
    page.page.keyboard.press("Tab")
    assert_shows(page, result.token_attr[1], result.token_attr)
    page.page.keyboard.press("Tab")
    assert_shows(page, result.token_attr[0], result.token_attr)


def test_pointing_at_an_input_token_tells_its_value(opened):
    page = opened(result_of(WORDS, ["ĠParis"]).to_html())
    page.page.locator(INPUTS).nth(3).hover()
    told = page.all(INPUTS, "e.title")[3]
    assert page.readout() == f"Attribution to the whole output, of \u2068France\u2069: {told}"


def test_the_slider_shows_each_layer_on_a_scale_of_its_own(opened):
    result = layered_result_of(4, 6, 3)
    page = opened(result.to_html())
    assert page.page.inner_text(".layers output") == "mean over 4 layers"
    slider = page.page.locator(".layers input")
    for name, layer in result.items():
        slider.press("ArrowRight")
        assert page.page.inner_text(".layers output") == name
        assert_shows(page, layer.seq_attr)
        page.output(2).hover()
        assert_shows(page, layer.token_attr[1], layer.token_attr)
        slider.hover()
    slider.press("Home")
    assert_shows(page, result.seq_attr)


def test_rows_that_were_left_out_show_the_whole_output(opened):
    result = layered_result_of(30, 600, 50)
    page = opened(result.to_html())
    page.page.locator(".layers input").press("End")
    page.output(3).hover()
    assert_shows(page, result[-1].seq_attr)
    assert page.readout() == "Attribution to the whole output"
    assert "left out" in page.page.inner_text(".note")


def test_scripts_in_tokens_do_not_run(opened):
    page = opened(result_of(HOSTILE, HOSTILE).to_html())
    for place in range(len(HOSTILE)):
        page.output(place + 1).dispatch_event("pointerenter")
    assert page.page.evaluate("window.hacked") is None
    assert page.page.locator("img").count() == 0
    assert page.texts(INPUTS)[0] == HOSTILE[0]


@pytest.mark.parametrize("width", [360, 900])
def test_long_prompts_and_tokens_wrap(opened, width):
    result = result_of([*WORDS * 100, *HOSTILE], [*WORDS, *HOSTILE])
    page = opened(result.to_html(), viewport={"width": width, "height": 700})
    assert page.page.evaluate("document.scrollingElement.scrollWidth") <= width
    tops = page.all(INPUTS, "e.getBoundingClientRect().top")
    assert len(set(map(round, tops))) > 5


def test_text_from_right_to_left_runs_so(opened):
    page = opened(result_of(["مر", "حبا", " بك", "Ċ", "left", "Ġright"], ["مر", "حبا"]).to_html())
    left = page.all(INPUTS, "e.getBoundingClientRect().left")
    assert left[0] > left[1] > left[2]
    assert left[4] < left[5]
    assert left[0] > 400 > left[4]  # each paragraph begins at its own side
    outputs = page.all(OUTPUTS, "e.getBoundingClientRect().left")
    assert outputs[1] > outputs[2]


def test_an_emoji_of_several_tokens_and_newlines(opened):
    page = opened(result_of(["ĠðŁ", "ĺ", "Ģ", "Ċ", "b"], ["c"]).to_html())
    assert page.texts(INPUTS) == [" 😀", "⋯", "⋯", "↵\n", "b"]
    tops = page.all(INPUTS, "e.getBoundingClientRect().top")
    assert tops[4] > tops[0]


def test_signs_are_seen_without_colour(opened):
    values = torch.tensor([100.0, 3.0, -2.0, 1.0, -1.5])
    result = LLMAttributionResult(input_tokens=WORDS, output_tokens=["a"], seq_attr=values)
    page = opened(result.to_html())
    lines = page.all(INPUTS, "getComputedStyle(e).textDecorationLine")
    assert [line == "underline" for line in lines] == (values < 0).tolist()
    assert page.all(INPUTS, "getComputedStyle(e).outlineStyle")[0] == "solid"
    assert page.page.is_visible("text=negative")
    assert page.page.is_visible("text=beyond the colours")


def test_values_of_one_sign_have_no_legend_for_the_other(opened):
    result = LLMAttributionResult(input_tokens=WORDS, output_tokens=["a"], seq_attr=[1, 2, 3, 4, 5])
    page = opened(result.to_html())
    assert not page.page.is_visible("text=negative")
    assert page.page.inner_text(".low") == "0"


def test_without_scripts_the_whole_output_is_shown(opened):
    result = layered_result_of(3, 5, 2)
    page = opened(result.to_html(), java_script_enabled=False)
    assert page.page.locator(INPUTS).count() == 5
    assert not page.page.is_visible(".layers")
    style = page.page.locator(INPUTS).nth(2).get_attribute("style")
    assert style.startswith("background:#")


def notebook(*fragments: str) -> str:
    """As a notebook does: markup set as text, and its scripts then made anew."""
    outputs = "".join(f"<template>{fragment}</template><div></div>" for fragment in fragments)
    script = """
        for (const output of document.querySelectorAll("template")) {
            const place = output.nextElementSibling;
            place.innerHTML = output.innerHTML;
            for (const old of place.querySelectorAll("script")) {
                const script = document.createElement("script");
                script.textContent = old.textContent;
                old.replaceWith(script);
            }
        }"""
    return f"<!doctype html><meta charset=utf-8><body>{outputs}<script>{script}</script></body>"


def test_several_results_in_a_notebook_do_not_disturb_one_another(opened):
    first, second = result_of(WORDS, ["a", "b"]), layered_result_of(2, 5, 2)
    page = opened(notebook(first._repr_html_(), second._repr_html_(), first._repr_html_()))
    before = page.colors()
    page.output(2).hover()
    after = page.colors()
    assert np.abs(after - before)[:5].max() > 0.05
    np.testing.assert_array_equal(after[5:], before[5:])
    page.page.locator(".layers:visible input").press("ArrowRight")
    third = page.colors()
    assert np.abs(third - after)[5:10].max() > 0.05
    np.testing.assert_array_equal(third[10:], before[10:])


def test_a_page_leaves_no_globals(opened):
    names = "Object.getOwnPropertyNames(window)"
    page = opened(result_of(WORDS, ["a"]).to_html())
    empty = opened("<!doctype html><meta charset=utf-8>")
    assert set(page.page.evaluate(names)) == set(empty.page.evaluate(names))


def test_colours_differ_for_values_that_differ(opened):
    values = random_values(200).sort().values
    result = LLMAttributionResult(input_tokens=["a"] * 200, output_tokens=["b"], seq_attr=values)
    page = opened(result.to_html())
    assert len(np.unique(page.colors(), axis=0)) > 30
