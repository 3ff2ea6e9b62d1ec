"""Who may import whom, and what must not stand in any file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "vggedge", ROOT / "export/vggedge_export", ROOT / "runtime/vggedge_runtime")

# A place on somebody's machine; a path behind a name, as in a URL, is none.
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home|Users|root|work|workspace|mnt/[a-z])/[\w.-]+")
REGISTRY = re.compile(r"https?://\S*/(?:simple|packages)/")


def lint_imports(config: Path) -> str:
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    ended = subprocess.run(
        [sys.executable, "-c", script, str(config)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return ended.stdout + ended.stderr


def test_the_arrows_go_one_way() -> None:
    found = lint_imports(ROOT / "pyproject.toml")
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken\.", found), found


def test_a_wrong_arrow_would_be_found(tmp_path: Path) -> None:
    config = tmp_path / "pyproject.toml"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = 'layers = ["vggedge", "vggedge_export", "vggedge_runtime"]'
    assert layers in text
    config.write_text(text.replace(layers, 'layers = ["vggedge_runtime", "vggedge_export", "vggedge"]'))
    assert re.search(r"[1-9]\d* broken\.", lint_imports(config))


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("tf2onnx", {"export/vggedge_export/conversion.py"}),
        ("pycuda", {"runtime/vggedge_runtime/cuda.py"}),
        ("onnxruntime", {"runtime/vggedge_runtime/backends/ort.py"}),
    ],
)
def test_one_file_knows_the_library(library: str, only: set[str]) -> None:
    uses = re.compile(rf"""require\(\s*["']{library}\b|^\s*(?:import|from) {library}\b""", re.MULTILINE)
    files = [path for folder in PACKAGES for path in folder.rglob("*.py")]
    users = {str(path.relative_to(ROOT)) for path in files if uses.search(path.read_text(encoding="utf-8"))}
    assert users <= only


def text_files() -> list[Path]:
    """Every file that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    return [path for path in files if b"\0" not in path.read_bytes()]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine path", "registry"])
def test_no_file_names_a_machine_or_a_registry(pattern: re.Pattern[str]) -> None:
    files = text_files()
    assert {"pyproject.toml", "README.md", "test_architecture_rules.py"} <= {path.name for path in files}
    found = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        for match in pattern.finditer(path.read_text(encoding="utf-8", errors="replace"))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("pattern", "text", "is_found"),
    [
        (MACHINE_PATH, "see /" + "home/ann/models", True),
        (MACHINE_PATH, "'/" + "root/.cache'", True),
        (MACHINE_PATH, "https://example.org/" + "home/ann", False),
        (MACHINE_PATH, "at /" + "home and there", False),
        (REGISTRY, "https://mirror.example/" + "simple/numpy", True),
        (REGISTRY, "https://example.org/" + "simple-guide", False),
    ],
)
def test_the_patterns(pattern: re.Pattern[str], text: str, is_found: bool) -> None:
    assert bool(pattern.search(text)) == is_found
