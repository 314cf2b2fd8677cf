"""The private names of Captum that the package needs are where compat.py looks for them."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import captum_llm_ext

PACKAGE = Path(captum_llm_ext.__file__).parent


def private_imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of what a file imports from private parts of Captum or transformers."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            root, *parts = node.module.split(".")
            names = [alias.name for alias in node.names]
            if root in ("captum", "transformers") and any(
                part.startswith("_") for part in (*parts, *names)
            ):
                found += [(node.module, name) for name in names]
    return found


@pytest.mark.parametrize(("module", "name"), private_imports(PACKAGE / "compat.py"))
def test_private_name_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), (
        f"{module}.{name} has moved in this version of its library: captum_llm_ext/compat.py is "
        "the one place to mend"
    )


def test_compat_is_the_only_place_with_private_imports() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if path.name != "compat.py"]
    assert {path.name: private_imports(path) for path in others if private_imports(path)} == {}


def test_every_public_name_has_a_docstring() -> None:
    for name in captum_llm_ext.__all__:
        assert inspect.getdoc(getattr(captum_llm_ext, name)), name
