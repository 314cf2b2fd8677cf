"""Finished records on disk: each process appends to a file of its own, one record a line.

A record counts once its line is whole. What a killed process left of a line is cut off when the
same process index appends again, and passed over by all who read.
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
class Place:
    """Where a finished record lies, and whether it is an error."""

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


def finished(folder: Path) -> dict[int, Place]:
    """Line number of every finished record in the folder's journals, and where it is."""
    found: dict[int, Place] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for start, text in _whole_lines(path):
            record = _record(text)
            if record is not None:
                place = Place(path, start, len(text), record["status"] == "error")
                found.setdefault(record["line"], place)
    return found


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends a record and returns once it is on the disk."""
    with path.open("ab") as file:
        file.truncate(_length_of_whole_lines(path))

        def append(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield append


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    start = 0
    with path.open("rb") as file:
        for text in file:
            if text.endswith(b"\n"):
                yield start, text
            start += len(text)


def _length_of_whole_lines(path: Path) -> int:
    return max((start + len(text) for start, text in _whole_lines(path)), default=0)


def _record(text: bytes) -> Record | None:
    """The record of a line, or None where the line is damaged: it will be written anew."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"line", "status"} <= record.keys() else None
