"""Distributions of the working tree, and fresh environments to install them into."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import PathDistribution
from pathlib import Path
from zipfile import Path as ZipPath

ROOT = Path(__file__).parent.parent.parent


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist that it is made from, in `folder`. Needs no network."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, extras included, as its metadata says it."""
    info = next(path for path in ZipPath(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(info).requires or []


class Environment:
    """A virtual environment in a folder, made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        if not self.bin.exists():
            venv.create(folder, with_pip=True, symlinks=True)

    def install(self, *arguments: str | Path) -> None:
        self.run("python", "-m", "pip", "install", "--quiet", *arguments)

    def run(
        self, program: str, *arguments: str | Path, cwd: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        command: Sequence[str | Path] = [self.bin / program, *arguments]
        return subprocess.run(command, cwd=cwd, check=check, text=True)
