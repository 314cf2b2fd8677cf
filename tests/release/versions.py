"""The tests with the lowest and with the newest versions that pyproject.toml allows.

Installs gigabytes and runs for long: `make versions`, before a release. Which folder:
``$VERSIONS_FOLDER``, by default ``.versions``. Arguments after the sets go to pytest::

    python -m tests.release.versions lowest -m "not real_model" -n 2
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from packaging.requirements import Requirement

from tests.release.environments import ROOT, Environment, build, requirements

SHOWN = ("captum", "torch", "transformers", "numpy", "matplotlib")


def floors(asked: list[str]) -> list[str]:
    """`name==version` for every requirement with a lowest version (`name>=version`)."""
    return [
        f"{requirement.name}=={bound.version}"
        for requirement in map(Requirement, asked)
        for bound in requirement.specifier
        if bound.operator == ">="
    ]


def tests_pass(name: str, folder: Path, arguments: list[str]) -> bool:
    """Run the tests in an environment of a set of versions."""
    print(f"== {name} versions", flush=True)
    environment = Environment(folder / name)
    wheel, _ = build(folder / "dist")
    pins = folder / f"{name}.txt"
    pins.write_text("\n".join(floors(requirements(wheel)) if name == "lowest" else []))
    environment.install(
        "--upgrade", "--upgrade-strategy", "eager", "-c", pins, "-e", f"{ROOT}[dev]"
    )
    environment.run("python", "-c", _VERSIONS)
    ran = environment.run("python", "-m", "pytest", *arguments, cwd=ROOT, check=False)
    return ran.returncode == 0


_VERSIONS = f"""
import sys
from importlib.metadata import version
print("python", sys.version.split()[0], *(f"{{name}} {{version(name)}}" for name in {SHOWN!r}))
"""


def main() -> None:
    sets = [name for name in sys.argv[1:3] if name in ("lowest", "newest")]
    arguments = sys.argv[1 + len(sets) :] or ["-n", os.environ.get("WORKERS", "2"), "-q"]
    folder = Path(os.environ.get("VERSIONS_FOLDER", ROOT / ".versions"))
    passed = {name: tests_pass(name, folder, arguments) for name in sets or ["lowest", "newest"]}
    for name, good in passed.items():
        print(f"{name}: {'passed' if good else 'FAILED'}")
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
