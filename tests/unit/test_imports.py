"""Imports point one way, and what must be pure imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lamina

ROOT = Path(lamina.__file__).parent
TIERS = (
    {"errors", "types", "config", "_native"},
    {"sched", "plan"},
    {"attention", "convert", "kv", "transport", "demo"},
    {"workers"},
    {"engine"},
    {"server", "deploy", "bench"},
    {"cli"},
)
PURE = (
    "sched",
    "plan",
    "transport/wire.py",
    "transport/topology.py",
    "types.py",
    "config.py",
    "errors.py",
)


def tier(part: str) -> int:
    (index,) = [i for i, names in enumerate(TIERS) if part in names]
    return index


def imported_modules(path: Path) -> set[str]:
    """Modules that the file imports, at any place in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__"):
        return
    for module in imported_modules(path):
        names = module.split(".")
        if names[0] == "lamina" and len(names) > 1:
            assert tier(names[1]) <= tier(part), f"{part} must not import {module}"


def test_every_file_is_short() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in ROOT.rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 450
    }
    assert long == {}


def test_scheduling_needs_no_torch() -> None:
    modules = [
        ".".join(("lamina", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for pure in PURE
        for path in ([ROOT / pure] if pure.endswith(".py") else sorted((ROOT / pure).glob("*.py")))
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_needs_no_server_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'starlette', 'pydantic', 'prometheus_client'):\n"
        "    sys.modules[name] = None\n"
        "import lamina.engine.engine, lamina.engine.service, lamina.engine.llm\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
