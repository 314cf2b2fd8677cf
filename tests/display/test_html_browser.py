"""The page of a result in headless Chromium, as a person sees and uses it."""

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


class OpenPage:
    """A page from a file, with its messages and requests."""

    def __init__(self, browser: Any, file: Path, html: str, **context: Any) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(**({"viewport": {"width": 900, "height": 700}} | context))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: self.messages.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        file.write_text(html, encoding="utf-8")
        self.page.goto(file.as_uri())

    def all(self, selector: str, expression: str) -> Any:
        """A JavaScript expression of each element `e`."""
        return self.page.eval_on_selector_all(selector, f"all => all.map(e => {expression})")

    def colors(self, selector: str = INPUTS) -> np.ndarray:
        colors = self.all(selector, "getComputedStyle(e).backgroundColor")
        return np.array([[int(n) for n in re.findall(r"\d+", c)[:3]] for c in colors]) / 255

    def numbers(self) -> list[float]:
        return [float(title) for title in self.all(INPUTS, "e.title")]

    def texts(self, selector: str) -> list[str]:
        return self.all(selector, "e.textContent")

    def output(self, index: int) -> Any:
        return self.page.locator(OUTPUTS).nth(index)

    def readout(self) -> str:
        return self.page.inner_text(".readout")


@pytest.fixture
def open_html(browser, tmp_path):
    pages: list[OpenPage] = []

    def open_page(html: str, **context: Any) -> OpenPage:
        pages.append(OpenPage(browser, tmp_path / f"{len(pages)}.html", html, **context))
        return pages[-1]

    yield open_page
    for page in pages:
        page.page.close()
        assert not page.messages
        assert len(page.requests) == 1  # the page itself


def assert_shows(page: OpenPage, row: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """The prompt has the numbers of a row, and matplotlib's colours on the scale of the rows."""
    scale = ColorScale.of((row if rows is None else rows).numpy())
    colors = scale.colors(row.numpy())[:, :3]
    np.testing.assert_allclose(page.colors(), colors, atol=0.035)  # the page has 65 levels
    np.testing.assert_allclose(page.numbers(), row, rtol=1e-3, atol=6e-3 * scale.limit)


def test_a_short_prompt_is_shaded_and_tells_its_values(open_html):
    result = LLMAttributionResult(
        input_tokens=WORDS, output_tokens=["ĠParis"], seq_attr=[80.8, 61.4, 17.6, 26.4, 10.7]
    )
    page = open_html(result.to_html())
    assert page.texts(INPUTS) == ["The", " capital", " of", " France", " is"]
    assert page.numbers() == [80.8, 61.4, 17.6, 26.4, 10.7]
    assert page.colors()[0].sum() < page.colors()[4].sum()  # the largest value is the darkest


@pytest.mark.parametrize("number", [5, 600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_token_is_seen(open_html, number, scheme):
    result = result_of((WORDS * 120)[:number], ["ĠParis"] * max(1, number // 12))
    page = open_html(result.to_html(), color_scheme=scheme)
    sizes = page.all(INPUTS, "e.getBoundingClientRect().width * e.getBoundingClientRect().height")
    assert len(sizes) == number
    assert min(sizes) > 20
    assert page.texts(INPUTS)[:5] == ["The", " capital", " of", " France", " is"]
    assert_shows(page, result.seq_attr)
    assert not page.page.is_visible(".layers")


def test_pointing_at_an_output_token_shows_its_row(open_html):
    result = result_of(WORDS, ["ĠParis", "."])
    page = open_html(result.to_html())
    for number, row in enumerate(result.token_attr, start=1):
        page.output(number).hover()
        assert_shows(page, row, result.token_attr)
    assert page.readout() == "Attribution to \u2068.\u2069"
    page.page.mouse.move(800, 690)
    assert_shows(page, result.seq_attr)


def test_a_click_keeps_the_row_and_a_second_one_lets_it_go(open_html):
    result = result_of(WORDS, ["ĠParis", "."])
    page = open_html(result.to_html())
    page.output(2).click()
    page.output(1).hover()
    assert_shows(page, result.token_attr[0], result.token_attr)
    page.page.mouse.move(800, 690)
    assert_shows(page, result.token_attr[1], result.token_attr)
    assert page.all(OUTPUTS, "e.ariaPressed") == ["false", "false", "true"]
    page.output(2).click()
    page.page.mouse.move(800, 690)
    assert_shows(page, result.seq_attr)


def test_the_keyboard_does_what_the_pointer_does(open_html):
    result = result_of(WORDS, ["ĠParis", "."])
    page = open_html(result.to_html())
    for _ in range(2):
        page.page.keyboard.press("Tab")
    assert_shows(page, result.token_attr[0], result.token_attr)
    page.page.keyboard.press("Enter")
    page.page.keyboard.press("Tab")
    assert_shows(page, result.token_attr[1], result.token_attr)
    page.page.keyboard.press("Tab")
    assert_shows(page, result.token_attr[0], result.token_attr)


def test_pointing_at_an_input_token_tells_its_value(open_html):
    page = open_html(result_of(WORDS, ["ĠParis"]).to_html())
    page.page.locator(INPUTS).nth(3).hover()
    value = page.all(INPUTS, "e.title")[3]
    assert page.readout() == f"Attribution to the whole output, of \u2068France\u2069: {value}"


def test_the_slider_shows_each_layer_on_a_scale_of_its_own(open_html):
    result = layered_result_of(4, 6, 3)
    page = open_html(result.to_html())
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


def test_rows_that_were_left_out_show_the_whole_output(open_html):
    result = layered_result_of(30, 600, 50)
    page = open_html(result.to_html())
    page.page.locator(".layers input").press("End")
    page.output(3).hover()
    assert_shows(page, result[-1].seq_attr)
    assert page.readout() == "Attribution to the whole output"
    assert "left out" in page.page.inner_text(".note")


def test_scripts_in_tokens_do_not_run(open_html):
    page = open_html(result_of(HOSTILE, HOSTILE).to_html())
    for number in range(1, 1 + len(HOSTILE)):
        page.output(number).dispatch_event("pointerenter")
    assert page.page.evaluate("window.hacked") is None
    assert page.page.locator("img").count() == 0
    assert page.texts(INPUTS)[0] == HOSTILE[0]


@pytest.mark.parametrize("width", [360, 900])
def test_long_prompts_and_tokens_wrap(open_html, width):
    result = result_of([*WORDS * 100, *HOSTILE], [*WORDS, *HOSTILE])
    page = open_html(result.to_html(), viewport={"width": width, "height": 700})
    assert page.page.evaluate("document.scrollingElement.scrollWidth") <= width
    tops = page.all(INPUTS, "e.getBoundingClientRect().top")
    assert len(set(map(round, tops))) > 5


def test_text_from_right_to_left_runs_so(open_html):
    page = open_html(
        result_of(["مر", "حبا", " بك", "Ċ", "left", "Ġright"], ["مر", "حبا"]).to_html()
    )
    left = page.all(INPUTS, "e.getBoundingClientRect().left")
    assert left[0] > left[1] > left[2]
    assert left[4] < left[5]
    assert left[0] > 400 > left[4]  # each paragraph begins at the side of its script
    outputs = page.all(OUTPUTS, "e.getBoundingClientRect().left")
    assert outputs[1] > outputs[2]


def test_an_emoji_of_several_tokens_and_newlines(open_html):
    page = open_html(result_of(["ĠðŁ", "ĺ", "Ģ", "Ċ", "b"], ["c"]).to_html())
    assert page.texts(INPUTS) == [" 😀", "⋯", "⋯", "↵\n", "b"]
    tops = page.all(INPUTS, "e.getBoundingClientRect().top")
    assert tops[4] > tops[0]


def test_signs_are_seen_without_colour(open_html):
    values = torch.tensor([100.0, 3.0, -2.0, 1.0, -1.5])
    result = LLMAttributionResult(
        input_tokens=WORDS, output_tokens=["a"], seq_attr=values, starts_prompt=True
    )
    page = open_html(result.to_html())
    lines = page.all(INPUTS, "getComputedStyle(e).textDecorationLine")
    assert [line == "underline" for line in lines] == (values < 0).tolist()
    assert page.all(INPUTS, "getComputedStyle(e).outlineStyle")[0] == "solid"
    assert page.page.is_visible("text=negative")
    assert page.page.is_visible("text=beyond the colours")
    assert page.page.inner_text(".peak") == "100.00"


def test_values_of_one_sign_have_no_legend_for_the_other(open_html):
    result = LLMAttributionResult(input_tokens=WORDS, output_tokens=["a"], seq_attr=[1, 2, 3, 4, 5])
    page = open_html(result.to_html())
    assert not page.page.is_visible("text=negative")
    assert page.page.inner_text(".low") == "0"


def test_without_scripts_the_whole_output_is_shown(open_html):
    result = layered_result_of(3, 5, 2)
    page = open_html(result.to_html(), java_script_enabled=False)
    assert page.page.locator(INPUTS).count() == 5
    assert not page.page.is_visible(".layers")
    style = page.page.locator(INPUTS).nth(2).get_attribute("style")
    assert style.startswith("background:#")


def notebook(*fragments: str) -> str:
    """Inserts fragments as a notebook does: as inner HTML, with the scripts created again."""
    outputs = "".join(f"<template>{fragment}</template><div></div>" for fragment in fragments)
    script = """
        for (const output of document.querySelectorAll("template")) {
            const cell = output.nextElementSibling;
            cell.innerHTML = output.innerHTML;
            for (const old of cell.querySelectorAll("script")) {
                const script = document.createElement("script");
                script.textContent = old.textContent;
                old.replaceWith(script);
            }
        }"""
    return f"<!doctype html><meta charset=utf-8><body>{outputs}<script>{script}</script></body>"


def test_several_results_in_a_notebook_do_not_disturb_one_another(open_html):
    first, second = result_of(WORDS, ["a", "b"]), layered_result_of(2, 5, 2)
    page = open_html(notebook(first._repr_html_(), second._repr_html_(), first._repr_html_()))
    before = page.colors()
    page.output(2).hover()
    after = page.colors()
    assert np.abs(after - before)[:5].max() > 0.05
    np.testing.assert_array_equal(after[5:], before[5:])
    page.page.locator(".layers:visible input").press("ArrowRight")
    third = page.colors()
    assert np.abs(third - after)[5:10].max() > 0.05
    np.testing.assert_array_equal(third[10:], before[10:])


def test_a_page_leaves_no_globals(open_html):
    names = "Object.getOwnPropertyNames(window)"
    page = open_html(result_of(WORDS, ["a"]).to_html())
    empty = open_html("<!doctype html><meta charset=utf-8>")
    assert set(page.page.evaluate(names)) == set(empty.page.evaluate(names))


def test_colours_differ_for_values_that_differ(open_html):
    values = random_values(200).sort().values
    result = LLMAttributionResult(input_tokens=["a"] * 200, output_tokens=["b"], seq_attr=values)
    page = open_html(result.to_html())
    assert len(np.unique(page.colors(), axis=0)) > 30
