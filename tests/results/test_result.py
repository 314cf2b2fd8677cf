"""Results: their values, the checks of shapes, the mapping of layers, plots and tables."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import pickle

import captum.attr
import matplotlib.pyplot as plt
import pytest
import torch

from captum_llm_ext.results import LLMAttributionResult, LLMLayerAttributionResult

INPUTS = ["The", "Ġcapital", "Ġof", "Ġthe", "Ġcapital"]
OUTPUTS = ["ĠParis", "$"]
LAYERS = ["model.embed_tokens", "model.layers.0.mlp", "model.layers.1.mlp"]
TOKEN_ATTR = torch.arange(10.0).reshape(2, 5) - 4.0


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def axes_of(plotted):
    return plotted[1]


def single(**changes) -> LLMAttributionResult:
    fields = {"input_tokens": INPUTS, "output_tokens": OUTPUTS, "seq_attr": TOKEN_ATTR.sum(0)}
    return LLMAttributionResult(**(fields | {"token_attr": TOKEN_ATTR} | changes))


def layered(**changes) -> LLMLayerAttributionResult:
    token_attr = torch.stack([TOKEN_ATTR, TOKEN_ATTR * 10, TOKEN_ATTR * 1000])
    fields = {
        "input_tokens": INPUTS,
        "output_tokens": OUTPUTS,
        "layer_names": LAYERS,
        "layer_seq_attr": token_attr.sum(1),
        "layer_token_attr": token_attr,
    }
    return LLMLayerAttributionResult(**(fields | changes))


def test_a_result_is_captums_and_holds_the_same():
    values = {"seq_attr": [1.0, 2.0, 3.0, 4.0, 5.0], "output_probs": [-0.5, -1.0]}
    tokens = {"input_tokens": INPUTS, "output_tokens": OUTPUTS}
    captums = captum.attr.LLMAttributionResult(**tokens, **values, token_attr=TOKEN_ATTR)
    ours = LLMAttributionResult(**tokens, **values, token_attr=TOKEN_ATTR)
    assert isinstance(ours, captum.attr.LLMAttributionResult)
    for field in ("seq_attr", "token_attr", "output_probs"):
        torch.testing.assert_close(getattr(ours, field), getattr(captums, field))
    assert (ours.input_tokens, ours.output_tokens) == (INPUTS, OUTPUTS)


@pytest.mark.parametrize("module", ["single", "layered"])
def test_examples_in_docstrings_run(module):
    outcome = doctest.testmod(importlib.import_module(f"captum_llm_ext.results.{module}"))
    assert outcome.attempted
    assert not outcome.failed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_values_are_kept_as_detached_float32_and_plot(dtype):
    values = TOKEN_ATTR.to(dtype)
    if dtype.is_floating_point:
        values.requires_grad_()
    result = single(seq_attr=values.sum(0), token_attr=values, convergence_delta=values[:, 0])
    for tensor in (result.seq_attr, result.token_attr, result.convergence_delta):
        assert tensor is not None
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
    result.plot_seq_attr()[0].canvas.draw()
    result.plot_token_attr()[0].canvas.draw()


def test_repeated_tokens_keep_their_entries():
    assert single().seq_attr_dict == {
        "The": -3.0, "capital": -1.0, "of": 1.0, "the": 3.0, "capital (2)": 5.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seq_attr", torch.zeros(4)),
        ("seq_attr", torch.zeros(1, 5)),
        ("token_attr", torch.zeros(5, 2)),
        ("output_probs", torch.zeros(3)),
        ("convergence_delta", torch.zeros(3)),
        ("convergence_delta", torch.zeros(2, 1)),
        ("hidden_attr", torch.zeros(2, 5)),
        ("hidden_attr", torch.zeros(2, 4, 8)),
    ],
)
def test_wrong_shapes_are_refused_by_name_and_shape(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        single(**{field: value})
    assert str(tuple(value.shape)) in str(caught.value)


def test_values_that_are_set_later_are_checked_too():
    result = single()
    with pytest.raises(ValueError, match="seq_attr"):
        result.seq_attr = torch.zeros(2)
    result.seq_attr = [1, 2, 3, 4, 5]
    assert result.seq_attr.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_string_is_no_list_of_tokens():
    with pytest.raises(TypeError, match="input_tokens"):
        single(input_tokens="abcde")


def test_the_sequence_alone_has_one_delta_and_no_token_plot():
    delta, hidden = torch.tensor([0.5]), torch.zeros(1, 5, 8)
    result = single(token_attr=None, convergence_delta=delta, hidden_attr=hidden)
    assert result.convergence_delta.shape == (1,)
    assert result.hidden_attr.shape == (1, 5, 8)
    with pytest.raises(ValueError, match="plot_seq_attr"):
        result.plot_token_attr()


def test_equality_of_lists_of_tensors():
    paths = [torch.tensor([[0.0, 1.0], [-3.0, score]]) for score in (-1.0, -2.0, -1.5)]
    assert layered(layer_score_paths=paths) == layered(layer_score_paths=[*map(torch.clone, paths)])
    assert layered(layer_score_paths=paths) != layered(layer_score_paths=paths[::-1])


@pytest.mark.parametrize("make", [single, layered])
def test_equality_is_by_value(make):
    assert make() == make()
    assert make() != make(output_tokens=["a", "b"])
    assert make() != make(output_probs=torch.zeros(2))
    assert make() != "text"
    assert copy.deepcopy(make()) == make()
    assert pickle.loads(pickle.dumps(make())) == make()


def test_equality_sees_a_changed_value_and_nan_equals_itself():
    nan = torch.full((5,), float("nan"))
    assert single(seq_attr=nan) == single(seq_attr=nan)
    assert single(seq_attr=torch.zeros(5)) != single()
    assert single(token_attr=None) != single()
    plain = captum.attr.LLMAttributionResult(
        input_tokens=INPUTS, output_tokens=OUTPUTS, seq_attr=TOKEN_ATTR.sum(0)
    )
    assert single() != plain
    hidden = {LAYERS[0]: torch.ones(2, 5, 3)}
    assert layered(hidden_attr=hidden) == layered(hidden_attr=hidden)
    assert layered(hidden_attr=hidden) != layered(hidden_attr={LAYERS[0]: torch.zeros(2, 5, 3)})


def test_repr_is_one_line_with_the_largest_tokens():
    assert repr(single()) == (
        "LLMAttributionResult(5 input tokens -> 2 output tokens, "
        "top: ' capital' 5, 'The' -3, ' the' 3)"
    )
    assert repr(layered()).startswith(
        "LLMLayerAttributionResult(5 input tokens -> 2 output tokens, mean over 3 layers, top:"
    )


@pytest.mark.parametrize(("mode", "factor"), [("independent", 1011 / 3), ("joint", 1011.0)])
def test_layers_together_are_their_mean_or_their_sum(mode, factor):
    result = layered(layer_mode=mode)
    torch.testing.assert_close(result.token_attr, TOKEN_ATTR * factor)
    torch.testing.assert_close(result.seq_attr, TOKEN_ATTR.sum(0) * factor)


def test_a_layered_result_maps_names_to_results_in_order():
    delta = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    hidden = {LAYERS[1]: torch.ones(2, 5, 3), LAYERS[2]: torch.ones(2, 5, 7)}
    result = layered(convergence_delta=delta, hidden_attr=hidden, output_probs=[-1.0, -2.0])
    assert list(result) == list(result.keys()) == LAYERS
    assert len(result) == 3
    assert "model.norm" not in result
    expected = single(
        seq_attr=TOKEN_ATTR.sum(0) * 10,
        token_attr=TOKEN_ATTR * 10,
        convergence_delta=delta[1],
        hidden_attr=hidden[LAYERS[1]],
        output_probs=[-1.0, -2.0],
    )
    assert result[LAYERS[1]] == result[1] == result[-2] == expected
    assert dict(result.items())[LAYERS[1]] == expected
    assert result[0].hidden_attr is None


def test_joint_layers_share_one_delta():
    result = layered(layer_mode="joint", convergence_delta=torch.tensor([1.0, 2.0]))
    assert result.convergence_delta.tolist() == [1.0, 2.0]
    assert result[0].convergence_delta is None


def test_an_unknown_layer_is_a_key_error_with_close_names():
    with pytest.raises(KeyError, match=r"model\.layers\.1\.mlp"):
        layered()["model.layer.1.mlp"]
    with pytest.raises(IndexError):
        layered()[3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_names", [*LAYERS[:2], LAYERS[0]]),
        ("layer_names", []),
        ("layer_names", LAYERS[:2]),
        ("layer_seq_attr", torch.zeros(3, 4)),
        ("layer_token_attr", torch.zeros(2, 3, 5)),
        ("layer_mode", "both"),
        ("convergence_delta", torch.zeros(2)),
        ("hidden_attr", {"model.norm": torch.zeros(2, 5, 3)}),
        ("hidden_attr", {LAYERS[0]: torch.zeros(2, 3)}),
    ],
)
def test_bad_layered_results_are_refused(field, value):
    with pytest.raises(ValueError, match=r"layer_|delta|hidden"):
        layered(**{field: value})


@pytest.mark.parametrize("plot", ["plot_seq_attr", "plot_token_attr", "plot_layer_attr"])
def test_plots_return_figure_and_axes_or_show(plot, monkeypatch):
    shows = []
    monkeypatch.setattr(plt, "show", lambda: shows.append(True))
    figure, ax = getattr(layered(), plot)()
    assert ax in figure.axes
    assert not shows
    assert getattr(layered(), plot)(show=True) is None
    assert shows == [True]
    assert getattr(layered(), plot)(ax=ax)[1] is ax


def test_each_layer_is_plotted_relative_to_its_largest_and_the_first_is_at_the_bottom():
    ax = axes_of(layered().plot_layer_attr())
    cells = torch.as_tensor(ax.images[0].get_array())
    torch.testing.assert_close(cells, (TOKEN_ATTR.sum(0) / 5.0).expand(3, 5))
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "1 mlp",
        "0 mlp",
        "embed_tokens",
    ]
    ax = axes_of(layered().plot_layer_attr(normalize=False))
    cells = torch.as_tensor(ax.images[0].get_array())
    torch.testing.assert_close(cells, layered().layer_seq_attr.flip(0))


def test_a_layer_without_attribution_plots_as_zeros():
    """Rotary embeddings do not depend on the tokens."""
    values = torch.stack([TOKEN_ATTR[0], torch.zeros(5), TOKEN_ATTR[1]])
    ax = axes_of(layered(layer_seq_attr=values, layer_token_attr=None).plot_layer_attr())
    assert ax.images[0].get_array()[1].tolist() == [0.0] * 5


def test_long_prompts_plot_and_print_as_text():
    tokens = [f"Ġw{i}" for i in range(600)]
    result = single(input_tokens=tokens, seq_attr=torch.arange(600.0), token_attr=None)
    assert len(axes_of(result.plot_seq_attr()).texts) == 600
    running, top = result.to_text(color=False, width=100).split("largest sequence attribution")
    assert "w0 w1 w2" in running
    assert [line.split()[1] for line in top.splitlines()[2:]] == [
        f"w{n}" for n in range(599, 579, -1)
    ]


def test_the_table_has_every_value_with_probability_and_delta():
    probs, delta = torch.tensor([-0.25, -1.5]), torch.tensor([0.125, -0.5])
    text = single(output_probs=probs, convergence_delta=delta).to_text(color=False, width=120)
    rows = {line[:18].strip(): line[18:].split() for line in text.splitlines() if line.strip()}
    assert rows["The"] == ["-3.00", "-4.00", "1.00"]
    assert rows["of"] == ["1.00", "-2.00", "3.00"]
    assert rows["log probability"] == ["-0.25", "-1.5"]
    assert rows["convergence delta"] == ["0.125", "-0.5"]


def test_colours_can_be_switched_off():
    assert "\x1b[" in single().to_text(color=True, width=80)
    assert "\x1b[" not in single().to_text(color=False, width=80)
    file = io.StringIO()
    single().print(file=file)
    assert "capital" in file.getvalue()
    assert "\x1b[" not in file.getvalue()  # a file is no terminal
