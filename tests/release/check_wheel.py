"""The wheel of dist/ in an empty environment: it imports, its types are seen, and README runs.

Installs gigabytes: `make dist`, before a release. README's blocks run away from the clone and print
what README says.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from tests.printed import assert_printed_alike
from tests.release.environments import ROOT, Environment

BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n\n```output\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def check(wheel: Path, folder: Path) -> None:
    environment = Environment(folder / "venv")
    print(f"== {wheel.name} alone", flush=True)
    environment.install(wheel)
    environment.run("captum-llm-ext", "--version", cwd=folder)
    print("== the types that its users see", flush=True)
    environment.install("mypy")
    user = folder / "user.py"
    user.write_text((ROOT / "tests" / "release" / "typed_use.py").read_text())
    environment.run("mypy", "--strict", user.name, cwd=folder)
    print("== README", flush=True)
    environment.install(f"{wheel}[demo,export]")
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    (folder / "readme.py").write_text("\n".join(code for code, _ in blocks))
    command = [environment.bin / "python", "readme.py"]
    printed = subprocess.run(command, cwd=folder, check=True, text=True, stdout=subprocess.PIPE)
    expected = "".join(output for _, output in blocks)
    assert_printed_alike(printed.stdout, expected)


def main() -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        check(wheel, Path(folder))
    print(f"{wheel.name} is ready")


if __name__ == "__main__":
    main()
