from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vggedge_export.calibration import largest_magnitudes
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_runtime.errors import ConversionError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 4, 5, 3), dtype=np.uint8)
KERNEL = RNG.normal(size=(6, 3, 1, 1)).astype(np.float32)


def graph(kernel: np.ndarray = KERNEL, after: str = "Relu") -> Graph:
    """``images`` -> Cast -> Transpose -> 1x1 convolution -> ``after`` -> 2x2 maxima."""
    nodes = [
        make_node("Cast", ["images"], "pixels", to=onnx.TensorProto.FLOAT),
        make_node("Transpose", ["pixels"], "t", perm=[0, 3, 1, 2]),
        make_node("Conv", ["t", "k"], "conv"),
        make_node(after, ["conv"], "relu"),
        make_node("MaxPool", ["relu"], "probabilities", kernel_shape=[2, 2]),
    ]
    inputs = [value_info("images", np.uint8, ["N", 4, 5, 3])]
    return Graph(nodes, {"k": kernel}, inputs, [value_info("probabilities", np.float32, ["N", "c", "h", "w"])])


def numpy_maxima(images: np.ndarray, kernel: np.ndarray = KERNEL) -> dict[str, float]:
    conv = images.astype(np.float64) @ kernel[:, :, 0, 0].T.astype(np.float64)
    return {"t": float(images.max()), "conv": float(np.abs(conv).max()), "relu": float(np.maximum(conv, 0).max())}


def measure(tmp_path: Path, **options: object) -> dict[str, float]:
    settings = {
        "graph": graph(),
        "tensors": ["t", "conv", "relu"],
        "images": IMAGES,
        "batch": 4,
        "scratch": tmp_path / "probe.onnx",
        "progress": lambda done, total, what: None,
    } | options
    return largest_magnitudes(settings.pop("graph"), settings.pop("tensors"), settings.pop("images"), **settings)


@pytest.mark.parametrize("batch", [1, 4, 23, 100])
def test_ranges_are_numpys_maxima_whatever_the_batch(batch: int, tmp_path: Path) -> None:
    found = measure(tmp_path, batch=batch)
    assert list(found) == ["t", "conv", "relu"]
    assert found == pytest.approx(numpy_maxima(IMAGES), rel=1e-5)
    assert all(type(value) is float for value in found.values())


def test_ranges_are_the_same_to_the_last_bit_for_every_batch(tmp_path: Path) -> None:
    found = [measure(tmp_path, batch=batch)["t"] for batch in (1, 5, 23)]
    assert set(found) == {float(IMAGES.max())}


@pytest.mark.parametrize("row", [0, 11, 22])
def test_one_extreme_image_sets_the_range_wherever_it_stands(row: int, tmp_path: Path) -> None:
    images = np.minimum(IMAGES, 100)
    images[row] = 250
    assert measure(tmp_path, images=images) == pytest.approx(numpy_maxima(images), rel=1e-5)


def test_the_magnitude_of_negative_values_counts(tmp_path: Path) -> None:
    kernel = -np.abs(KERNEL)
    found = measure(tmp_path, graph=graph(kernel), tensors=["conv"])
    assert found == pytest.approx({"conv": numpy_maxima(IMAGES, kernel)["conv"]}, rel=1e-5)


def test_the_graph_is_not_changed_and_the_scratch_file_is_removed(tmp_path: Path) -> None:
    original = graph()
    before = original.to_bytes()
    measure(tmp_path, graph=original)
    assert original.to_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_images_to_the_last(tmp_path: Path) -> None:
    seen: list[tuple] = []
    measure(tmp_path, batch=10, progress=lambda *told: seen.append(told))
    assert seen == [(10, 23, "calibrating"), (20, 23, "calibrating"), (23, 23, "calibrating")]


def test_a_layer_that_is_zero_on_every_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="relu: zero on all 23 calibration images"):
        measure(tmp_path, graph=graph(-np.abs(KERNEL)))


def test_a_layer_that_is_alive_on_one_image_only_is_not_dead(tmp_path: Path) -> None:
    images = np.zeros_like(IMAGES)
    images[-1, 0, 0] = 1
    assert measure(tmp_path, images=images)["relu"] > 0


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_layer_that_is_not_finite_is_named(bad: float, tmp_path: Path) -> None:
    kernel = KERNEL.copy()
    kernel[3] = bad
    with pytest.raises(ConversionError, match=r"^conv: not finite on a calibration image"):
        measure(tmp_path, graph=graph(kernel))
    assert list(tmp_path.iterdir()) == []


def test_one_value_that_is_no_number_is_found_among_many_that_are(tmp_path: Path) -> None:
    """sqrt of what is negative at some places only: a maximum that skips NaN would hide it."""
    with pytest.raises(ConversionError, match=r"^relu: not finite"):
        measure(tmp_path, graph=graph(after="Sqrt"), tensors=["t", "relu"])


def test_two_layers_may_read_one_tensor(tmp_path: Path) -> None:
    assert measure(tmp_path, tensors=["t", "conv", "conv"]) == pytest.approx(
        {name: numpy_maxima(IMAGES)[name] for name in ("t", "conv")}, rel=1e-5
    )
