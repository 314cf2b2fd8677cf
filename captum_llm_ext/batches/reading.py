"""The finished file of a batch, read back record by record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_llm_ext.batches.output import WORK_SUFFIX, output_format
from captum_llm_ext.results import LLMAttributionResult


@dataclass(frozen=True)
class BatchRecord:
    """The result of one line of a batch, or its error.

    Args:
        line: number of the line, from 1.
        id: the line's "id", or None; from Parquet always a string.
        result: the result, or None.
        error_type: name of the error's class, or None.
        error_message: what the error said, or None.

    Raises:
        TypeError: an argument is missing.

    Example:
        >>> BatchRecord(line=2, id=None, error_type="ValueError", error_message="empty").is_error
        True
    """

    line: int
    id: str | int | None
    result: LLMAttributionResult | None = None
    error_type: str | None = None
    error_message: str | None = None

    @property
    def is_error(self) -> bool:
        return self.error_type is not None


def read_batch(path: str | Path) -> Iterator[BatchRecord]:
    """The records that `batch` wrote, in the order of the lines; one is in memory at a time.

    Args:
        path: the file, ".jsonl" or ".parquet".

    Returns:
        An iterator over `BatchRecord`.

    Raises:
        ValueError: the ending has no format, the batch is not finished, or a record is damaged.
        ImportError: the file is ".parquet" and pyarrow (``captum-llm-ext[export]``) is missing.
        OSError: the file cannot be read.

    Example:
        >>> model, tokenizer = load_demo_model()
        >>> import tempfile
        >>> file = f"{tempfile.mkdtemp()}/results.jsonl"
        >>> prompts = [{"prompt": "The capital of France is", "target": " Paris"}, {"prompt": ""}]
        >>> report = batch(model, tokenizer, prompts, file, show_progress=False)
        >>> [record.is_error for record in read_batch(file)]
        [False, True]
    """
    path = Path(path)
    output_format(path)
    if not path.exists() and path.with_name(path.name + WORK_SUFFIX).is_dir():
        raise ValueError(f"{path} is not finished: call batch with the same arguments to go on")
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)
    return map(_record, rows)


def _record(row: dict[str, Any]) -> BatchRecord:
    stored = row.get("result")
    if isinstance(stored, dict):
        stored = json.dumps(stored)
    error = row.get("error") or {}
    return BatchRecord(
        line=row["line"],
        id=row["id"],
        result=None if stored is None else LLMAttributionResult.from_json(stored),
        error_type=error.get("type", row.get("error_type")),
        error_message=error.get("message", row.get("error_message")),
    )


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(row, dict) or not {"line", "id", "status"} <= row.keys():
                raise ValueError(f"{path}, line {number}: expected a record that batch wrote")
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    columns = ["line", "id", "result", "error_type", "error_message"]
    with parquet.ParquetFile(path) as file:
        for group in file.iter_batches(columns=columns):
            yield from group.to_pylist()
