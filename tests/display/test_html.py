"""The page of a result as text: its content, its safety and its size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from captum_llm_ext.display import ColorScale
from captum_llm_ext.results import LLMAttributionResult
from tests.results.cases import HOSTILE, TEXT, layered_result_of, random_values, result_of

MOST_BYTES = 300_000
WORDS = ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
VOID = {"meta", "input"}


class Page(HTMLParser):
    """Elements as (tag, attributes), the text of each `span` of the prompt and output, scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"inputs": [], "outputs": []}
        self.scripts: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes.get("class") or ""))
        if tag == "span" and self._parent() in self.texts:
            self.texts[self._parent()].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open and self._open[-1][0] == "script":
            self.scripts[-1] += data
        elif self._parent() in self.texts:
            self.texts[self._parent()][-1] += data

    def _parent(self) -> str:
        return self._open[-2][1] if len(self._open) > 1 else ""

    @property
    def shaded(self) -> list[dict[str, str | None]]:
        """Attributes of the spans of the prompt."""
        return [attributes for _, attributes in self.elements if "style" in attributes]

    @property
    def views(self) -> list[dict]:
        (data,) = [a["data-views"] for _, a in self.elements if "data-views" in a]
        return json.loads(str(data))


def stored_values(view: dict, n_input: int) -> np.ndarray:
    halves = np.frombuffer(base64.b64decode(view["values"]), dtype="<f2")
    return halves.astype(np.float64).reshape(-1, n_input) * view["unit"]


def test_every_token_is_shown_in_order():
    page = Page(result_of(WORDS, ["ĠParis", "."]).to_html())
    assert page.texts["inputs"] == ["The", " capital", " of", " France", " is"]
    assert page.texts["outputs"] == ["whole output", " Paris", "."]


def test_output_tokens_without_spaces_are_set_apart():
    kinds = [
        [span.get("class") for tag, span in Page(html).elements if tag == "span"][1]
        for html in (result_of(WORDS, outputs).to_html() for outputs in (["a", "b"], ["a", "Ġb"]))
    ]
    assert kinds == ["apart", None]


def test_without_scripts_the_prompt_has_the_colours_of_the_plots():
    result = result_of(WORDS, ["a"])
    scale = ColorScale.of(result.seq_attr.numpy())
    spans = Page(result.to_html()).shaded
    for span, expected, value in zip(
        spans, scale.colors(result.seq_attr.numpy()), result.seq_attr.tolist(), strict=True
    ):
        match = re.search(r"background:(#\w{6})", str(span["style"]))
        assert match
        np.testing.assert_allclose(to_rgb(match[1]), expected[:3], atol=1 / 255)
        assert span["title"] == scale.format(value)


def test_signs_and_outliers_show_without_colour():
    values = [100.0, 3.0, -2.0, 1.0, -0.001]
    result = LLMAttributionResult(
        input_tokens=WORDS, output_tokens=["a"], seq_attr=values, starts_prompt=True
    )
    html = result.to_html()
    classes = [span.get("class") for span in Page(html).shaded]
    assert classes == ["beyond", None, "negative", None, None]
    assert 'framed: beyond the colours, <span class="peak">100.00</span>' in html
    result.starts_prompt = False
    classes = [span.get("class") for span in Page(result.to_html()).shaded]
    assert classes == [None, None, "negative", None, None]


def test_the_values_are_there_to_three_digits_and_more():
    result = layered_result_of(3, 5, 2)
    views = Page(result.to_html()).views
    assert [view["name"] for view in views] == ["mean over 3 layers", *result.layer_names]
    for view, part in zip(views, [result, *result.values()], strict=True):
        rows = np.concatenate([part.seq_attr.numpy()[None], part.token_attr.numpy()])
        values = stored_values(view, 5)
        np.testing.assert_allclose(values, rows, rtol=6e-4, atol=1e-7 * np.abs(rows).max())
        assert view["sequence"]["limit"] == ColorScale.of(rows[0]).limit
        assert view["tokens"]["limit"] == ColorScale.of(rows[1:]).limit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-30, 3e38, 0.0])
def test_any_number_makes_a_page(value):
    values = torch.tensor([[value, 1.0, -1.0, value, 0.0]])
    result = LLMAttributionResult(
        input_tokens=WORDS, output_tokens=["a"], seq_attr=values[0], token_attr=values
    )
    stored = stored_values(Page(result.to_html()).views[0], 5)
    np.testing.assert_array_equal(np.isnan(stored[0]), values[0].isnan().numpy())
    np.testing.assert_array_equal(np.isinf(stored[0]), values[0].isinf().numpy())


def test_the_sequence_alone_makes_a_page():
    result = LLMAttributionResult(input_tokens=WORDS, output_tokens=["a"], seq_attr=range(5))
    assert stored_values(Page(result.to_html()).views[0], 5).shape == (1, 5)


def test_output_tokens_have_their_log_probability_and_delta_as_title():
    result = LLMAttributionResult(
        input_tokens=WORDS,
        output_tokens=["a", "b"],
        seq_attr=range(5),
        output_probs=[-0.25, -1.5],
        convergence_delta=torch.tensor([0.125]),
    )
    titles = [a.get("title") for tag, a in Page(result.to_html()).elements if tag == "span"]
    assert titles[:3] == [
        "convergence delta 0.125",
        "log probability -0.25",
        "log probability -1.5",
    ]


def elements(html: str) -> list[str]:
    return [tag for tag, _ in Page(html).elements]


def benign(tokens: list[str]) -> list[str]:
    return ["a"] * len(tokens)


@given(st.lists(TEXT | st.sampled_from(HOSTILE), min_size=1, max_size=8))
def test_tokens_never_become_markup(tokens):
    html = result_of(tokens, tokens).to_html()
    assert elements(html) == elements(result_of(benign(tokens), benign(tokens)).to_html())
    text = "".join(Page(html).texts["inputs"])
    assert all(character.isprintable() or character == "\n" for character in text)


def test_hostile_tokens_are_text_that_is_bounded():
    result = result_of(HOSTILE, HOSTILE)
    page = Page(result.to_html())
    assert page.texts["inputs"][0] == "<script>window.hacked = 1</script>"
    assert page.texts["inputs"] == page.texts["outputs"][1:]
    assert "{{script}}" in page.texts["inputs"]
    assert max(map(len, page.texts["inputs"])) < 1000
    assert "".join(page.texts["inputs"]).count("\n") < 10
    assert len(page.scripts) == 1
    assert len(result.to_html()) < 40_000


def test_layer_names_and_values_of_templates_are_text_too():
    result = layered_result_of(2, 3, 1)
    result.layer_names[0] = '"><script>window.hacked=1</script>' + "x" * 10_000
    page = Page(result.to_html())
    assert len(page.scripts) == 1
    assert page.views[1]["name"].startswith('"><script>')
    assert len(page.views[1]["name"]) <= 200


def test_nothing_is_fetched():
    html = result_of(WORDS, ["a"]).to_html()
    assert not re.search(r"https?:|//\w|url\(|@import|\bfetch\b|XMLHttpRequest|import\(", html)
    names = {name for _, attributes in Page(html).elements for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "id", "onclick", "onload"}


def test_only_the_script_of_the_page_may_run():
    page = Page(result_of(WORDS, ["a"]).to_html())
    (policy,) = [a["content"] for _, a in page.elements if "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


@pytest.mark.parametrize(
    ("n_layers", "n_input", "n_output", "n_views", "n_rows"),
    [
        (1, 5, 1, 2, 2),
        (1, 600, 50, 2, 51),
        (121, 17, 14, 122, 15),
        (30, 600, 50, 31, 51),  # without the output tokens of single layers
        (121, 600, 50, 1, 51),  # without single layers
        (1, 1500, 200, 1, 41),  # the first output tokens alone
        (1, 2500, 5, 2, 6),
    ],
)
def test_the_page_stays_small_and_says_what_is_left_out(
    n_layers, n_input, n_output, n_views, n_rows
):
    html = layered_result_of(n_layers, n_input, n_output).to_html()
    assert len(html.encode()) < MOST_BYTES
    page = Page(html)
    assert len(page.views) == n_views
    assert len(page.texts["inputs"]) == n_input
    assert len(page.texts["outputs"]) == 1 + n_output
    assert len(stored_values(page.views[0], n_input)) == n_rows
    everything = (
        n_views * n_rows == (1 + n_layers) * (1 + n_output)
        and len(stored_values(page.views[-1], n_input)) == n_rows
    )
    assert ("Too large for a page" in html) == (not everything)


def test_long_prompts_of_many_outputs_stay_small():
    result = result_of([f"Ġword{number}" for number in range(600)], ["Ġgolf"] * 52)
    assert len(result.to_html().encode()) < 150_000


def test_a_page_is_written_and_a_notebook_gets_the_fragment(tmp_path):
    result = result_of(WORDS, ["a"])
    html = result.to_html(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == html
    assert html.startswith("<!doctype html>")
    fragment = result.to_html(fragment=True)
    assert fragment == result._repr_html_()
    assert fragment in html
    assert elements(fragment)[0] == "div"


def test_words_instead_of_tokens():
    result = result_of(["Ġun", "believ", "able", "Ġnews"], ["a"])
    assert Page(result.to_html(merge="word")).texts["inputs"] == [" unbelievable", " news"]
    assert Page(result.to_html(merge=[(2, 4)])).texts["inputs"][-1] == "able news"


def luminance(color: np.ndarray) -> float:
    """Relative luminance, Web Content Accessibility Guidelines 2.2."""
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_text_can_be_read_on_every_colour():
    """The contrast is at least 4.5 to 1, as the guidelines require of ordinary text."""
    values = random_values(400).sort().values
    result = LLMAttributionResult(input_tokens=["a"] * 400, output_tokens=["b"], seq_attr=values)
    for span in Page(result.to_html()).shaded:
        match = re.fullmatch(r"background:(#\w{6});color:(\w+)", str(span["style"]))
        assert match
        darker, lighter = sorted(luminance(np.array(to_rgb(color))) for color in match.groups())
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5
