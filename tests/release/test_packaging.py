"""The distributions hold what they should, and say what they need."""

from __future__ import annotations

import ast
import re
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import captum_llm_ext
from tests.models.families import tiny_model, tiny_tokenizer
from tests.release.environments import ROOT, build, requirements
from tests.release.typed_use import use
from tests.release.versions import floors

PACKAGE = ROOT / "captum_llm_ext"
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in PACKAGE.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, which is made from the sdist, and the sdist."""
    return build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_holds_the_package_alone(distributions: tuple[Path, Path]) -> None:
    names = ZipFile(distributions[0]).namelist()
    inside = sorted(name for name in names if ".dist-info/" not in name)
    assert inside == SOURCES
    assert {"captum_llm_ext/py.typed", "captum_llm_ext/display/page/view.js"} <= set(inside)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_can_run_the_tests(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (*SOURCES, "tests/conftest.py", "constraints.txt", "README.md", "CHANGELOG.md"):
        assert needed in names


def test_one_version_everywhere(distributions: tuple[Path, Path]) -> None:
    version = captum_llm_ext.__version__
    assert distributions[0].name.startswith(f"captum_llm_ext-{version}-")
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of what is imported on import of a module itself, types aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
        else:
            yield from imports(node)


def test_what_is_imported_is_asked_for(distributions: tuple[Path, Path]) -> None:
    """Not what only comes along with another package."""
    asked = {
        canonicalize_name(requirement.name)
        for requirement in map(Requirement, requirements(distributions[0]))
        if requirement.marker is None
    }
    found = {
        name for path in PACKAGE.rglob("*.py") for name in imports(ast.parse(path.read_text()))
    }
    others = found - set(sys.stdlib_module_names) - {"captum_llm_ext"}
    given = packages_distributions()
    providers = {name: set(map(canonicalize_name, given[name])) for name in others}
    assert {name for name in others if not asked & providers[name]} == set()
    assert {"captum", "torch", "transformers"} <= others


def test_floors_are_the_lowest_versions_asked_for() -> None:
    asked = ["torch>=2.4", "captum<0.10,>=0.9", "pandas>=2; extra == 'export'", "ruff"]
    assert floors(asked) == ["torch==2.4", "captum==0.9", "pandas==2"]


def test_a_typed_script_runs() -> None:
    use(tiny_model("llama"), tiny_tokenizer())
