"""A bundle of a few hundred bytes, made without TensorFlow: its network names the brightest colour.

One place for all tests that need a bundle or the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_runtime.bundle import (
    FORMAT_VERSION,
    Bundle,
    Comparison,
    GoldenRecord,
    GraphRecord,
    Manifest,
    write_bundle,
    write_manifest,
)
from vggedge_runtime.graphs import GRAPHS
from vggedge_runtime.preprocess import ImageSpec, Pixels
from vggedge_runtime.statistics import build_proportion

LABELS = ("red", "green", "blue")
IMAGE = ImageSpec(height=4, width=6)
SHARPNESS = 0.05
"""What a unit of brightness counts in the softmax."""


@pytest.fixture(scope="session", autouse=True)
def users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stands for the user's cache folder all through a run: no test reads or writes the real one.

    Of session scope, because exports of module scope are made before any fixture of a single test.
    """
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def answer(images: Pixels) -> np.ndarray:
    """What the tiny network has to say of (n, 4, 6, 3) images, in float64 NumPy."""
    scores = images.astype(np.float64).mean(axis=(1, 2)) * SHARPNESS
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def golden_images() -> Pixels:
    return np.random.default_rng(7).integers(0, 256, (3, *IMAGE.shape), dtype=np.uint8)


def write_graph(path: Path, weights: np.ndarray | None = None) -> None:
    """Mean over the image, times ``weights`` (3, classes), softmax."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    weights = np.eye(3) * SHARPNESS if weights is None else weights
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=types.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array([1, 2]), "axes"),
        onnx.numpy_helper.from_array(weights.astype(np.float32), "weights"),
    ]
    inputs = [helper.make_tensor_value_info("images", types.UINT8, ["N", *IMAGE.shape])]
    outputs = [helper.make_tensor_value_info("probabilities", types.FLOAT, ["N", weights.shape[1]])]
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def write_tiny_bundle(
    path: Path,
    graphs: Sequence[str] = ("fp32",),
    *,
    weights: np.ndarray | None = None,
    model: bytes | None = None,
    golden: np.ndarray | None = None,
    labels: tuple[str, ...] = LABELS,
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Bundle:
    """Write a bundle; ``weights`` replace the network's, ``model`` all of it, ``golden`` the wanted answers."""
    count = build_proportion(3, 3)
    with write_bundle(path) as folder:
        (folder / "graphs").mkdir()
        (folder / "golden").mkdir()
        records: dict[str, GraphRecord] = {}
        for name in graphs:
            if model is None:
                write_graph(folder / f"graphs/model.{name}.onnx", weights)
            else:
                (folder / f"graphs/model.{name}.onnx").write_bytes(model)
            np.save(folder / f"golden/outputs.{name}.npy", answer(golden_images()) if golden is None else golden)
            records[name] = GraphRecord(
                file=f"graphs/model.{name}.onnx",
                precision=GRAPHS[name].precision if name in GRAPHS else name,
                made_for=("ort",),
                op_counts={"MatMul": 1},
                evidence=Comparison(
                    against="keras",
                    obtained="measured",
                    images=3,
                    max_abs_difference=0.0,
                    agreement=count,
                    accuracy=count,
                ),
            )
        np.save(folder / "golden/inputs.npy", golden_images())
        (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name="tiny",
            created="2026-01-01T00:00:00+00:00",
            parameters=9,
            image=IMAGE,
            labels=labels,
            graphs=records,
            golden=GoldenRecord(
                inputs="golden/inputs.npy", outputs={name: f"golden/outputs.{name}.npy" for name in graphs}
            ),
            passes=(),
            keras_accuracy=build_proportion(3, 3),
            data={},
            tools={},
            files={},
        )
        write_manifest(folder, change(manifest))
    return Bundle.open(path)


@pytest.fixture
def tiny() -> Any:
    """write_tiny_bundle."""
    return write_tiny_bundle


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Path:
    """Folder of a bundle with one fp32 graph for 4x6 images and the classes red, green, blue."""
    return write_tiny_bundle(tmp_path / "tiny").path


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``vggedge ARGUMENTS...`` in this process, as the console script does; gives (exit code, stdout, stderr)."""
    from vggedge.cli import main

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setenv("COLUMNS", "300")  # typer folds its usage errors to the terminal's width
        monkeypatch.setattr(sys, "argv", ["vggedge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        found = capsys.readouterr()
        return ended.value.code, found.out, found.err

    return run
