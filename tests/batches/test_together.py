"""Targets that are generated for a group of lines at once are those of each line alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from captum_llm_ext.batches import together
from captum_llm_ext.batches.records import Explainer
from tests.batches.cases import MALFORMED, WORDS, records, run
from tests.models.families import tiny_model

LINES: list[Any] = [{"prompt": " ".join(WORDS[: 1 + i % 9]), "id": i} for i in range(20)]
LINES[4] = {"prompt": "Dave lives", "target": " in Palm"}
LINES[7] = {"prompt": "Palm Coast " * 40}  # over the context
GENERATED = {"max_new_tokens": 4, "do_sample": False}


def alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(together, "_may_go_together", lambda model, options: False)


@pytest.mark.parametrize("method", ["saliency", "ablation"])
def test_the_file_is_that_of_one_line_at_a_time(
    method: str, tmp_path: Path, monkeypatch: Any
) -> None:
    model = tiny_model("llama", fresh=True)
    rows: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: rows.append(len(args[0]))
    )
    options = {"method": method, "gen_args": GENERATED}
    options |= {"baselines": "pad"} if method == "ablation" else {}
    run(LINES, tmp_path / "grouped.jsonl", model, **options)
    assert together.LINES in rows
    alone(monkeypatch)
    run(LINES, tmp_path / "alone.jsonl", model, **options)
    grouped, single = records(tmp_path / "grouped.jsonl"), records(tmp_path / "alone.jsonl")
    assert [r["status"] for r in grouped] == ["error" if i == 7 else "ok" for i in range(20)]
    for one, other in zip(grouped, single, strict=True):
        assert one.keys() == other.keys()
        if one["status"] == "error":
            assert one == other
            continue
        assert one["result"]["output_tokens"] == other["result"]["output_tokens"]
        for name in ("seq_attr", "token_attr"):
            found, expected = (torch.tensor(r["result"][name]) for r in (one, other))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_file_that_goes_on_is_the_same_to_the_byte(tmp_path: Path, monkeypatch: Any) -> None:
    lines = [*LINES, *(text.decode("latin-1") for text in MALFORMED[:1])]
    run(lines, tmp_path / "expected.jsonl", gen_args=GENERATED)
    record, n_records = Explainer.record, [0]

    def stopping(*arguments: Any) -> Any:
        n_records[0] += 1
        if n_records[0] % 6 == 0:
            raise KeyboardInterrupt
        return record(*arguments)

    monkeypatch.setattr(Explainer, "record", stopping)
    out = tmp_path / "results.jsonl"
    while not out.exists():
        try:
            run(lines, out, gen_args=GENERATED)
        except KeyboardInterrupt:
            assert not out.exists()
    assert n_records[0] > len(lines) + 2
    assert out.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"gen_args": {"max_new_tokens": 3, "do_sample": True}},
        {"gen_args": {"max_new_tokens": 3, "num_beams": 2}},
        {"gen_args": {"max_new_tokens": 3, "repetition_penalty": 1.3}},
        {"gen_args": GENERATED, "skip_tokens": [5]},
    ],
)
def test_what_is_not_greedy_is_generated_line_by_line(options: Any) -> None:
    model = tiny_model("llama", fresh=True)
    assert not together._may_go_together(model, options)
    assert together._may_go_together(model, {"gen_args": GENERATED})
    assert not together._may_go_together(model.train(), {"gen_args": GENERATED})


def test_a_model_that_looks_at_padding_is_run_line_by_line(tmp_path: Path) -> None:
    """Its embeddings count the rows' padding in; the first group shows it."""
    model = tiny_model("llama", fresh=True)
    rows: list[int] = []

    def shift(_: Any, args: Any, output: Any) -> Any:
        rows.append(len(output))
        return output + (args[0] == model.config.pad_token_id).sum(1)[:, None, None]

    model.get_input_embeddings().register_forward_hook(shift)
    run(LINES[:4], tmp_path / "out.jsonl", model, gen_args=GENERATED)
    assert rows.count(4) <= GENERATED["max_new_tokens"] + 1  # the group that is tried, alone
    assert {r["status"] for r in records(tmp_path / "out.jsonl")} == {"ok"}
