"""Every Python block of README runs, in order, and prints what README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```output\n(.*?)```)?", re.DOTALL)


@pytest.mark.real_model
def test_readme(tmp_path: Path, monkeypatch: Any, capsys: Any, demo_model: Any) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = BLOCK.findall(README.read_text())
    assert len(blocks) >= 5
    for code, expected in blocks:
        exec(compile(code, str(README), "exec"), names)
        printed = capsys.readouterr().out
        if expected:
            assert [x.rstrip() for x in printed.split("\n") if x.strip()] == [
                x.rstrip() for x in expected.split("\n") if x.strip()
            ]
    assert (tmp_path / "capital.png").stat().st_size > 1000
