"""Sizes and habits that a reader may rely on; ruff and mypy know nothing of these."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from vggedge.cli import app

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "vggedge", ROOT / "export/vggedge_export", ROOT / "runtime/vggedge_runtime")
MODULES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
MOST_LINES_OF_A_MODULE = 420
MOST_LINES_OF_A_FUNCTION = 65


def test_the_packages_were_found() -> None:
    names = {path.name for path in MODULES}
    assert {"pipeline.py", "session.py", "architecture.py", "fingers.py"} <= names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MOST_LINES_OF_A_MODULE
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}
    # `python -O` drops an assert, and a print goes past --json and into a caller's own output.
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []


@pytest.mark.parametrize("name", [each.name for each in app.registered_commands])
def test_the_readme_mentions_every_command(name: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\bvggedge {name}\b", text)
