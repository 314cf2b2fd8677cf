"""Results as JSON, data frames and arrays: values do not change, and damage is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_llm_ext import LayerSaliency, LLMGradientAttribution, TextTokenInput
from captum_llm_ext.results import LLMAttributionResult, LLMLayerAttributionResult
from tests.models.families import tiny_model, tiny_tokenizer
from tests.results.cases import layered_results, single_results

DATA = Path(__file__).parents[1] / "data"
LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
SINGLE = LLMAttributionResult(
    input_tokens=["The", "Ġcat", "The"],
    output_tokens=["Ġsat", "sequence"],
    seq_attr=[1.0, -2.0, 0.1],
    token_attr=[[0.5, -1.0, 0.25], [0.5, -1.0, -0.15]],
    converged=True,
)
LAYERED = LLMLayerAttributionResult(
    input_tokens=["The", "Ġcat", "The"],
    output_tokens=["Ġsat"],
    layer_names=LAYERS,
    layer_seq_attr=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
    layer_token_attr=[[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]],
    hidden_attr={LAYERS[1]: torch.ones(1, 3, 2)},
)


def bits(tensor: torch.Tensor) -> list[int]:
    """The bits of each value, which tell -0.0 from 0.0; all not-a-numbers are equal."""
    return (
        torch.nan_to_num(tensor, nan=12345.0, posinf=None, neginf=None).view(torch.int32).tolist()
    )


def test_a_result_goes_through_json_and_a_data_frame():
    assert LLMAttributionResult.from_json(SINGLE.to_json()) == SINGLE
    assert SINGLE.to_dataframe()["sequence"].tolist() == SINGLE.seq_attr.tolist()


@given(single_results() | layered_results())
def test_json_gives_the_same_result_to_the_last_bit(result):
    read = LLMAttributionResult.from_json(result.to_json())
    assert type(read) is type(result)
    assert read == result
    assert read.provenance == result.provenance
    assert bits(read.seq_attr) == bits(result.seq_attr)
    if result.token_attr is not None:
        assert bits(read.token_attr) == bits(result.token_attr)
    assert read.to_json() == result.to_json()


@given(single_results() | layered_results())
def test_every_attribute_is_stored(result):
    """Compared with all attributes of the object, so that a new one cannot be forgotten."""
    read = LLMAttributionResult.from_json(result.to_json())
    missing = {name for name, value in vars(result).items() if value is not None} - {
        name for name, value in vars(read).items() if value is not None
    }
    assert not missing


@given(single_results() | layered_results())
def test_the_text_is_standard_json_in_one_line_of_ascii(result):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = result.to_json()
    json.loads(text, parse_constant=refuse)
    assert text.isascii()
    assert "\n" not in text


def test_numbers_in_the_text_are_plain_nested_lists():
    document = json.loads(SINGLE.to_json())
    assert document["kind"] == "LLMAttributionResult"
    assert document["token_attr"][0] == [0.5, -1.0, 0.25]
    assert document["input_tokens"] == ["The", "Ġcat", "The"]


def test_a_real_attribution_comes_back_without_its_input():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    method = LayerSaliency(model, model.get_input_embeddings(), norm="l2")
    inp = TextTokenInput("the cat sat", tokenizer)
    result = LLMGradientAttribution(method, tokenizer).attribute(
        inp, target=" on", include_hidden_attr=True
    )
    read = LLMAttributionResult.from_json(result.to_json())
    assert read == result
    assert (read.norm, read.inp) == ("l2", None)


@pytest.mark.parametrize("result", [SINGLE, LAYERED])
@pytest.mark.parametrize("as_path", [str, Path])
def test_json_files(tmp_path, result, as_path):
    file = tmp_path / "result.json"
    text = result.to_json(as_path(file))
    assert file.read_text(encoding="utf-8") == text
    assert LLMAttributionResult.from_json(as_path(file)) == result


@pytest.mark.parametrize("file", sorted(DATA.glob("schema_*.json")), ids=lambda path: path.stem)
def test_files_of_every_version_are_read(file):
    """Written by `tests/results/make_schema_files.py` when each version was the newest."""
    document = json.loads(file.read_text(encoding="utf-8"))
    read = LLMAttributionResult.from_json(file)
    assert type(read).__name__ == document["kind"]
    assert read.input_tokens == document["input_tokens"]
    for name in ("seq_attr", "layer_seq_attr", "attention"):
        if name in document:
            torch.testing.assert_close(getattr(read, name), torch.tensor(document[name]))
    assert (read.provenance is None) == (document["version"] == 1)
    assert LLMAttributionResult.from_json(read.to_json()) == read


def test_a_class_reads_only_its_results():
    assert LLMLayerAttributionResult.from_json(LAYERED.to_json()) == LAYERED
    with pytest.raises(ValueError, match="use LLMAttributionResult"):
        LLMLayerAttributionResult.from_json(SINGLE.to_json())


def test_a_newer_version_asks_for_an_upgrade():
    newer = SINGLE.to_json().replace('"version": 2', '"version": 3')
    with pytest.raises(ValueError, match=r"newer captum_llm_ext.*version 3.*upgrade"):
        LLMAttributionResult.from_json(newer)


@pytest.mark.parametrize("result", [SINGLE, LAYERED])
def test_results_stored_without_what_display_needs_are_read(result):
    document = json.loads(result.to_json())
    del document["output_labels"], document["starts_prompt"]
    assert LLMAttributionResult.from_json(json.dumps(document)) == result


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "result.json", "[" * 100_000, '{"schema": "other", "version": 1}'],
)
def test_text_that_is_no_result_is_refused(text):
    with pytest.raises(ValueError, match="expected the JSON text of a result"):
        LLMAttributionResult.from_json(text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(ValueError, match="no JSON"):
        LLMAttributionResult.from_json(tmp_path / "x")
    with pytest.raises(TypeError, match="bytes"):
        LLMAttributionResult.from_json(b"{}")


@given(st.data())
def test_text_cut_anywhere_is_refused(data):
    text = LAYERED.to_json()
    with pytest.raises(ValueError, match="damaged"):
        LLMAttributionResult.from_json(text[: data.draw(st.integers(0, len(text) - 1))])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ANYTHING = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2)
)


@pytest.mark.parametrize("result", [SINGLE, LAYERED], ids=["single", "layered"])
@given(st.data())
def test_a_changed_field_is_read_as_a_result_or_refused_with_a_value_error(result, data):
    document = json.loads(result.to_json())
    name = data.draw(st.sampled_from(sorted(document)))
    document[name] = data.draw(ANYTHING)
    try:
        read = LLMAttributionResult.from_json(json.dumps(document))
    except ValueError:
        return
    repr(read), read.to_json(), read.to_text(color=False, width=80)


@pytest.mark.parametrize("name", ["version", "kind", "seq_attr", "input_tokens", "converged"])
def test_a_missing_field_is_named(name):
    document = json.loads(SINGLE.to_json())
    del document[name]
    with pytest.raises(ValueError, match=name):
        LLMAttributionResult.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_attr", [1.0, 2.0]),
        ("seq_attr", [1.0, 2.0, True]),
        ("seq_attr", [1.0, 2.0, "3"]),
        ("seq_attr", [1.0, 2.0, 1e39]),
        ("seq_attr", [1.0, 2.0, 10**400]),
        ("seq_attr", None),
        ("token_attr", [[1.0], [2.0, 3.0]]),
        ("input_tokens", ["The", 1, "The"]),
        ("converged", 1),
        ("n_evaluations", True),
        ("norm", "l3"),
        ("extra", 0),
        ("provenance", {"method": 3}),
        ("provenance", {"methods": "ig"}),
        ("provenance", []),
    ],
)
def test_a_damaged_field_is_named(name, value):
    document = json.loads(SINGLE.to_json()) | {name: value}
    with pytest.raises(ValueError, match=name):
        LLMAttributionResult.from_json(json.dumps(document))


def test_features_that_are_no_text_are_not_stored():
    result = LLMAttributionResult(input_tokens=[3], output_tokens=["a"], seq_attr=[1.0])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="input_tokens"):
        result.to_json()


def test_a_class_made_elsewhere_is_not_stored_as_another():
    class Elsewhere(LLMAttributionResult):
        pass

    result = Elsewhere(input_tokens=["a"], output_tokens=["a"], seq_attr=[1.0])
    with pytest.raises(TypeError, match="Elsewhere"):
        result.to_json()


def test_a_data_frame_has_a_row_per_input_token_and_loses_no_repeated_one():
    frame = SINGLE.to_dataframe()
    assert list(frame.index) == ["The", "cat", "The (2)"]
    assert list(frame.columns) == ["sequence", "sat", "sequence (2)"]
    assert set(frame.dtypes) == {np.dtype("float32")}
    np.testing.assert_array_equal(frame["sequence"], SINGLE.seq_attr)
    np.testing.assert_array_equal(frame.iloc[:, 1:].T, SINGLE.token_attr)
    assert frame["sequence"].abs().idxmax() == "cat"


def test_a_long_data_frame_has_a_row_per_pair():
    frame = SINGLE.to_dataframe(long=True)
    assert list(frame.columns) == [
        "output_position",
        "output_token",
        "input_position",
        "input_token",
        "attribution",
    ]
    sequence, pairs = frame[:3], frame[3:]
    assert sequence["output_position"].isna().all()
    assert sequence["output_token"].isna().all()
    np.testing.assert_array_equal(sequence["attribution"], SINGLE.seq_attr)
    pivot = pairs.pivot_table(
        values="attribution", index="output_position", columns="input_position"
    )
    np.testing.assert_array_equal(pivot, SINGLE.token_attr)
    row = pairs[(pairs["output_position"] == 1) & (pairs["input_position"] == 2)].iloc[0]
    assert (row["output_token"], row["input_token"]) == ("sequence", "The")


@pytest.mark.parametrize("long", [False, True])
def test_the_sequence_alone_has_a_data_frame(long):
    result = LLMAttributionResult(
        input_tokens=["a", "b"], output_tokens=["c", "d"], seq_attr=[1.0, 2.0]
    )
    frame = result.to_dataframe(long=long)
    assert frame["attribution" if long else "sequence"].tolist() == [1.0, 2.0]


def test_layers_are_the_first_level_of_a_data_frame():
    frame = LAYERED.to_dataframe()
    assert frame.index.names == ["layer", "input_token"]
    for name, layer in LAYERED.items():
        pd.testing.assert_frame_equal(frame.loc[name], layer.to_dataframe())


def test_layers_are_the_first_column_of_a_long_data_frame():
    frame = LAYERED.to_dataframe(long=True)
    assert frame.columns[0] == "layer"
    for name, layer in LAYERED.items():
        rows = frame[frame["layer"] == name].drop(columns="layer").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, layer.to_dataframe(long=True))


@pytest.mark.parametrize("result", [SINGLE, LAYERED])
def test_a_long_data_frame_goes_through_parquet(tmp_path, result):
    frame = result.to_dataframe(long=True)
    frame.to_parquet(tmp_path / "x.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "x.parquet"), frame)


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"captum-llm-ext\[export\]"):
        SINGLE.to_dataframe()


def test_arrays_go_through_a_numpy_file(tmp_path):
    arrays = LAYERED.to_numpy()
    assert {name: values.shape for name, values in arrays.items()} == {
        "seq_attr": (3,),
        "token_attr": (1, 3),
        "layer_seq_attr": (2, 3),
        "layer_token_attr": (2, 1, 3),
        f"hidden_attr.{LAYERS[1]}": (1, 3, 2),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as read:
        for name, values in arrays.items():
            np.testing.assert_array_equal(read[name], values)
    assert "convergence_delta" not in SINGLE.to_numpy()
