from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from vggedge_export.packing import PackResult
from vggedge_runtime.bundle import Bundle, hash_file
from vggedge_runtime.engine_cache import EngineKey, write_engine

CommandLine = Callable[..., tuple[object, str, str]]

HEAVY = (
    "tensorflow",
    "keras",
    "tf2onnx",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "pycuda",
    "google",  # protobuf
    "tritonclient",
    "polygraphy",
)

PACK_WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocker())
from vggedge.cli import main
main()
"""


def add_engine(path: Path, *, product: str = "tensorrt_rtx", batches: tuple[int, int, int] = (1, 1, 1)) -> str:
    """Fingerprint of a new engine of the fp32 graph."""
    key = EngineKey(
        product=product,
        version="1.7.1",
        devices=("8.6", "12.0") if product == "tensorrt_rtx" else ("Orin (8.7)",),
        graph="fp32",
        graph_sha256=Bundle.open(path).manifest.files["graphs/model.fp32.onnx"].sha256,
        batches=batches,
        options={},
    )
    write_engine(path, key, b"plan", 1.0)
    return key.fingerprint


def test_onnx(tiny_bundle: Path, tmp_path: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("pack", tiny_bundle, "--to", "onnx", "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"Packed {tiny_bundle} into {tmp_path / 'out'}"
    digest = hash_file(tiny_bundle / "graphs/model.fp32.onnx")
    assert any("model.fp32.onnx" in line and digest[:16] in line for line in lines)
    assert lines[-1] == "Graph fp32, made for ort."
    assert (tmp_path / "out/model.fp32.onnx").is_file()


def test_json(tiny_bundle: Path, tmp_path: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("pack", tiny_bundle, "--to", "triton", "-o", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    found = msgspec.json.decode(out, type=PackResult)
    assert (found.bundle, found.target, found.folder) == (str(tiny_bundle), "triton", str(tmp_path / "out"))
    assert (found.graph, found.engine) == ("fp32", None)
    assert set(found.files) == {"tiny/1/model.onnx", "tiny/config.pbtxt", "tiny/labels.txt"}
    assert all(record.sha256 == hash_file(tmp_path / "out" / name) for name, record in found.files.items())


def test_engine_prints_its_command(tiny_bundle: Path, tmp_path: Path, command_line: CommandLine) -> None:
    fingerprint = add_engine(tiny_bundle, batches=(1, 2, 4))
    code, out, _ = command_line("pack", tiny_bundle, "--to", "engine", "-o", tmp_path / "out")
    assert code == 0
    assert out.splitlines()[-3:] == [
        "Engine: fp32 for tensorrt_rtx 1.7.1 on compute capability 8.6, 12.0, batches 1 to 4, best 2.",
        "Run it where the tool is installed:",
        f"  tensorrt_rtx --loadEngine={tmp_path}/out/fp32.engine --shapes=images:2x4x6x3",
    ]
    chosen = ("--engine", fingerprint[:6], "--precision", "fp32", "--json")
    code, out, _ = command_line("pack", tiny_bundle, "--to", "engine", *chosen, "-o", tmp_path / "other")
    assert (code, json.loads(out)["engine"]) == (0, fingerprint)


def test_every_option_of_triton_arrives(tiny_bundle: Path, tmp_path: Path, command_line: CommandLine) -> None:
    options = ("--name", "eyes", "--max-batch", 4, "--max-queue-delay-us", 250, "--gpu", "--platform", "onnxruntime")
    code, out, _ = command_line("pack", tiny_bundle, "--to", "triton", *options, "-o", tmp_path / "out")
    assert code == 0
    assert out.splitlines()[-1] == f"  tritonserver --model-repository={tmp_path / 'out'}"
    config = (tmp_path / "out/eyes/config.pbtxt").read_text()
    for wanted in ("max_batch_size: 4", "max_queue_delay_microseconds: 250", "kind: KIND_GPU", 'name: "eyes"'):
        assert wanted in config
    add_engine(tiny_bundle, product="tensorrt")
    code, _, _ = command_line("pack", tiny_bundle, "--to", "triton", "--platform", "tensorrt", "-o", tmp_path / "plan")
    assert code == 0
    assert (tmp_path / "plan/tiny/1/model.plan").read_bytes() == b"plan"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--to", "tflite"), 2, "target 'tflite' is unknown; known: triton, onnx, engine."),
        (("--to", "onnx", "--precision", "fp8"), 2, "precision 'fp8' is unknown"),
        (("--to", "onnx", "--precision", "int8"), 1, "no int8 graph in this bundle; it has: fp32."),
        (("--to", "onnx", "--gpu"), 2, "gpu: of no use to onnx."),
        (("--to", "engine"), 1, "no engine in this bundle. Build one with: vggedge build"),
    ],
)
def test_errors_leave_nothing(
    tiny_bundle: Path, tmp_path: Path, command_line: CommandLine, options: tuple[str, ...], code: int, said: str
) -> None:
    before = sorted(tmp_path.iterdir())
    found, out, err = command_line("pack", tiny_bundle, *options, "-o", tmp_path / "out")
    assert (found, out) == (code, "")
    assert said in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "options",
    [("--to", "onnx"), ("--to", "engine"), ("--to", "triton"), ("--to", "triton", "--platform", "tensorrt")],
)
def test_works_without_anything_heavy(tiny_bundle: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    add_engine(tiny_bundle, product="tensorrt")
    arguments = ("pack", tiny_bundle, *options, "-o", tmp_path / "out", "--json")
    done = subprocess.run(
        [sys.executable, "-c", PACK_WITHOUT, ",".join(HEAVY), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)["files"]) == {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
