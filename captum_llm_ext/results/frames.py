"""Results as pandas data frames and numpy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from captum_llm_ext.display import clean_labels, distinct_names
from captum_llm_ext.results.json_format import fields_of
from captum_llm_ext.results.values import FloatArray, array

if TYPE_CHECKING:
    from pandas import DataFrame

SEQUENCE = "sequence"  # the column of the attribution to the whole output


def named_arrays(result: Any) -> dict[str, FloatArray]:
    """Each array of a result by the name of its attribute; attributes that are None are left out.

    The arrays of an attribute that is a dict are named "attribute.key".
    """
    values: dict[str, Any] = {}
    for name in fields_of(result):
        value = getattr(result, name)
        entries = value if isinstance(value, dict) else {}
        values |= {name: value} | {f"{name}.{key}": entry for key, entry in entries.items()}
    return {name: array(value) for name, value in values.items() if isinstance(value, Tensor)}


def wide_frame(result: Any) -> DataFrame:
    """A row for each input token, and columns for the sequence and each output token."""
    pandas = pandas_module()
    columns, headings = [array(result.seq_attr)], [SEQUENCE]
    if result.token_attr is not None:
        columns += list(array(result.token_attr))
        headings += clean_labels(result._labels)
    return pandas.DataFrame(
        np.stack(columns, axis=1),
        index=pandas.Index(distinct_names(result.labels), name="input_token"),
        columns=pandas.Index(distinct_names(headings), name="output_token"),
    )


def long_frame(result: Any) -> DataFrame:
    """A row for each output and input token; rows of the sequence have no output token."""
    pandas = pandas_module()
    values = array(result.seq_attr)[None]
    if result.token_attr is not None:
        values = np.concatenate([values, array(result.token_attr)])
    n_rows, n_input = values.shape
    outputs = [None, *clean_labels(result._labels)][:n_rows]
    positions = pandas.array([None, *range(n_rows - 1)], dtype="Int64")
    return pandas.DataFrame(
        {
            "output_position": positions.repeat(n_input),
            "output_token": pandas.array(outputs, dtype="string").repeat(n_input),
            "input_position": np.tile(np.arange(n_input), n_rows),
            "input_token": pandas.array(result.labels * n_rows, dtype="string"),
            "attribution": values.ravel(),
        }
    )


def layered_frame(frames: dict[str, DataFrame], long: bool) -> DataFrame:
    """The frames of all layers, with the layer as first level of the index or first column."""
    stacked = pandas_module().concat(frames, names=["layer"])
    return stacked.reset_index("layer").reset_index(drop=True) if long else stacked


def pandas_module() -> Any:
    """pandas, or an error that says how to install it."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_dataframe needs pandas: pip install 'captum-llm-ext[export]'", name="pandas"
        ) from error
    return pandas
