"""The peers of int8_on_cpu.py as files: readings of the int8 graph for OpenVINO, NNCF's and LiteRT's quantisation."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vggedge.cli.output import print_note
from vggedge_export.graph import Graph, make_node, nodes_of, read_graph
from vggedge_runtime.dependencies import is_installed, require
from vggedge_runtime.preprocess import Pixels

OURS = "ours"
_STEPS = 127


class Peer(msgspec.Struct, frozen=True):
    """Something that answers: a file and what runs it. Only those in the bar are judged."""

    name: str
    runtime: str
    file: str
    in_bar: bool = True


def as_unsigned(graph: Graph) -> Graph:
    """uint8 with zero point 0 and all 255 steps wherever a relu makes the values >= 0; changes ``graph``."""
    for quantize in nodes_of(graph, "QuantizeLinear"):
        if _follows_relu(graph, quantize.input[0]):
            scale, zero_point = (f"{quantize.output[0]}/unsigned_{role}" for role in ("scale", "zero_point"))
            graph.weights[scale] = np.asarray(graph.weights[quantize.input[1]] * np.float32(_STEPS / 255))
            graph.weights[zero_point] = np.array(0, np.uint8)
            for node in (quantize, *graph.consumers(quantize.output[0])):
                node.input[1], node.input[2] = scale, zero_point
    return graph


def before_pooling(graph: Graph) -> Graph:
    """Move the pairs after max-pooling and flatten to before them: the same numbers; changes ``graph``."""
    for quantize in nodes_of(graph, "QuantizeLinear"):
        moved = list(_movers_above(graph, quantize.input[0]))
        dequantize = graph.only_consumer(quantize.output[0])
        if not moved or dequantize is None:
            continue
        graph.nodes = [node for node in graph.nodes if node is not quantize and node is not dequantize]
        graph.read_from(dequantize.output[0], moved[0].output[0])
        quantize.input[0], moved[-1].input[0] = moved[-1].input[0], dequantize.output[0]
        position = graph.index(moved[-1])
        graph.nodes[position:position] = [quantize, dequantize]
    return graph


def image_as_steps(graph: Graph) -> Graph:
    """Let the uint8 image itself be the first layer's steps (scale 1/128, zero point 128); changes ``graph``."""
    dequantize = next(nodes_of(graph, "DequantizeLinear"))
    transpose = make_node("Transpose", ["images"], "head/steps", perm=[0, 3, 1, 2])
    graph.weights["head/zero_point"] = np.array(128, np.uint8)
    dequantize.input[0], dequantize.input[2] = "head/steps", "head/zero_point"
    graph.nodes.insert(0, transpose)
    graph.nodes.remove(dequantize)
    graph.nodes.insert(1, dequantize)
    graph.drop_unused()
    return graph


READINGS: dict[str, Callable[[Graph], Graph]] = {
    "pairs before pooling": before_pooling,
    "uint8, same places": as_unsigned,
    "uint8, before pooling": lambda graph: as_unsigned(before_pooling(graph)),
    "uint8, image as steps": lambda graph: image_as_steps(as_unsigned(before_pooling(graph))),
}


def _movers_above(graph: Graph, tensor: str) -> Iterable[Any]:
    """The max-poolings and flattens that lead to ``tensor``, last first; rounding to steps commutes with them."""
    node = graph.producer(tensor)
    while node is not None and node.op_type in {"MaxPool", "Flatten"} and graph.only_consumer(node.output[0]):
        yield node
        node = graph.producer(node.input[0])


def _follows_relu(graph: Graph, tensor: str) -> bool:
    tensor = next((node.input[0] for node in reversed(list(_movers_above(graph, tensor)))), tensor)
    node = graph.producer(tensor)
    return node is not None and node.op_type == "Relu"


_NNCF = """
import sys, nncf, numpy, openvino
graph, images, quantized = sys.argv[1:]
pixels = numpy.load(images)
dataset = nncf.Dataset([pixels[index : index + 1] for index in range(len(pixels))])
model = nncf.quantize(openvino.Core().read_model(graph), dataset, subset_size=len(pixels))
openvino.save_model(model, quantized, compress_to_fp16=False)
"""


def write_litert(source: Path | None, calibration: Path, path: Path) -> None:
    """Convert the Keras model ``source`` (None: the full VGG-16) to a full-integer LiteRT file with a uint8 input.

    A leading Rescaling(1/128, offset=-1) is left out: it maps the pixels onto the steps of the input itself.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its log would bury the table
    keras, tf = require("keras", "train"), require("tensorflow", "train")
    model = keras.models.load_model(source) if source else _full_vgg16()
    samples, layers = (
        np.load(calibration).astype(np.float32),
        [layer for layer in model.layers[1:] if layer.name != "rescaling"],
    )
    samples[0, 0, 0], samples[0, 0, 1] = 0, 255  # so that the input's range, and with it its scale, is exact
    if len(layers) < len(model.layers) - 1:
        scores = inputs = keras.Input(model.input.shape[1:])
        for layer in layers:
            scores = layer(scores)
        model, samples = keras.Model(inputs, scores), samples / np.float32(128) - np.float32(1)
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type, converter.inference_output_type = tf.uint8, tf.float32
        path.write_bytes(converter.convert())


def write_full_bundle(path: Path) -> None:
    """Export the full VGG-16 with random He weights, calibrated on 8 gratings, as full_vgg16_export.py does."""
    from full_vgg16_export import CLASSES, SIDE, gratings

    from vggedge_export.pipeline import ExportConfig, export
    from vggedge_export.verification import Images, LabelledImages
    from vggedge_runtime.preprocess import ImageSpec

    sets = [LabelledImages(name, gratings(8, seed), np.arange(8)) for seed, name in enumerate("ce")]
    export(
        _full_vgg16,
        path,
        image=ImageSpec(height=SIDE, width=SIDE),
        labels=tuple(map(str, range(CLASSES))),
        images=Images(calibration=sets[0], evaluation=sets[1]),
        config=ExportConfig(precisions=("fp32", "int8"), engine="none", calibrator="max"),
    )


def _full_vgg16() -> Any:
    from vggedge.architecture import get_spec
    from vggedge.model import build_vgg

    return build_vgg(get_spec("vgg16"), seed=0)


def write_peers(source: Path | None, bundle: Path, folder: Path, calibration: Pixels, nncf: str) -> list[Peer]:
    """Write every peer's file into ``folder``; ours is first. What is not installed is left out, and that is said."""
    int8, fp32 = (str(bundle / f"graphs/model.{name}.onnx") for name in ("int8", "fp32"))
    peers = [Peer(OURS, "vggedge on OpenVINO", int8), Peer("int8 as it is", "OpenVINO", int8)]
    for index, (name, change) in enumerate(READINGS.items()):
        change(read_graph(Path(int8))).write(folder / f"{index}.onnx")
        peers.append(Peer(name, "OpenVINO", str(folder / f"{index}.onnx")))
    np.save(folder / "calibration.npy", calibration)
    if subprocess.run([nncf, "-c", "import nncf"], capture_output=True, check=False).returncode == 0:
        command = [nncf, "-c", _NNCF, fp32, str(folder / "calibration.npy"), str(folder / "nncf.xml")]
        subprocess.run(command, check=True, capture_output=True)
        peers.append(Peer("NNCF", "OpenVINO", str(folder / "nncf.xml")))
    else:
        print_note("NNCF is not installed for --nncf-python: left out.")
    if is_installed("ai_edge_litert"):
        run_alone(write_litert, source, folder / "calibration.npy", folder / "int8.tflite")
        peers.append(Peer("LiteRT int8", "LiteRT", str(folder / "int8.tflite")))
    else:
        print_note("ai-edge-litert is not installed: LiteRT is left out.")
    return [*peers, Peer("fp32", "ONNX Runtime", fp32, in_bar=False)]


def run_alone(function: Callable[..., None], *arguments: Any) -> None:
    """Call in a process of its own, which gives back all that TensorFlow holds when it ends.

    Arguments have to be small: more than a pipe holds blocks here for ever if the process dies before it reads them.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed with exit code {process.exitcode}; its traceback stands above.")
