"""The finished file: the records of all lines in their order, as JSON lines or as a table."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from captum_llm_ext.batches.journal import Record, StoredRecord
from captum_llm_ext.batches.lines import readable
from captum_llm_ext.results import LLMAttributionResult, LLMLayerAttributionResult

WORK_SUFFIX = ".batch"  # of the folder beside the file, until it is written
ROWS_PER_GROUP = 256


def output_format(out: Path) -> Callable[[Path, Iterable[bytes]], None]:
    """The function that writes a file with this ending.

    Raises:
        ValueError: the ending has no format, or the folder is not there.
        ImportError: the format is Parquet, and pyarrow is not installed.
    """
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"expected a name that ends in {' or '.join(FORMATS)}, got {str(out)!r}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {str(out.parent)!r} to write into")
    if out.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            "Parquet needs pyarrow: pip install 'captum-llm-ext[export]'", name="pyarrow"
        )
    return FORMATS[out.suffix.lower()]


def write_output(out: Path, work: Path, records: Sequence[StoredRecord]) -> None:
    """Write the records to a file in `work`, and move it to `out` in one step."""
    part = work / f"assembled{out.suffix}.tmp"
    output_format(out)(part, (record.read() for record in records))
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, out)


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(lines)


def _write_parquet(path: Path, lines: Iterable[bytes]) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = _schema(pyarrow)
    rows = (_row(json.loads(line)) for line in lines)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


def _row(record: Record) -> dict[str, Any]:
    """The columns of a record, without those that have no value."""
    row = {name: record[name] for name in ("line", "id", "status")}
    row["id"] = None if row["id"] is None else str(row["id"])
    if "error" in record:
        row |= {f"error_{name}": text for name, text in record["error"].items()}
    else:
        text = json.dumps(record["result"])
        row |= _result_columns(LLMAttributionResult.from_json(text)) | {"result": text}
    return {name: _storable(value) for name, value in row.items()}


def _result_columns(result: LLMAttributionResult) -> dict[str, Any]:
    names = ["seq_attr", "token_attr", "output_probs"]
    texts = ["input_tokens", "output_tokens"]
    if isinstance(result, LLMLayerAttributionResult):
        names += ["layer_seq_attr", "layer_token_attr"]
        texts += ["layer_names"]
    values = {name: getattr(result, name) for name in names}
    return {name: getattr(result, name) for name in texts} | {
        name: value.tolist() for name, value in values.items() if value is not None
    }


def _storable(value: Any) -> Any:
    """The value with strings, also those in lists, that UTF-8 can hold."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [readable(text) for text in value]
    return readable(value) if isinstance(value, str) else value


def _schema(pyarrow: Any) -> Any:
    text, integer = pyarrow.string(), pyarrow.int64()
    texts, row = pyarrow.list_(text), pyarrow.list_(pyarrow.float32())
    rows = pyarrow.list_(row)
    return pyarrow.schema(
        {
            "line": integer,
            "id": text,
            "status": text,
            "input_tokens": texts,
            "output_tokens": texts,
            "seq_attr": row,
            "token_attr": rows,
            "output_probs": row,
            "layer_names": texts,
            "layer_seq_attr": rows,
            "layer_token_attr": pyarrow.list_(rows),
            "error_type": text,
            "error_message": text,
            "result": text,
        }
    )


FORMATS: dict[str, Callable[[Path, Iterable[bytes]], None]] = {
    ".jsonl": _write_lines,
    ".parquet": _write_parquet,
}
