"""The table of methods, from the registry into README and docs/api.md.

`python -m tests.docs.method_table` writes it; `test_method_table.py` holds the pages to it.
"""

from __future__ import annotations

from captum_llm_ext.registry import METHODS, Method, load
from tests.docs.documents import ROOT

PAGES = (ROOT / "README.md", ROOT / "docs" / "api.md")
START, END = "<!-- table: python -m tests.docs.method_table -->", "<!-- end of method_table -->"


def table() -> str:
    """A row for each method: its name, class, wrapper and line of help."""
    lines = ["| `method=` | class | wrapper | what it gives |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        wrapper = method.wrapped_by.path.rpartition(":")[2]
        lines.append(f'| "{name}" | `{_class_name(method)}` | `{wrapper}` | {method.help} |')
    return "\n".join(lines)


def _class_name(method: Method) -> str:
    """The class that a user names: Captum's own, if a driver of ours runs it."""
    chosen = load(method.driver).drives if method.driver else load(method.path)
    return str(chosen.__name__)


def write() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        before, after = text.split(START)[0], text.split(END)[1]
        page.write_text(f"{before}{START}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write()
