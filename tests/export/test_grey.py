"""One grey channel made of RGB: Pillow's levels, in every precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vggedge_export.conversion import check_exportable, graph_from_keras
from vggedge_export.float16 import float16_graph, rounding_twin
from vggedge_export.graph import read_graph, value_info
from vggedge_export.grey import grey_pixels
from vggedge_export.passes import apply_passes
from vggedge_export.pipeline import ExportConfig, export
from vggedge_export.quantization import exact_input_scale
from vggedge_export.verification import Images, LabelledImages, keras_scores
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.errors import ModelError
from vggedge_runtime.preprocess import ImageSpec, Normalization
from vggedge_runtime.progress import ignore_progress

keras: Any = pytest.importorskip("keras")
pytest.importorskip("tf2onnx")
pytest.importorskip("onnxruntime")

layers = keras.layers
Run = Callable[..., list[np.ndarray]]


def grey_model(*head: Any, side: int = 16) -> Any:
    inputs = outputs = keras.Input((side, side, 1), name="photo")
    body = [
        layers.Conv2D(4, 3, activation="relu", name="conv", kernel_initializer=keras.initializers.HeNormal(seed=1)),
        layers.Conv2D(4, 3, activation="relu", name="conv2", kernel_initializer=keras.initializers.HeNormal(seed=2)),
        layers.Flatten(name="flat"),
        layers.Dense(3, "softmax", name="top", kernel_initializer=keras.initializers.GlorotNormal(seed=3)),
    ]
    for layer in (*head, *body):
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


def colours() -> np.ndarray:
    """(2, 256, 256, 3): every pair of red and blue with a green of its own, and then every grey."""
    first, second = np.meshgrid(np.arange(256), np.arange(256))
    mixed = np.stack([first, (first * 7 + second * 13) % 256, second], axis=-1)
    return np.stack([mixed, np.repeat(first[..., None], 3, axis=-1)]).astype(np.uint8)


def test_grey_is_what_pillow_and_so_keras_make_of_a_file(tmp_path: Path) -> None:
    images = colours()
    found = grey_pixels(images)
    Image.fromarray(images[0]).save(tmp_path / "mixed.png")
    loaded = keras.utils.img_to_array(keras.utils.load_img(tmp_path / "mixed.png", color_mode="grayscale"))
    np.testing.assert_array_equal(found[0], loaded)
    np.testing.assert_array_equal(found[1], images[1][..., :1])
    luma = images[0].astype(np.float64) @ (0.299, 0.587, 0.114)
    assert np.abs(found[0, ..., 0] - luma).max() < 0.51


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_makes_the_same_grey_to_the_last_level(precision: str, run_graph: Run) -> None:
    graph = graph_from_keras(grey_model(layers.Rescaling(1 / 128, offset=-1), side=256))
    apply_passes(graph)
    assert [(node.name, node.op_type) for node in graph.nodes][:9] == [
        ("head/cast", "Cast"),
        ("head/grey_scale", "Mul"),
        ("head/grey_sum", "ReduceSum"),
        ("head/grey_offset", "Add"),
        ("head/grey", "Div"),
        ("head/cast_2", "Cast"),
        ("head/transpose", "Transpose"),
        ("head/scale", "Mul"),
        ("head/offset", "Add"),
    ]
    assert graph.inputs == [value_info("images", np.uint8, ["N", 256, 256, 3])]
    assert exact_input_scale(graph) == {"conv": 1 / 128}
    graph = rounding_twin(float16_graph(graph)) if precision == "fp16" else graph
    graph.outputs = [value_info("head/offset", np.float32, ["N", 1, 256, 256])]
    graph.drop_unused()
    images = colours()
    (found,) = run_graph(graph, images=images)
    np.testing.assert_array_equal(found[:, 0] * 128 + 128, grey_pixels(images)[..., 0])


@pytest.mark.parametrize(
    "normalization", [None, Normalization((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))], ids=["inside", "spec"]
)
def test_a_grey_model_is_exported_in_all_precisions(
    normalization: Normalization | None, randomise: Callable[..., None], tmp_path: Path
) -> None:
    model = grey_model(*([layers.Rescaling(1 / 128, offset=-1)] if normalization is None else []))
    randomise(model)
    images = np.random.default_rng(1).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    data = LabelledImages("noise", images, np.arange(24) % 3)
    spec = ImageSpec(height=16, width=16, normalization=normalization)
    config = ExportConfig(engine="none", calibrator="max")
    labels = ("a", "b", "c")
    export(model, tmp_path / "b", image=spec, labels=labels, images=Images(data, data), config=config)
    manifest = Bundle.open(tmp_path / "b").manifest
    (words,) = manifest.adaptations
    assert words.startswith("input: grey made of RGB, as Pillow's convert('L') does")
    differences = {name: record.evidence.max_abs_difference for name, record in manifest.graphs.items()}
    assert differences["fp32"] < 1e-6
    assert differences["fp16"] < 5e-3
    assert max(differences.values()) < 0.1
    scale = read_graph(tmp_path / "b/graphs/model.int8.onnx").weights["conv/input_scale"]
    largest = np.abs(grey_pixels(images) - 127.5).max() / 127.5
    assert scale == pytest.approx(1 / 128 if normalization is None else largest / 127)


def test_keras_gets_one_normalised_channel() -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    inputs = keras.Input((4, 4, 1))
    passed_on = keras.Model(inputs, layers.Flatten()(inputs))
    found = keras_scores(passed_on, Normalization((10, 10, 10), (4, 4, 4)), images, ignore_progress)
    np.testing.assert_allclose(found, (grey_pixels(images).reshape(2, 16) - 10.0) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "normalization",
    [
        Normalization((1, 2, 3), (1, 1, 1)),
        Normalization((1, 1, 1), (1, 1, 2)),
        Normalization((1, 1, 1), (1, 1, 1), "bgr"),
    ],
)
def test_three_ways_to_normalise_one_channel_are_refused(normalization: Normalization) -> None:
    with pytest.raises(ModelError, match="its input 'photo' has one channel, and the image spec normalises three"):
        check_exportable(grey_model(), normalization)
