"""Results as values: sums and means against numbers written out; tables, groups, comparisons."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from captum_llm_ext import (
    LLMAttentionAttributionResult,
    LLMAttributionResult,
    LLMLayerAttributionResult,
    Provenance,
    TextTemplateInput,
    aggregate,
    compare,
)

matplotlib.use("Agg")

TOKENS = ["The", "Ġcat", "Ġsat"]


def result(values: list[float], tokens: list[str] = TOKENS, **fields: Any) -> LLMAttributionResult:
    rows = torch.tensor([values, values]) / 2
    return LLMAttributionResult(
        **{
            "input_tokens": tokens,
            "output_tokens": ["Ġon", "Ġit"],
            "seq_attr": values,
            "token_attr": rows,
            **fields,
        }
    )


def drawn(plot: tuple[Any, Any] | None) -> tuple[Any, Any]:
    assert plot is not None
    return plot


def times(factor: float, result: Any) -> Any:
    return factor * result


def layered(values: list[list[float]], **fields: Any) -> LLMLayerAttributionResult:
    return LLMLayerAttributionResult(
        input_tokens=TOKENS,
        output_tokens=["Ġon"],
        layer_names=["a", "b"],
        layer_seq_attr=values,
        **fields,
    )


ONE, OTHER = result([1.0, -2.0, 5.0]), result([3.0, 1.0, 1.0])


def test_sums_differences_and_multiples_are_those_of_every_value():
    assert (ONE + OTHER).seq_attr.tolist() == [4.0, -1.0, 6.0]
    assert (ONE - OTHER).token_attr.tolist() == [[-1.0, -1.5, 2.0]] * 2
    assert (ONE * 2).seq_attr.tolist() == times(2, ONE).seq_attr.tolist() == [2.0, -4.0, 10.0]
    assert 1 * ONE == ONE
    assert (ONE - OTHER) + OTHER == ONE


def test_a_sum_keeps_what_both_have_and_is_no_norm():
    kept = {"norm": "l2", "output_probs": [-1.0, -2.0], "convergence_delta": [0.5, 0.25]}
    one, other = result([1.0, 2.0, 3.0], **kept), result([1.0, 1.0, 1.0], **kept)
    difference = one - other
    assert difference.norm is None
    assert difference.output_probs.tolist() == [-1.0, -2.0]
    assert difference.convergence_delta.tolist() == [0.0, 0.0]
    assert times(2, one).norm == "l2"


@pytest.mark.parametrize("mode", ["independent", "joint"])
def test_layers_are_added_one_by_one(mode):
    one, other = (
        layered(v, layer_mode=mode) for v in ([[1.0, 2, 3], [4, 5, 6]], [[1.0, 1, 1]] * 2)
    )
    difference = one - other
    assert difference["b"].seq_attr.tolist() == [3.0, 4.0, 5.0]
    torch.testing.assert_close(difference.seq_attr, one.seq_attr - other.seq_attr)


def test_attention_is_added_over_all_layers():
    one = LLMAttentionAttributionResult(
        input_tokens=TOKENS,
        output_tokens=["Ġon"],
        layer_names=["a"],
        layer_token_attr=[[[0.5, 0.25, 0.25]]],
        attention=[[[[0.5, 0.25, 0.25]]]],
        sink_attention=[[[0.0]]],
    )
    assert type(one - one) is LLMAttributionResult
    assert (one - one).seq_attr.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (result([1.0, 2.0, 3.0], ["The", "Ġdog", "Ġsat"]), r"token 1 is 'Ġcat' in one and 'Ġdog'"),
        (result([1.0, 2.0], ["The", "Ġcat"]), "one has 3 input tokens, the other 2"),
        (result([1.0, 2.0, 3.0], output_tokens=["Ġon", "Ġme"]), "output token 1"),
        (result([1.0, 2.0, 3.0], token_attr=None), "token_attr"),
        (layered([[1.0, 2.0, 3.0]] * 2), "LLMLayerAttributionResult"),
    ],
)
def test_other_inputs_are_refused_and_the_message_says_where_they_differ(other, where):
    with pytest.raises(ValueError, match=where):
        ONE - other
    with pytest.raises(ValueError, match=where):
        type(ONE).mean([ONE, other])


def test_what_is_no_result_and_no_number_is_refused():
    wrong: Any
    for wrong in ("2", None, [1.0]):
        with pytest.raises(TypeError):
            ONE + wrong
        with pytest.raises(TypeError):
            ONE * wrong


def test_a_mean_has_the_standard_deviation_as_its_spread():
    mean = LLMAttributionResult.mean([ONE, OTHER, OTHER])
    values = np.array([[1.0, -2.0, 5.0], [3.0, 1.0, 1.0], [3.0, 1.0, 1.0]])
    np.testing.assert_allclose(mean.seq_attr, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(mean.spread, values.std(0, ddof=1), rtol=1e-6)
    assert LLMAttributionResult.from_json(mean.to_json()) == mean
    assert LLMAttributionResult.mean([ONE]).spread is None
    _, ax = drawn(mean.plot_seq_attr())
    assert len(ax.containers) == 2  # bars, and the intervals at them
    assert mean.merge("word").spread is None
    with pytest.raises(ValueError, match="at least one result"):
        LLMAttributionResult.mean([])


def test_normalised_magnitudes_sum_to_one():
    assert ONE.normalise().seq_attr.tolist() == [0.125, -0.25, 0.625]
    torch.testing.assert_close(ONE.normalise().token_attr, ONE.token_attr / 8)
    assert times(0, ONE).normalise() == 0 * ONE


def test_the_provenance_of_a_difference_names_both_methods():
    one = result([1.0, 2.0, 3.0], provenance=Provenance("ig", evaluations=3, model="m", dtype="a"))
    other = result([1.0, 2.0, 3.0], provenance=Provenance("flow", evaluations=1, model="m"))
    known = (one - other).provenance
    assert (known.method, known.model, known.dtype, known.evaluations) == (
        "ig - flow",
        "m",
        None,
        4,
    )
    assert LLMAttributionResult.mean([one, other]).method == "mean of ig, flow"
    assert LLMAttributionResult.mean([one, one]).method == "ig"
    assert (one - result([0.0, 0.0, 0.0])).provenance is None


def test_the_largest_features_with_their_shares():
    table = ONE.top(2)
    assert [row.name for row in table] == ["sat", "cat"]
    assert table[0] == ("sat", 5.0, 0.625, 2)
    assert str(table).splitlines()[1].split() == ["sat", "5", "0.625", "2"]
    assert table.to_dataframe()["share"].tolist() == [0.625, 0.25]
    assert "<td>sat</td>" in table.to_html()
    assert len(ONE.top(None)) == 3
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="whole number"):
            ONE.top(wrong)


def test_a_table_escapes_markup():
    table = result([1.0, 2.0, 3.0], ["<b>", "a", "b"]).top(None)
    assert "<b>" not in table.to_html()


def test_words_of_many_prompts_are_averaged_over_the_prompts_that_have_them():
    results = [
        result([1.0, 2.0, 4.0]),
        result([3.0, 4.0, 6.0], ["The", "Ġcat", "Ġcat"]),
        result([8.0, 1.0, 1.0], ["The", "Ġun", "real"]),
    ]
    words = aggregate(results)
    rows = {row[0]: row[1:] for row in words.table()}
    assert rows["The"][0] == 4.0
    assert rows["cat"][0] == (2.0 + 10.0) / 2  # what one prompt has twice is added
    assert rows["unreal"] == (2.0, 2.0, 2.0, 1)
    assert rows["The"][1] <= 4.0 <= rows["The"][2]
    assert [row[0] for row in words.table(2)] == ["cat", "The"]
    positions = aggregate(results, by="position")
    assert positions.names == ["0", "1", "2"]
    np.testing.assert_allclose(positions.means, [4.0, 7 / 3, 11 / 3])
    long = aggregate(results, by=lambda label: "long" if len(label) > 3 else None)
    assert (long.names, long.means.tolist(), long.counts) == (["long"], [1.0], [1])


def test_values_of_a_template_are_grouped_by_their_names():
    def filled(name: str, values: list[float]) -> LLMAttributionResult:
        inp = TextTemplateInput("{name} {verb}", {"name": name, "verb": "runs"})
        return result(values, [name, "runs"], inp=inp)

    groups = aggregate([filled("Ann", [1.0, 3.0]), filled("Bob", [3.0, 1.0])], by="value")
    assert dict(zip(groups.names, groups.means, strict=True)) == {"name": 2.0, "verb": 2.0}
    shares = aggregate([filled("Ann", [1.0, 3.0])], by="value", normalise=True)
    assert dict(zip(shares.names, shares.means, strict=True)) == {"name": 0.25, "verb": 0.75}


def test_an_interval_covers_the_mean_of_normal_draws():
    """The percentile bootstrap of 40 draws from N(1, 1): about 1 ± 1.96/√40."""
    random = np.random.default_rng(0)
    results = [result([float(value), 0.0, 0.0]) for value in random.normal(1.0, 1.0, 40)]
    low, high = aggregate(results, by="token").intervals[0]
    assert high - low == pytest.approx(2 * 1.96 / 40**0.5, rel=0.25)


def test_groups_are_plotted_with_their_intervals():
    _, ax = drawn(aggregate([ONE, OTHER]).plot(title="two", top=2))
    assert ax.get_title() == "two"
    assert len(ax.patches) == 2
    assert ax.get_legend() is None


@pytest.mark.parametrize(
    ("results", "by", "message"),
    [([], "word", "no results"), ([ONE], "letter", "by"), ([ONE], lambda _: None, "no feature")],
)
def test_groups_that_have_no_meaning_are_refused(results, by, message):
    with pytest.raises(ValueError, match=message):
        aggregate(results, by=by)


def test_results_are_compared_on_one_scale():
    both = compare({"one": ONE, "other": OTHER}, difference=True)
    assert list(both.results) == ["one", "other", "one − other"]
    assert both.table().rows[1] == ("cat", -2.0, 1.0, -3.0)
    _, ax = drawn(both.plot(title="side by side", top=2))
    np.testing.assert_array_equal(ax.images[0].get_array(), [[1, 5], [3, 1], [-2, 4]])
    assert ax.images[0].norm.vmax == 5.0
    page = both.to_html()
    assert page.count("<script") == 0 or "window" not in page.split("</style>")[-1]
    for value in ("5.0", "−"):
        assert value in page


def test_equal_values_have_equal_colours_in_a_comparison():
    page = compare({"one": result([5.0, 0.0, 1.0]), "other": result([1.0, 0.0, 1.0])}).to_html()
    colours = [span.split(";")[0] for span in page.split('<span style="background:')[1:]]
    assert colours[2] == colours[3] == colours[5] != colours[0]


def test_other_features_are_compared_in_words_or_on_a_page():
    one = result([1.0, 2.0, 3.0], ["The", "Ġun", "real"])
    other = result([1.0, 5.0, 0.0], ["The", "Ġunreal", ""])
    with pytest.raises(ValueError, match='merge="word"'):
        compare({"a": one, "b": other}).plot()
    assert "unreal" in compare({"a": one, "b": other}).to_html()
    assert compare({"a": one, "b": result([1.0, 2.0], ["The", "Ġunreal"])}, merge="word").table()
    with pytest.raises(ValueError, match="two results"):
        compare({"a": one}, difference=True)


@pytest.mark.parametrize("plot", ["plot_seq_attr", "plot_token_attr", "plot_layer_attr"])
def test_every_plot_takes_a_size_a_title_the_largest_features_and_says_its_origin(plot):
    shown = layered([[1.0, -5.0, 3.0], [1.0, -5.0, 3.0]], layer_token_attr=[[[1.0, -5, 3]]] * 2)
    shown.provenance = Provenance("ig", model="small")
    figure, ax = getattr(shown, plot)(figsize=(5, 3), title="$a_b", top=2, provenance=True)
    assert tuple(figure.get_size_inches()) == (5.0, 3.0)
    assert ax.get_title() == "$a_b"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["cat", "sat"]
    assert "ig\nsmall" in figure.get_supxlabel()
    figure.canvas.draw()
    with pytest.raises(ValueError, match="figsize"):
        getattr(shown, plot)(figsize=(5, 3), ax=ax)


def test_sixty_bars_fit_on_a_page_with_every_label():
    tokens = [f"Ġw{i}" for i in range(60)]
    figure, ax = drawn(result([float(i) for i in range(60)], tokens).plot_seq_attr())
    assert figure.get_size_inches()[0] <= 7.5
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert len(boxes) == 60
    assert all(a.x1 <= b.x0 + 1 for a, b in itertools.pairwise(boxes))


def test_norms_and_attributions_are_not_added() -> None:
    """Their units differ; shares have none."""
    tokens: Any = {"input_tokens": ["a", "b"], "output_tokens": ["c"]}
    norms = LLMAttributionResult(**tokens, seq_attr=[3.0, 1.0], norm="l1")
    added = LLMAttributionResult(**tokens, seq_attr=[-1.0, 1.0])
    for combine in (lambda: norms - added, lambda: LLMAttributionResult.mean([added, norms])):
        with pytest.raises(ValueError, match=r"norm=.*normalise\(\) each"):
            combine()
    assert (norms.normalise() - added.normalise()).seq_attr.tolist() == [1.25, -0.25]
