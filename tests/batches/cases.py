"""Files of prompts, and what reads and runs them, for tests of `batch`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_llm_ext import BatchReport, batch
from tests.models.families import tiny_model, tiny_tokenizer

WORDS = ("Dave", "lives", "in", "Palm", "Coast", "and", "plays", "golf,", "hiking", "with", "his")
MALFORMED = [
    b'{"prompt": "Palm Coast", "target": " golf"',  # cut off
    b'{"prompt": ""}',
    b'{"prompt": 7, "target": " golf"}',
    b'{"prompt": "Palm \xff Coast"}',  # no UTF-8
    json.dumps({"prompt": "Palm Coast " * 40, "target": " golf"}).encode(),  # over the context
]


def many_lines(number: int, malformed: Sequence[bytes] = ()) -> list[bytes]:
    """Lines with prompts of several lengths, the malformed ones spread among them."""
    lines = [
        json.dumps(
            {"prompt": " ".join(WORDS[: 1 + i % 9]), "target": f" {WORDS[i % 11]}", "id": f"n{i}"}
        ).encode()
        for i in range(number - len(malformed))
    ]
    for i, bad in enumerate(malformed):
        lines.insert((2 * i + 1) * number // (2 * len(malformed)), bad)
    return lines


def write_lines(path: Path, lines: Sequence[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def run(prompts: Any, out: Path, model: Any = None, **kwargs: Any) -> BatchReport:
    """`batch` on a tiny model."""
    kwargs = {"show_progress": False, **kwargs}
    return batch(model or tiny_model("llama"), tiny_tokenizer(), prompts, out, **kwargs)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def journal_lines(out: Path) -> int:
    """Whole lines in all journals of a batch."""
    journals = out.with_name(out.name + ".batch").glob("*.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in journals)
