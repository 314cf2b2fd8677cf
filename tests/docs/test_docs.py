"""README and the pages of docs/: code that runs, output that comes, commands that exist."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import captum_llm_ext
from captum_llm_ext.cli import main
from captum_llm_ext.cli.one import build_parser
from tests.docs.documents import PAGES, ROOT, Block, blocks, commands, page_name, steps
from tests.printed import assert_printed_alike

LANGUAGES = {"", "python", "output", "text"}
RUN = [page for page in PAGES if any(not block.title for block, _ in steps(page))]
TYPED = [(page_name(page), line) for page in PAGES for line in commands(page)]
OWN = [(page, line) for page, line in TYPED if line.startswith("captum-llm-ext ")]
PROMPTS = '{"prompt": "The capital of France is. Right?", "target": " Paris"}'


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_fences(page: Path) -> None:
    """Every fence is one that the tests below read, and every block of Python compiles."""
    found = blocks(page)
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(re.findall(r"^ *(```|~~~)", text, re.MULTILINE)) == 2 * len(found)
    assert {block.language for block in found} <= LANGUAGES
    for block, _ in steps(page):
        compile(block.text, page_name(page), "exec")


@pytest.mark.real_model
@pytest.mark.parametrize("page", RUN, ids=page_name)
def test_code(
    page: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, demo_model: tuple[Any, Any]
) -> None:
    """The blocks of a page run one after the other, print what it says, and warn of nothing."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(captum_llm_ext, "load_demo_model", lambda: demo_model)  # read once for all
    names: dict[str, Any] = {"__name__": "__main__"}
    for block, expected in steps(page):
        if block.title:
            continue
        run(block, page, names)
        assert_printed_alike(capsys.readouterr().out, expected or "")
    matplotlib.pyplot.close("all")


def run(block: Block, page: Path, names: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # bitsandbytes uses what torch no longer likes, and says so once for each of its functions
        warnings.filterwarnings("ignore", message=r"`torch.jit.script", category=DeprecationWarning)
        exec(compile(block.text, page_name(page), "exec"), names)


@pytest.mark.real_model
@pytest.mark.parametrize(("page", "line"), OWN)
def test_command(page: str, line: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)[1:]
    if "path/to" in line:  # a model of the reader's own
        assert build_parser().parse_args(words)
        return
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    assert main(words) == 0
    if words[0] == "batch":
        assert (tmp_path / "results.jsonl").is_file()
        return
    assert "token" in capsys.readouterr().out
    assert "--out" not in line or any(tmp_path.iterdir())


@pytest.mark.parametrize(("page", "line"), [x for x in TYPED if x not in OWN])
def test_other_command(page: str, line: str) -> None:
    """Targets of make, and the extras that pip is to install, are there."""
    words = shlex.split(line, comments=True)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    if words[0] == "make":
        assert words[1] in targets
    elif words[:2] == ["pip", "install"]:
        asked = re.findall(r"[a-z]+", words[2].partition("[")[2])
        assert set(asked) <= set(re.findall(r"^([a-z]+) = \[", extras, re.MULTILINE))
    elif words[0] == "accelerate":
        assert words[1:5:3] == ["launch", "4"]
        assert words[5:8] == ["-m", "captum_llm_ext", "batch"]
    else:
        assert words[:3] == ["python", "-m", "tests.benchmarks." + words[2].rpartition(".")[2]]
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
