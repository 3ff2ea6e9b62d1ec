"""What has to work on a device: without TensorFlow, ONNX, TensorRT and the like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

HEAVY = (
    "tensorflow",
    "keras",
    "onnx",
    "tf2onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "pycuda",
    "matplotlib",
    "sklearn",
)

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocker())
"""

RUN = """
from vggedge.cli import main
main()
"""


def python(script: str, *arguments: object, blocked: tuple[str, ...] = HEAVY) -> str:
    """Run ``script`` in a new Python in which ``blocked`` cannot be imported; gives stdout."""
    ended = subprocess.run(
        [sys.executable, "-c", BLOCK + script, ",".join(blocked), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_blocker_blocks() -> None:
    for name in HEAVY:
        with pytest.raises(AssertionError, match="blocked"):
            python(f"import {name}")


def test_every_module_can_be_imported_without_anything_heavy() -> None:
    script = """
import importlib, pkgutil
names = []
for package in ("vggedge", "vggedge_export", "vggedge_runtime"):
    names.append(package)
    found = importlib.import_module(package)
    names += [each.name for each in pkgutil.walk_packages(found.__path__, package + ".")]
for name in names:
    importlib.import_module(name)
print(*names)
"""
    names = python(script).split()
    assert {"vggedge.cli.export", "vggedge.training", "vggedge_export.pipeline", "vggedge_runtime.backends.ort"} <= set(
        names
    )


def test_help_of_every_command() -> None:
    script = """
from vggedge.cli import app, main
commands = [each.name for each in app.registered_commands]
for arguments in ([], *([name] for name in commands)):
    sys.argv = ["vggedge", *arguments, "--help"]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
print(*commands)
"""
    out = python(script)
    commands = out.splitlines()[-1].split()
    assert {"models", "train", "export", "infer", "bench", "images"} <= set(commands)
    for name in commands:
        assert f"Usage: vggedge {name} " in out


def test_infer_with_nothing_but_onnxruntime(tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (0, 200, 0)).save(tmp_path / "green.png")
    others = tuple(name for name in HEAVY if name != "onnxruntime")
    out = python(RUN, "infer", tiny_bundle, tmp_path / "green.png", "--json", blocked=others)
    assert json.loads(out)[0]["guesses"][0]["label"] == "green"


def test_bench_with_nothing_but_onnxruntime(tiny_bundle: Path) -> None:
    others = tuple(name for name in HEAVY if name != "onnxruntime")
    options = ("--iterations", 20, "--seconds", 0, "--json")
    out = python(RUN, "bench", tiny_bundle, *options, blocked=others)
    assert len(json.loads(out)["latency"]["samples_ms"]) == 20


@pytest.mark.parametrize("arguments", [["models", "--json"], ["images", "fingers:6", "-o", "{new}", "--json"]])
def test_what_needs_nothing(arguments: list[str], tmp_path: Path) -> None:
    out = python(RUN, *(each.format(new=tmp_path / "new") for each in arguments))
    assert len(json.loads(out)) >= 6


def test_importing_the_runtime_brings_neither_the_command_line_nor_export() -> None:
    script = """
import vggedge_runtime
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    assert not {"vggedge", "vggedge_export", "typer", "rich", *HEAVY} & set(python(script, blocked=("none",)).split())
