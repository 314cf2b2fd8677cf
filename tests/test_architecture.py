"""The shape of the package: imports run one way, names say what is meant, the registry is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import captum_llm_ext
from captum_llm_ext.registry import METHODS, WRAPPERS, load

PACKAGE = Path(captum_llm_ext.__file__).parent
# A folder or module imports from those above it; those of one line do not import one another.
FLOORS = [
    ["_version", "warning"],
    ["compat"],
    ["registry"],
    ["model"],
    ["inputs"],
    ["scoring"],
    ["choosing"],
    ["display"],
    ["results"],
    ["gradients", "perturbations", "attention"],
    ["explaining"],
    ["metrics", "batches", "zooming"],
    ["cli"],
    ["__init__", "__main__"],
]
LATER = ("passages", "estimate", "flow")  # functions to come


def room(parts: tuple[str, ...]) -> str:
    """The folder, or the module beside the folders, that a path or an import names."""
    return parts[0].removesuffix(".py") if parts else "__init__"


def imports(path: Path) -> Iterator[str]:
    """The rooms that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("captum_llm_ext"):
            yield room(tuple((node.module or "").split(".")[1:]))


def test_a_result_may_import_a_plot_and_no_plot_a_result() -> None:
    assert "display" in set(imports(PACKAGE / "results" / "display_mixin.py"))
    assert all("results" not in set(imports(p)) for p in (PACKAGE / "display").glob("*.py"))


def test_imports_run_one_way() -> None:
    floor_of = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    against = [
        f"{path.relative_to(PACKAGE)} imports {target}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for here in [room(path.relative_to(PACKAGE).parts)]
        for target in imports(path)
        if target != here and floor_of[target] >= floor_of[here]
    ]
    assert against == []


def test_no_file_has_the_name_of_a_function() -> None:
    public = [getattr(captum_llm_ext, name) for name in captum_llm_ext.__all__]
    functions = {f.__name__ for f in public if callable(f) and not isinstance(f, type)}
    stems = {path.stem for path in PACKAGE.rglob("*.py")} | {p.name for p in PACKAGE.iterdir()}
    assert stems & {*functions, *LATER} == set()


def test_every_row_of_the_registry_leads_to_a_method() -> None:
    for name, method in METHODS.items():
        paths = [method.path, method.wrapped_by.path, *filter(None, [method.driver])]
        assert all(callable(load(path)) for path in paths), name
        assert method.help, name
    assert {method.wrapper for method in METHODS.values()} == set(WRAPPERS)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("captum_llm_ext", ["torch", "transformers", "captum"]),
        ("captum_llm_ext.registry", ["torch", "transformers", "captum"]),
    ],
)
def test_imports_nothing_heavy(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_all_there() -> None:
    assert set(captum_llm_ext.__all__) <= set(dir(captum_llm_ext))
    assert all(hasattr(captum_llm_ext, name) for name in captum_llm_ext.__all__)
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        captum_llm_ext.explian  # noqa: B018
