"""`batch` with targets generated in groups of lines, against one line at a time.

`python -m tests.benchmarks.many_prompts [number of prompts]` prints a table and writes
results/many_prompts.json. 64 prompts of 8 to 40 tokens by default; one thread, CPU seconds, in the
same process, once each: a file takes minutes.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from captum_llm_ext import batch, load_demo_model
from captum_llm_ext.batches import together
from tests.benchmarks.gradients import PROMPT
from tests.benchmarks.measure import cpu_seconds, print_table, write_results

FEWEST, MOST = 8, 40  # tokens of a prompt
WORKS: dict[str, tuple[float, dict[str, Any]]] = {
    "saliency, sequence": (2.5, {"method": "saliency", "include_per_token_attr": False}),
    "saliency, every target token": (2.5, {"method": "saliency"}),
    "ablation": (1.3, {"method": "ablation", "baselines": "remove"}),
}


def prompts(tokenizer: Any, number: int) -> list[str]:
    """Windows of so many tokens of one text."""
    ids = tokenizer.encode((PROMPT + " golf, hiking and his family. ") * 8)
    sizes = [FEWEST + i * (MOST - FEWEST) // max(1, number - 1) for i in range(number)]
    return [tokenizer.decode(ids[i : i + size]) for i, size in enumerate(sizes)]


@contextmanager
def one_at_a_time() -> Iterator[None]:
    with patch.object(together, "_may_go_together", lambda model, options: False):
        yield


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = load_demo_model()
    lines = prompts(tokenizer, int(sys.argv[1]) if len(sys.argv) > 1 else 64)
    rows = []
    for name, (bar, options) in WORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{which}.jsonl" for which in ("grouped", "alone")]

            def work(out: Path, options: dict[str, Any] = options) -> None:
                batch(model, tokenizer, lines, out, show_progress=False, **options)

            ours = cpu_seconds(partial(work, files[0]))
            with one_at_a_time():
                theirs = cpu_seconds(partial(work, files[1]))
            texts = [file.read_text().splitlines() for file in files]
            same = sum(a == b for a, b in zip(*texts, strict=True))
        print(f"{name}: {same} of {len(lines)} lines are the same to the byte", flush=True)
        rows.append(
            {
                "what": f"{name}, {len(lines)} prompts",
                "ours": f"{ours:.1f} s",
                "captum": f"{theirs:.1f} s",
                "ratio": theirs / ours,
                "bar": f">= {bar:g}",
                "met": theirs / ours >= bar,
            }
        )
    print_table(rows, "each alone")
    print(f"written: {write_results('many_prompts', rows)}")


if __name__ == "__main__":
    main()
