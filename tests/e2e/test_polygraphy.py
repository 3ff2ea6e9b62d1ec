"""NVIDIA's Polygraphy over packed graphs: it shows the contract, and ONNX Runtime in it gives the golden answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_export.packing import PackConfig, pack
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.graphs import golden_tolerance
from vggedge_runtime.preprocess import ImageSpec

pytest.importorskip("polygraphy", reason="polygraphy is not installed; it comes with the dev extra")
pytest.importorskip("keras")
pytest.importorskip("tf2onnx")
pytest.importorskip("onnxruntime")

GRAPHS = ("fp32", "fp16", "int8", "int8-rtx")
SIZE = 32
CLASSES = 5


def make_model() -> Any:
    """A small VGG whose answers are neither sure nor flat, so that a wrong layout would show."""
    from vggedge.architecture import get_spec
    from vggedge.model import build_vgg, import_keras

    keras = import_keras()
    model = build_vgg(get_spec("vgg9-compact", input=(SIZE, SIZE, 3), classes=CLASSES), seed=3)
    features = keras.Model(model.inputs[0], model.layers[-2].output)
    found = np.asarray(features(draw(8, 7).astype(np.float32), training=False))
    kernel, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([kernel * 1.5 / (found @ kernel).std(), bias])
    return model


def draw(count: int, seed: int) -> np.ndarray:
    """Pictures with a tint and noise, uint8 (count, 32, 32, 3)."""
    rng = np.random.default_rng(seed)
    return (rng.random((count, 1, 1, 3)) * 200 + rng.integers(0, 56, (count, SIZE, SIZE, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from vggedge_export.pipeline import ExportConfig, export
    from vggedge_export.verification import Images, LabelledImages

    path = tmp_path_factory.mktemp("polygraphy") / "bundle"
    parts = [LabelledImages(f"seed {seed}", draw(16, seed), np.arange(16) % CLASSES) for seed in (1, 2, 3)]
    export(
        make_model(),
        path,
        image=ImageSpec(height=SIZE, width=SIZE),
        labels=tuple("abcde"),
        images=Images(*parts),
        config=ExportConfig(engine="none"),
    )
    return Bundle.open(path)


@pytest.fixture(scope="module")
def packed(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Graph -> the ONNX file that ``vggedge pack --to onnx`` writes."""
    folder = tmp_path_factory.mktemp("packed")
    for graph in GRAPHS:
        pack(bundle, folder / graph, PackConfig(target="onnx", precision=graph))
    return {graph: folder / graph / f"model.{graph}.onnx" for graph in GRAPHS}


def polygraphy(*arguments: object) -> tuple[int, str]:
    """Run the tool in a process of its own, which can neither reach a network nor install anything."""
    environment = os.environ | {
        "POLYGRAPHY_AUTOINSTALL_DEPS": "0",
        "PIP_NO_INDEX": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    script = "import sys; from polygraphy.tools import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("graph", GRAPHS)
def test_inspect_shows_the_contract(bundle: Bundle, packed: dict[str, Path], graph: str) -> None:
    code, out = polygraphy("inspect", "model", packed[graph])
    assert code == 0, out
    assert f"{{images [dtype=uint8, shape=('N', {SIZE}, {SIZE}, 3)]}}" in out
    assert f"{{probabilities [dtype=float32, shape=('N', {CLASSES})]}}" in out
    assert f"---- {sum(bundle.graph(graph).op_counts.values())} Node(s) ----" in out


def write_golden(bundle: Bundle, graph: str, folder: Path, shift: int = 0) -> tuple[Path, Path]:
    """(script that loads the golden inputs, golden outputs as Polygraphy stores results, by ``shift`` classes off)."""
    from polygraphy.comparator import IterationResult, RunResults

    golden = bundle.manifest.golden
    script = folder / "load_golden.py"
    script.write_text(
        "import numpy as np\n\n\ndef load_data():\n"
        f"    for image in np.load({str(bundle.path / golden.inputs)!r}):\n"
        "        yield {'images': image[None]}\n"
    )
    answers = np.roll(np.load(bundle.path / golden.outputs[graph]), shift, axis=1)
    results = [IterationResult({"probabilities": row[None]}, runner_name="golden") for row in answers]
    RunResults([("golden", results)]).save(str(folder / "golden.json"))
    return script, folder / "golden.json"


def run_against_golden(bundle: Bundle, graph: str, model: Path, folder: Path, shift: int = 0) -> tuple[int, str]:
    script, answers = write_golden(bundle, graph, folder, shift)
    tolerance = golden_tolerance(graph, "ort")
    compare = ("--load-outputs", answers, "--atol", tolerance, "--rtol", 0, "--validate")
    return polygraphy("run", model, "--onnxrt", "--data-loader-script", script, *compare)


@pytest.mark.parametrize("graph", GRAPHS)
def test_onnx_runtime_in_it_gives_the_golden_answers(
    bundle: Bundle, packed: dict[str, Path], graph: str, tmp_path: Path
) -> None:
    code, out = run_against_golden(bundle, graph, packed[graph], tmp_path)
    assert code == 0, out
    assert "Passed: 4/4 iterations" in out
    assert f"{{images [dtype=uint8, shape=(1, {SIZE}, {SIZE}, 3)]}}" in out


@pytest.mark.parametrize("graph", GRAPHS)
def test_answers_of_other_classes_do_not_pass(
    bundle: Bundle, packed: dict[str, Path], graph: str, tmp_path: Path
) -> None:
    code, out = run_against_golden(bundle, graph, packed[graph], tmp_path, shift=1)
    assert code != 0
    assert "FAILED" in out


@pytest.mark.parametrize("graph", GRAPHS)
def test_its_own_data_runs_in_a_batch(packed: dict[str, Path], graph: str) -> None:
    shape = ("--input-shapes", f"images:[3,{SIZE},{SIZE},3]", "--val-range", "images:[0,255]")
    code, out = polygraphy("run", packed[graph], "--onnxrt", *shape, "--validate")
    assert code == 0, out
    assert f"{{probabilities [dtype=float32, shape=(3, {CLASSES})]}}" in out
