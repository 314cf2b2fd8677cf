"""The Python blocks of the pages in docs/ run, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


@pytest.mark.real_model
@pytest.mark.filterwarnings("ignore:integrated gradients have not converged")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, tmp_path: Path, monkeypatch: Any, demo_model: Any) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, str(page), "exec"), names)
