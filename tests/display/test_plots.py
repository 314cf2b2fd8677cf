"""Colour scales, plots and terminal tables, from plain arrays."""

from __future__ import annotations

import doctest
import importlib
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from captum_llm_ext.display import (
    AttributionText,
    ColorScale,
    draw_bars,
    draw_heat_map,
    draw_measures,
    draw_shaded_text,
    relative_to_rows,
    render_text,
)
from captum_llm_ext.inputs.token_text import readable_token

WORDS = ["The", "Ġcapital", "Ġof", "ĠFrance", "$", "x_1", "$", "Ċ", "ĠcafÃ©", "[/bold]", "Ġ"]
UNPARSEABLE = ["$\\frac{$", "$", "a_$^", "\\", "%", "{"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def tokens(number: int) -> list[str]:
    return [WORDS[i % len(WORDS)] for i in range(number)]


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def heights(ax) -> list[float]:
    return [bar.get_height() for bar in ax.patches]


def widths(ax) -> list[float]:
    return [bar.get_width() for bar in ax.patches]


def pixels(figure) -> tuple[int, int]:
    """Width and height of the figure as it is saved at 100 dots per inch."""
    figure.set_dpi(100)
    figure.canvas.draw()
    return figure.canvas.get_width_height()


def test_bars_have_the_values_of_the_tokens_and_their_labels():
    row = values(11)
    figure, ax = draw_bars(row, tokens(11), "Sequence Attribution")
    figure.canvas.draw()
    np.testing.assert_allclose(heights(ax), row)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == [
        "The",
        "capital",
        "of",
        "France",
        "$",
        "x_1",
        "$",
        "\\n",
        "café",
        "[/bold]",
        "␣",
    ]


def test_examples_in_docstrings_run():
    outcome = doctest.testmod(importlib.import_module("captum_llm_ext.display.scale"))
    assert outcome.attempted
    assert not outcome.failed


def test_scale_is_symmetric_about_zero_and_blue_for_positive_values():
    scale = ColorScale.of(np.array([1.0, -4.0, 2.0, 3.0, 3.5]))
    assert (scale.norm.vmin, scale.norm.vmax) == (-4.0, 4.0)
    red, white, blue = scale.colors(np.array([-4.0, 0.0, 4.0]))
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert white[:3].min() > 0.95


def test_scale_of_values_that_are_not_negative_is_sequential_from_white():
    scale = ColorScale.of(np.array([0.0, 1.0, 2.0]))
    assert (scale.norm.vmin, scale.norm.vmax) == (0.0, 2.0)
    shades = scale.colors(np.linspace(0.0, 2.0, 9))[:, :3].sum(axis=1)
    assert np.all(np.diff(shades) < 0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_attention_sink_does_not_flatten_the_other_tokens(sign):
    row = np.array([100.0 * sign, 2.0, 1.0, 2.5, 0.5])
    scale = ColorScale.of(row, sink=True)
    assert (scale.limit, scale.peak, scale.is_cut) == (2.5, 100.0 * sign, True)
    assert scale.beyond(row).tolist() == [True, False, False, False, False]
    assert f"the first token reaches {100 * sign:.2f}" in scale.label("Attribution")


@pytest.mark.parametrize("sink", [False, True])
def test_a_value_that_is_the_answer_is_never_cut(sink):
    passages = np.array([0.4, 0.3, 7.92, 0.2, 1.0, 0.6, 0.1, 0.3, 0.5, 1.82])
    scale = ColorScale.of(passages, sink)
    assert (scale.limit, scale.is_cut, scale.label("Attribution")) == (7.92, False, "Attribution")
    large, small = scale.colors(passages)[[2, 9], :3].sum(axis=1)
    assert small - large > 1.0


@pytest.mark.parametrize("n_tokens", [5, 60, 600])
@pytest.mark.parametrize("position", [0, 1, -1])
def test_only_the_first_token_of_a_prompt_can_be_cut(n_tokens, position):
    row = np.abs(values(n_tokens))
    row[position] = 1000.0
    assert ColorScale.of(row, sink=True).is_cut == (position == 0)
    assert not ColorScale.of(row).is_cut
    several = np.stack([row / 2, row])
    assert ColorScale.of(several, sink=True).limit == ColorScale.of(row, sink=True).limit


@pytest.mark.parametrize("sink", [False, True])
def test_the_numbers_of_small_values_stay_apart_beside_a_large_one(sink):
    row = np.array([0.02, 0.03, 0.01, 1234.0, 0.025])
    scale = ColorScale.of(row, sink)
    assert [scale.format(value) for value in row[:3]] == ["0.0200", "0.0300", "0.0100"]


def test_without_a_dominant_token_no_value_lies_beyond_the_colours():
    saliency = np.array([80.8, 61.4, 17.6, 26.4, 10.7])
    scale = ColorScale.of(saliency, sink=True)
    assert (scale.limit, scale.is_cut, scale.label("Attribution")) == (80.8, False, "Attribution")


@pytest.mark.parametrize("row", [[0.0] * 5, [np.nan] * 5, [np.inf, 0.0], [0.0] * 5 + [2.0]])
def test_scale_of_degenerate_values_has_a_positive_finite_limit(row):
    scale = ColorScale.of(np.array(row))
    assert 0.0 < scale.limit < np.inf
    assert np.isfinite(scale.colors(np.array(row))).all()


@pytest.mark.parametrize(
    ("limit", "value", "text"),
    [(80.8, 17.62, "17.6"), (1.06, -0.081, "-0.08"), (1.06, -0.001, "0.00"),
     (3e-9, 1e-9, "1.0e-09"),
     (12345.0, 7.2, "7")],
)  # fmt: skip
def test_numbers_have_the_decimals_of_the_scale(limit, value, text):
    assert ColorScale.of(np.array([limit, value])).format(value) == text


def test_rows_relative_to_their_largest_value():
    rows = np.array([[1, -2, 3, 4, 1], [1e4, 1e4, 2e4, -4e4, 1e9]], dtype=np.float32)
    relative, scale = relative_to_rows(rows)
    np.testing.assert_allclose(relative[0], rows[0] / 4)
    np.testing.assert_allclose(relative[1], rows[1] / 1e9)
    assert (scale.limit, scale.is_cut) == (1.0, False)
    relative, scale = relative_to_rows(rows[:, ::-1], sink=True)
    np.testing.assert_allclose(relative[0], rows[0, ::-1] / 4)
    np.testing.assert_allclose(relative[1], rows[1, ::-1] / 4e4)  # the first token is a sink
    assert scale.limit == 1.0
    assert scale.peak == pytest.approx(1e9 / 4e4)


def test_bars_of_passages_are_as_high_as_their_values():
    row = np.array([0.4, 0.3, 7.92, 0.2, 1.0, 0.6, 0.1, 0.3, 0.5, 1.82])
    _, ax = draw_bars(row, tokens(10), "Attribution")
    np.testing.assert_allclose(heights(ax), row)
    assert [text.get_text() for text in ax.texts] == [f"{value:.2f}" for value in row]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("own_figure", [True, False])
def test_the_bar_of_an_attention_sink_is_broken_and_shows_its_value(sign, own_figure):
    row = np.array([100.0 * sign, 3.0, -2.0, 1.0])
    given = None if own_figure else plt.subplots(figsize=(3, 2))[1]
    figure, ax = draw_bars(row, tokens(4), "Attribution", given, ColorScale.of(row, sink=True))
    figure.canvas.draw()
    first, *others = heights(ax)
    assert others == [3.0, -2.0, 1.0]
    assert first * sign > 3.0  # higher than every bar that is whole
    assert f"{100 * sign:.2f}" in [text.get_text() for text in ax.texts]
    gaps = [line for line in ax.lines if line.get_color() == "white"]
    assert len(gaps) == 2  # of the bar, and of the axis
    assert all(3.0 < abs(y) < abs(first) for gap in gaps for y in gap.get_ydata())
    assert max(abs(tick) for tick in ax.get_yticks()) <= 3.0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_bars_of_values_that_are_not_finite_keep_the_others_readable(value):
    _, ax = draw_bars(np.array([1.0, value, 3.0]), tokens(3), "Attribution")
    assert np.abs(heights(ax)).max() < 4.0
    assert f"{value}" in [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("n_tokens", [5, 30, 60])
def test_every_bar_has_its_number(n_tokens):
    row = values(n_tokens)
    texts = [
        [text.get_text() for text in draw_bars(row, tokens(n_tokens), "", ax)[1].texts]
        for ax in (None, plt.subplots(figsize=(12, 4))[1])
    ]
    assert texts == [[ColorScale.of(row).format(value) for value in row]] * 2


def test_shaded_text_frames_an_attention_sink():
    row = np.abs(values(80))
    row[0] = 100.0
    _, ax = draw_shaded_text(row, tokens(80), "", scale=ColorScale.of(row, sink=True))
    edges = np.asarray(ax.collections[0].get_edgecolor())
    assert edges[:, 3].tolist() == [1.0] + [0.0] * 79


def test_labels_that_differ_by_a_space_or_past_the_cut_look_different():
    texts = [f"A passage that begins as all of them, {end}" for end in ("one", "two")]
    labels = ["is", "Ġis", "Ġthe", "a ", "a", *texts]
    _, ax = draw_bars(values(7), labels, "")
    shown = [label.get_text() for label in ax.get_xticklabels()]
    assert shown[:5] == ["is", "␣is", "the", "a␣", "a"]
    assert shown[5].endswith(", one")
    assert shown[6].endswith(", two")
    _, ax = draw_heat_map(values(2, 1), ["ĠParis", "Paris"], ["x"], "")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["␣Paris", "Paris"]
    table = render_text(AttributionText("t", texts, labels[:2], values(2), values(2, 2)), False, 80)
    assert table.splitlines()[2].split() == ["sequence", "is", "␣is"]
    assert ", one" in table
    assert ", two" in table


def test_a_small_heat_map_shows_its_numbers_in_readable_colours():
    cells = values(2, 5)
    _, ax = draw_heat_map(cells, ["a", "b"], tokens(5), "Attribution")
    assert [float(text.get_text()) for text in ax.texts] == pytest.approx(cells.ravel(), abs=6e-3)
    backgrounds = ax.images[0].to_rgba(cells).reshape(-1, 4)
    for text, background in zip(ax.texts, backgrounds, strict=True):
        assert abs(sum(to_rgb(text.get_color())) - background[:3].sum()) > 1.0


@pytest.mark.parametrize("n_columns", [1, 5, 24, 25, 60, 61, 143, 600])
@pytest.mark.parametrize("n_rows", [1, 30])
def test_heat_maps_show_every_value_and_label_within_bounds(n_rows, n_columns):
    cells = values(n_rows, n_columns)
    names = [f"t{i}" for i in range(n_columns)]
    figure, ax = draw_heat_map(cells, tokens(n_rows), names, "Attribution")
    assert max(pixels(figure)) < 8000
    blocks = [np.asarray(image.get_array()) for image in ax.images]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), cells)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    labels += [text.get_text() for text in ax.texts if text.get_text().startswith("t")]
    assert labels == names


@pytest.mark.parametrize("shape", [(121, 5), (121, 600), (100, 2000), (1500, 5), (100, 30000)])
def test_heat_maps_of_any_size_stay_within_bounds(shape):
    rows, columns = [str(row) for row in range(shape[0])], [str(c) for c in range(shape[1])]
    figure, _ = draw_heat_map(values(*shape), rows, columns, "Attribution")
    assert max(figure.get_size_inches()) * 100 < 8000


@pytest.mark.parametrize("n_columns", [5, 600])
def test_labels_of_rows_do_not_overlap(n_columns):
    cells = values(121, n_columns)
    figure, ax = draw_heat_map(cells, [f"{row} mlp" for row in range(121)], tokens(n_columns), "")
    pixels(figure)
    boxes = sorted(
        (label.get_window_extent() for label in ax.get_yticklabels()), key=lambda b: b.y0
    )
    assert all(low.y1 - above.y0 < 2.0 for low, above in pairwise(boxes))


@pytest.mark.parametrize("n_tokens", [61, 600, 5000])
def test_shaded_text_holds_every_token_within_bounds(n_tokens):
    figure, ax = draw_shaded_text(values(n_tokens), tokens(n_tokens), "Attribution")
    assert [text.get_text() for text in ax.texts] == [readable_token(t) for t in tokens(n_tokens)]
    assert max(figure.get_size_inches()) * 100 < 8000


def test_shaded_text_stays_on_the_page_and_its_tokens_apart():
    figure, ax = draw_shaded_text(values(200), ["Ġunderstanding"] * 200, "Attribution")
    pixels(figure)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert all(a.x1 <= b.x0 + 1.0 for a, b in pairwise(boxes) if abs(a.y0 - b.y0) < 1.0)
    assert max(box.x1 for box in boxes) <= ax.get_window_extent().x1 + 1.0


@pytest.mark.parametrize("n_tokens", [len(UNPARSEABLE), 120])
def test_tokens_are_never_read_as_mathematics(n_tokens):
    labels = (UNPARSEABLE * 20)[:n_tokens]
    for figure, _ in (
        draw_bars(values(n_tokens), labels, ""),
        draw_shaded_text(values(n_tokens), labels, ""),
        draw_heat_map(values(n_tokens, n_tokens), labels, labels, ""),
    ):
        figure.canvas.draw()  # raises where a label is parsed


@pytest.mark.parametrize("n_tokens", [5, 600])
def test_plots_go_into_axes_of_the_caller(n_tokens):
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    labels, row = tokens(n_tokens), values(n_tokens)
    assert draw_bars(row, labels, "", axes[0]) == (figure, axes[0])
    assert draw_shaded_text(row, labels, "", axes[1]) == (figure, axes[1])
    assert draw_heat_map(values(3, n_tokens), ["a", "b", "c"], labels, "", axes[2])[1] is axes[2]
    figure.canvas.draw()
    assert len(plt.get_fignums()) == 1
    assert tuple(figure.get_size_inches()) == (12.0, 4.0)


@pytest.mark.parametrize("n_axes", [1, 2, 3])
def test_shaded_text_keeps_apart_in_axes_of_the_caller(n_axes):
    figure, axes = plt.subplots(1, n_axes, figsize=(12, 4), squeeze=False)
    _, ax = draw_shaded_text(values(600), ["Ġthe"] * 600, "Attribution", axes[0, 0])
    pixels(figure)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert all(a.x1 <= b.x0 + 1.0 for a, b in pairwise(boxes) if abs(a.y0 - b.y0) < 1.0)


def test_bars_of_many_measures_fill_the_axes():
    measures = {"deletion": np.arange(30.0), "insertion": np.arange(30.0) / 2}
    intervals = {name: np.stack([row - 1, row + 1], axis=1) for name, row in measures.items()}
    names = [f"method {i}" for i in range(30)]
    _, ax = draw_measures(names, measures, intervals, "nats")
    assert ax.get_ylim() == (29.5, -0.5)  # the first method on top, and no empty rows
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert widths(ax) == [*measures["deletion"], *measures["insertion"]]


def test_plots_go_into_axes_of_a_subfigure():
    figure = plt.figure(layout="constrained")
    ax = figure.subfigures(1, 2)[0].subplots()
    assert draw_heat_map(values(3, 5), ["a", "b", "c"], tokens(5), "", ax) == (figure, ax)
    figure.canvas.draw()


def test_a_table_shows_tokens_as_they_are_and_no_control_characters():
    hostile = ["[bold red]x[/]", ":smile:", "\x1b[2J", "[/"]
    cells = values(2, 4)
    text = render_text(AttributionText("t", hostile, hostile[:2], cells[0], cells), False, 100)
    assert "\x1b" not in text
    for printed in ("[bold red]x[/]", ":smile:", "\\x1b[2J", "[/"):
        assert printed in text


@pytest.mark.parametrize("width", [30, 60, 200])
@pytest.mark.parametrize("n_tokens", [5, 60, 61, 300])
def test_tables_keep_to_the_width_and_lose_no_column(width, n_tokens):
    outputs = [f"out{i}" for i in range(20)]
    cells = values(20, n_tokens)
    text = render_text(
        AttributionText("t", tokens(n_tokens), outputs, cells.sum(0), cells), False, width
    )
    assert max(map(len, text.splitlines())) <= width
    assert [word for word in text.split() if word.startswith("out")] == outputs
