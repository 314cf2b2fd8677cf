"""Finished records on disk: each process appends to its own journal, one record per line.

A record counts once its line is whole. The part of a line that a killed process left behind is cut
off when a process of the same index appends again; readers skip it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class StoredRecord:
    """A finished record in a journal: `length` bytes from `start`, and whether it is an error."""

    path: Path
    start: int
    length: int
    is_error: bool

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length)


def journal_path(folder: Path, index: int) -> Path:
    return folder / f"{index}.jsonl"


def finished_records(folder: Path) -> dict[int, StoredRecord]:
    """The finished records in the folder's journals, by the number of their line."""
    records: dict[int, StoredRecord] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for start, text in _whole_lines(path):
            record = _parsed(text)
            if record is not None:
                stored = StoredRecord(path, start, len(text), record["status"] == "error")
                records.setdefault(record["line"], stored)
    return records


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends a record, and returns once the record is on the disk."""
    with path.open("ab") as file:
        file.truncate(sum(len(text) for _, text in _whole_lines(path)))

        def append(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield append


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that ends, and where it starts; only the last line of a file can lack its end."""
    start = 0
    with path.open("rb") as file:
        for text in file:
            if text.endswith(b"\n"):
                yield start, text
            start += len(text)


def _parsed(text: bytes) -> Record | None:
    """The record of a line, or None where the line is damaged, so that it is computed again."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"line", "status"} <= record.keys() else None
