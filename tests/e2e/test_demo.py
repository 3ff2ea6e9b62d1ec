"""The main job, as `make demo` does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vggedge_runtime import Bundle, Session
from vggedge_runtime.engine_cache import list_engines, read_engine
from vggedge_runtime.preprocess import find_images
from vggedge_runtime.tensorrt_api import installed_products

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "demo"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "demo", done.stdout


def test_it_learns_the_hands(demo: tuple[Path, str]) -> None:
    evidence = {name: graph.evidence for name, graph in Bundle.open(demo[0] / "hand").manifest.graphs.items()}

    assert evidence["fp32"].images == 2000
    assert evidence["fp32"].accuracy.share >= 0.97
    assert evidence["fp32"].max_abs_difference <= 1e-5, "parity with Keras"
    assert evidence["fp32"].agreement.share == 1.0
    assert evidence["fp16"].accuracy.share >= evidence["fp32"].accuracy.share - 0.001
    assert evidence["int8"].accuracy.share >= evidence["fp32"].accuracy.share - 0.01
    assert evidence["int8-rtx"].accuracy.share >= evidence["fp32"].accuracy.share - 0.01


def test_it_builds_an_engine_for_every_graph_of_the_product(demo: tuple[Path, str]) -> None:
    if "tensorrt_rtx" not in installed_products():
        pytest.skip("tensorrt_rtx is not installed on this platform")
    engines = {record.key.graph: record for record in list_engines(demo[0] / "hand")}

    assert set(engines) == {"fp32", "fp16", "int8-rtx"}
    for record in engines.values():
        assert len(read_engine(demo[0] / "hand", record.key)) == record.size_bytes > 100_000


def test_it_answers_pictures_it_has_not_seen(demo: tuple[Path, str]) -> None:
    paths = find_images(demo[0] / "unseen")
    truth = [path.parent.name for path in paths]

    with Session.open(demo[0] / "hand") as session:
        answers = [session.labels[row.argmax()] for row in session.predict(paths)]

    assert len(paths) == 12
    assert np.mean([answer == wanted for answer, wanted in zip(answers, truth, strict=True)]) >= 10 / 12


def test_it_sums_up(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    figures = json.loads((folder / "bench.json").read_text())

    assert len(figures["latency"]["samples_ms"]) >= 1000
    for wanted in ("Summary", "int8-rtx", "not measured", "hand.keras", "bench.json", "Whole demo"):
        assert wanted in printed
