"""Whole exports of small models that are no VGG: every graph of each, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_export.conversion import check_exportable, graph_from_keras, normalizing_layer
from vggedge_export.graph import Graph
from vggedge_export.pipeline import ExportConfig, ExportResult, export
from vggedge_export.verification import Images, LabelledImages
from vggedge_runtime.errors import ConversionError, ModelError
from vggedge_runtime.preprocess import ImageSpec, Normalization

keras: Any = pytest.importorskip("keras")
pytest.importorskip("tf2onnx")
layers, ops = keras.layers, keras.ops

IMAGE = ImageSpec(height=16, width=16)
CLASSES = 3


def attention(x: Any) -> Any:
    x = layers.Reshape((64, 6))(layers.Conv2D(6, 3, strides=2, padding="same")(x))
    return layers.GlobalAveragePooling1D()(layers.MultiHeadAttention(2, 4)(x, x))


def recurrent(x: Any) -> Any:
    return layers.LSTM(6, unroll=True)(layers.Reshape((8, 24))(layers.Conv2D(3, 3, strides=2, padding="same")(x)))


def two_heads(x: Any) -> Any:
    x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(x))
    return layers.Average()([layers.Dense(CLASSES, name="top")(x), layers.Dense(CLASSES, name="top_b")(x)])


BODIES: dict[str, Callable[[Any], Any]] = {
    "attention": attention,
    "unrolled LSTM": recurrent,
    "threshold": lambda x: layers.Flatten()(layers.ReLU(threshold=0.2)(layers.Conv2D(4, 3)(x))),
    "where": lambda x: layers.Flatten()((lambda y: ops.where(y > 0, y, 0.1 * y))(layers.Conv2D(4, 3)(x))),
    "soft shrink": lambda x: layers.Flatten()(ops.soft_shrink(layers.Conv2D(4, 3)(x))),
    "sparse plus": lambda x: layers.Flatten()(ops.sparse_plus(layers.Conv2D(4, 3)(x))),
    "flip": lambda x: layers.Flatten()(layers.Conv2D(4, 3)(ops.flip(x, axis=2))),
    "resized": lambda x: layers.Flatten()(layers.Conv2D(4, 3)(layers.Resizing(12, 12)(x))),
    "upsampled": lambda x: layers.Flatten()(
        layers.UpSampling2D(2, interpolation="bilinear")(layers.Conv2D(2, 3, strides=2)(x))
    ),
}


def build(body: Callable[[Any], Any], *ends: Any, channels: int = 3) -> Any:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((16, 16, channels))
    outputs = body(layers.Rescaling(1 / 128, offset=-1)(inputs))
    for end in ends or (layers.Dense(8, activation="relu"), layers.Dense(CLASSES, activation="softmax")):
        outputs = end(outputs)
    return keras.Model(inputs, outputs)


def pictures(count: int = 24, seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    images = (rng.random((count, 1, 1, 3)) * 150 + rng.integers(0, 106, (count, 16, 16, 3))).astype(np.uint8)
    return LabelledImages(f"pictures {seed}", images, np.arange(count, dtype=np.int64) % CLASSES)


def run_export(model: Any, path: Path, **options: Any) -> ExportResult:
    given: dict[str, Any] = {
        "image": IMAGE,
        "labels": ("a", "b", "c"),
        "images": Images(calibration=pictures(), evaluation=pictures(seed=1)),
        "config": ExportConfig(engine="none", calibrator="max"),
        **options,
    }
    return export(model, path, **given)


@pytest.mark.parametrize("name", BODIES)
def test_every_graph_answers_as_the_model(name: str, tmp_path: Path) -> None:
    graphs = run_export(build(BODIES[name]), tmp_path / "b").manifest.graphs
    assert list(graphs) == ["fp32", "fp16", "int8", "int8-rtx"]
    off = {each: record.evidence.max_abs_difference for each, record in graphs.items()}
    assert off["fp32"] < 1e-5
    assert off["fp16"] < 5e-3
    assert 0 < off["int8"] < 0.08
    assert off["int8-rtx"] < 0.12


def test_both_of_two_last_layers_stay_out_of_int8(tmp_path: Path) -> None:
    graph = run_export(build(two_heads, layers.Softmax()), tmp_path / "b").manifest.graphs["int8"]
    assert graph.op_counts["QuantizeLinear"] == 1  # the input of the convolution


def test_well_separated_sigmoids_are_not_taken_for_probabilities(tmp_path: Path) -> None:
    """On every evaluation image one of them is 1 and the others are 0; on other images they are not."""
    images = pictures(9, seed=1).images // 4
    images[np.arange(9), :, :, np.arange(9) % 3] += 180
    sure = layers.Dense(3, activation="sigmoid", kernel_initializer=keras.initializers.Identity(40), use_bias=False)
    inputs = keras.Input((16, 16, 3))
    means = layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 128, offset=-1)(inputs))
    model = keras.Model(inputs, sure(means))
    targets = np.arange(9, dtype=np.int64) % 3
    clear = LabelledImages("clear", images, targets)
    result = export(
        model, tmp_path / "b", image=IMAGE, labels=("a", "b", "c"), images=Images(clear, clear),
        config=ExportConfig(precisions=("fp32",), engine="none"),
    )  # fmt: skip
    assert "divided by their sum" in result.manifest.adaptations[0]


def test_a_named_output_is_one_output(tmp_path: Path) -> None:
    model = build(BODIES["flip"])
    named = keras.Model(model.input, {"scores": model.output})
    config = ExportConfig(precisions=("fp32",), engine="none")
    assert run_export(named, tmp_path / "b", config=config).manifest.graphs["fp32"].evidence.max_abs_difference < 1e-5


def test_a_layer_may_be_called_head(tmp_path: Path) -> None:
    model = build(BODIES["flip"], layers.Dense(CLASSES, name="head", activation="softmax"))
    config = ExportConfig(precisions=("fp32",), engine="none")
    run_export(model, tmp_path / "b", config=config)
    graph = (tmp_path / "b" / "graphs" / "model.fp32.onnx").read_bytes()
    assert b"head/kernel" in graph
    assert b"head/gemm" not in graph


def test_pixels_that_the_model_itself_prepares_are_not_prepared_twice() -> None:
    inputs = keras.Input((16, 16, 3))
    prepared = keras.applications.vgg16.preprocess_input(inputs)
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(layers.Conv2D(2, 3)(prepared))))
    assert normalizing_layer(model) is not None
    caffe = Normalization(mean=(123.68, 116.779, 103.939), std=(1, 1, 1), order="bgr")
    with pytest.raises(ModelError, match="normalises the image, and so would the image spec"):
        check_exportable(model, caffe)


def test_arithmetic_behind_the_first_kernel_is_no_preparation() -> None:
    model = build(lambda x: layers.Flatten()(layers.Conv2D(2, 3)(x) * 2.0))
    inputs = keras.Input((16, 16, 3))
    bare = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.Conv2D(2, 3)(inputs) * 2.0 + 1.0)))
    assert normalizing_layer(model) == model.layers[1].name
    assert normalizing_layer(bare) is None


def test_a_fixed_batch_is_refused() -> None:
    inputs = keras.Input((16, 16, 3), batch_size=1, name="photo")
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(inputs)))
    with pytest.raises(ModelError, match=r"its input 'photo' is .*fixes the batch"):
        check_exportable(model, None)


@pytest.mark.parametrize("count", [1, 24, 129])  # in batches of 128: of 129 images, the last is alone anyway
def test_an_answer_that_depends_on_the_batch_is_refused(count: int, tmp_path: Path) -> None:
    model = build(lambda x: layers.Flatten()(x - ops.mean(x, axis=0, keepdims=True)))
    config = ExportConfig(precisions=("fp32",), engine="none")
    images = Images(calibration=pictures(), evaluation=pictures(count, seed=1))
    with pytest.raises(ModelError, match="an image alone gets other probabilities than among others"):
        run_export(model, tmp_path / "b", images=images, config=config)
    assert not (tmp_path / "b").exists()


def test_negative_padding_is_refused_by_layer(tmp_path: Path) -> None:
    model = build(
        lambda x: layers.Flatten()(layers.Conv2DTranspose(2, 3, strides=2, output_padding=1, name="grown")(x))
    )
    with pytest.raises(ConversionError, match="the layer 'grown'"):
        run_export(model, tmp_path / "b")


def test_two_nodes_of_one_name_are_found() -> None:
    model = build(BODIES["flip"])
    graph: Graph = graph_from_keras(model)
    graph.check()
    graph.nodes[1].name = graph.nodes[0].name
    with pytest.raises(ConversionError, match="two nodes are called"):
        graph.check()
