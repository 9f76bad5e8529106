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
    "backward": 0, "capture": 0, "errors": 0, "record": 0, "tracing": 0, "watching": 0,
    "hollow": 1, "storage": 1, "owned": 1, "generators": 1, "precision": 1, "streams": 1, "private": 1,
    "fingerprint": 2, "kinds": 2, "projection": 2, "reach": 2, "names": 3, "saved": 3, "quiet": 4, "effects": 4,
    "modes": 4, "splines": 4, "buffers": 5, "functional": 5, "solvers": 5,
    "registry": 6, "ops": 6,
    "nn": 7,
    "adapters": 8, "flows": 8, "ladj": 8, "runtime": 8,
    "context": 9, "volume": 9,
    "checking": 10, "profiler": 10, "integrations": 10,
    "cli": 11, "__main__": 12,
}  # fmt: skip
RUNTIME = {
    "aside": 0, "passes": 0, "tree": 0,
    "policy": 1, "offload": 2, "handles": 3, "recompute": 4, "calls": 5, "frames": 6,
    "named": 7, "packing": 7, "whole": 7,
    "run": 8,
}  # fmt: skip
REPORT_MAY = {"record"}  # and rich


def floor_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules(path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports, as parts of their names; those for types only among them."""
    found = set()
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *filter(None, (node.module or "").split(".")))
            for alias in node.names:
                inner = PACKAGE.joinpath(*base, alias.name)
                found.add((*base, alias.name) if inner.is_dir() or inner.with_suffix(".py").exists() else base)
    return found - {()}


def imports(path: Path) -> set[str]:
    """What of the package a file imports, by the first part of its name."""
    return {parts[0] for parts in modules(path)}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = floor_name(path)
    used = imports(path) - {here}
    if here == "report":
        assert used <= REPORT_MAY
        return
    assert not {name for name in used - {"report"} if FLOORS[name] >= FLOORS[here]}
    assert "report" not in used or here in ("cli", "profiler")


IN_RUNTIME = [path for path in FILES if path.parts[len(PACKAGE.parts)] == "runtime" and path.name != "__init__.py"]


@pytest.mark.parametrize("path", IN_RUNTIME, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_folders_of_the_runtime_have_floors(path: Path) -> None:
    """What is imported for types counts as well: nothing knows what is above it."""
    here = path.relative_to(PACKAGE).parts[1].removesuffix(".py")
    used = {parts[1] for parts in modules(path) if parts[0] == "runtime" and len(parts) > 1} - {here}
    assert not {name for name in used if RUNTIME[name] >= RUNTIME[here]}


def test_no_two_files_of_the_runtime_import_each_other() -> None:
    """Nor many in a circle, within a folder either."""
    left = {path.relative_to(PACKAGE).with_suffix("").parts: modules(path) for path in IN_RUNTIME}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert not left


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
