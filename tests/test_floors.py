"""A file imports only from lower floors (DESIGN section 4)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu(reason="what is imported")

PACKAGE = Path(__file__).parent.parent / "revhooks"
FLOORS = {
    "capture": 0, "errors": 0, "record": 0, "tracing": 0,
    "fingerprint": 1, "projection": 1, "storage": 1, "owned": 1, "generators": 1, "precision": 1, "streams": 1, "private": 1,
    "kinds": 2, "reach": 2, "names": 3, "saved": 3, "quiet": 4, "effects": 4,
    "state": 5, "functional": 5, "solvers": 5,
    "registry": 6, "ops": 6,
    "nn": 7,
    "runtime": 8,
    "context": 9,
    "checking": 10, "profile": 10,
    "cli": 11, "__main__": 12,
}  # fmt: skip
REPORT_MAY = {"record"}  # and rich


def floor_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, runtime_only: bool = True) -> set[str]:
    """What of the package a file imports, by the first part of its name; imports for types only do not count."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in skipped:
            continue
        base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
        base = tuple(part for part in base if part)
        found.update([base[0]] if base else [alias.name for alias in node.names])
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = floor_name(path)
    used = imports(path) - {here}
    if here == "report":
        assert used <= REPORT_MAY
        return
    assert not {name for name in used - {"report"} if FLOORS[name] >= FLOORS[here]}
    assert "report" not in used or here == "cli"


def test_report_and_record_do_not_need_torch() -> None:
    code = (
        "import sys, revhooks, revhooks.record, revhooks.report.tables, revhooks.report.timeline;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, revhooks; assert not {'torch', 'rich', 'psutil', 'numpy'} & set(sys.modules); revhooks.reversible"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists() -> None:
    import revhooks

    assert all(hasattr(revhooks, name) for name in revhooks.__all__)
    assert set(revhooks.__all__) <= set(dir(revhooks))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        revhooks.nothing
