"""The pages build without a warning, need no network, and leave no public name out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import captum_llm_ext
from tests.docs.documents import ROOT

pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    # The theme says on every build that a successor is being made.
    found = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in captum_llm_ext.__all__:
        module = getattr(getattr(captum_llm_ext, name), "__module__", "")
        is_ours = module.startswith("captum_llm_ext")
        entry = f'id="captum_llm_ext.{name}"' if is_ours else f"<code>{name}</code>"
        assert entry in page, name


def test_pages_need_no_network(site: Path) -> None:
    """Nothing that a browser loads by itself comes from elsewhere."""
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]*\ssrc=\"([^\"]*)\"|<link[^>]*\shref=\"([^\"]*)\"",
            page.read_text(encoding="utf-8"),
        )
        assert not [x for pair in loaded for x in pair if re.match(r"(https?:)?//", x)], page
