"""VGG-16 as a bundle of graphs, made without Keras in seconds: random weights (He), the real layers and names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vggedge_export.equalization import equalized_graph
from vggedge_export.float16 import float16_graph
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.quantization import INT8, INT8_RTX, quantized_graph, quantized_layers
from vggedge_runtime.bundle import (
    FORMAT_VERSION,
    Comparison,
    GoldenRecord,
    GraphRecord,
    Manifest,
    write_bundle,
    write_manifest,
)
from vggedge_runtime.graphs import GRAPHS
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.statistics import build_proportion

COMPACT = {"size": 64, "widths": (4, 8, 16, 32, 32), "dense": 256, "classes": 6}
FULL = {"size": 224, "widths": (64, 128, 256, 512, 512), "dense": 4096, "classes": 1000}
LAYERS = [f"block{stage}_conv{k}" for stage, count in enumerate((2, 2, 3, 3, 3), 1) for k in range(1, count + 1)]


def vgg16(size: int, widths: tuple[int, ...], dense: int, classes: int) -> Graph:
    draw = np.random.default_rng(0).standard_normal
    nodes = [
        make_node("Cast", ["images"], "pixels", to=1),
        make_node("Transpose", ["pixels"], "chw", perm=[0, 3, 1, 2]),
        make_node("Mul", ["chw", "scale"], "unit"),
    ]
    weights = {"scale": np.array(1 / 128, np.float32)}
    last, channels = "unit", 3

    def add(op: str, name: str, shape: tuple[int, ...], **attributes: object) -> None:
        nonlocal last
        fan_in = np.prod(shape[1:])
        weights[f"{name}/kernel"] = draw(shape, np.float32) * np.float32((2 / fan_in) ** 0.5)
        weights[f"{name}/bias"] = np.zeros(shape[0], np.float32)
        nodes.append(make_node(op, [last, f"{name}/kernel", f"{name}/bias"], name, **attributes))
        last = name
        if name != "predictions":
            nodes.append(make_node("Relu", [name], f"{name}/relu"))
            last = f"{name}/relu"

    for stage, width in enumerate(widths, 1):
        for name in [each for each in LAYERS if each.startswith(f"block{stage}_")]:
            add("Conv", name, (width, channels, 3, 3), pads=[1] * 4, kernel_shape=[3, 3])
            channels = width
        nodes.append(make_node("MaxPool", [last], f"block{stage}_pool", kernel_shape=[2, 2], strides=[2, 2]))
        last = f"block{stage}_pool"
    nodes.append(make_node("Flatten", [last], "flatten"))
    last = "flatten"
    for name, outputs, inputs in (
        ("fc1", dense, channels * (size // 32) ** 2),
        ("fc2", dense, dense),
        ("predictions", classes, dense),
    ):
        add("Gemm", name, (outputs, inputs), transB=1)
    nodes.append(make_node("Softmax", [last], "probabilities"))
    return Graph(
        nodes,
        weights,
        [value_info("images", np.uint8, ["N", size, size, 3])],
        [value_info("probabilities", np.float32, ["N", classes])],
    )


def make_graph(name: str, clean: Graph) -> Graph:
    scales = {layer.name: 4 / 127 for layer in quantized_layers(clean, INT8_RTX)}
    some = dict(list(scales.items())[2:])
    if name == "fp32":
        return clean
    if name == "fp16":
        return float16_graph(clean)
    if name == "int8":
        return quantized_graph(clean, INT8, scales)
    even = float16_graph(equalized_graph(clean))
    return quantized_graph(even, INT8_RTX, scales if name == "int8-rtx" else some)


def write_vgg_bundle(path: Path, names: tuple[str, ...], **shape: object) -> Path:
    """A bundle of VGG-16 with these graphs; its evidence and golden outputs are empty words."""
    share = build_proportion(1, 1)
    size, classes = shape["size"], shape["classes"]
    with write_bundle(path) as staging:
        (staging / "graphs").mkdir()
        (staging / "golden").mkdir()
        np.save(staging / "golden/inputs.npy", np.zeros((1, size, size, 3), np.uint8))
        records = {}
        for name in names:
            make_graph(name, vgg16(**shape)).write(staging / f"graphs/model.{name}.onnx")
            np.save(staging / f"golden/outputs.{name}.npy", np.full((1, classes), 1 / classes, np.float32))
            records[name] = GraphRecord(
                file=f"graphs/model.{name}.onnx",
                precision=GRAPHS[name].precision,
                made_for=GRAPHS[name].made_for,
                op_counts={},
                evidence=Comparison(
                    against="keras",
                    obtained="measured",
                    images=1,
                    max_abs_difference=0.0,
                    agreement=share,
                    accuracy=share,
                ),
            )
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name="vgg16",
            created="2026-01-01T00:00:00+00:00",
            parameters=1,
            image=ImageSpec(height=size, width=size),
            labels=tuple(map(str, range(classes))),
            graphs=records,
            golden=GoldenRecord(
                inputs="golden/inputs.npy", outputs={name: f"golden/outputs.{name}.npy" for name in names}
            ),
            passes=(),
            keras_accuracy=share,
            data={},
            tools={},
            files={},
        )
        write_manifest(staging, manifest)
    return path
