"""What folding a BatchNormalization behind a relu gains or costs, graph by graph.

    python benchmarks/batchnorm_fold.py BUNDLE [--json] [--rounds 40]

BUNDLE holds a net with BatchNormalization behind a relu, trained on drawn hands. Its fp32 graph is made into each of
the four graphs with and without the fold (passes/fold_batchnorm_after_relu.py), and the two are compared in
- the TensorRT-RTX plan: its layers, the kernels that compute no convolution, dense layer or pooling, its bytes;
- accuracy and agreement with the unfolded fp32 graph on fingers:2000@1, INT8 ranges by the largest magnitude of 200
  images of fingers@2, three draws of them;
- latency of one image on the CPU: in one process, rounds A B, B A, ... of two turns of 0.1 s. Every round opens both
  sessions anew, because two sessions of one graph differ by where their memory lies; a turn counts by its median
  call, a round by the quotient of its turns. Given are the median quotient (below 1: the fold is faster) and its
  95 % interval, by a bootstrap over the rounds. The rows "same" compare the unfolded graph with itself: they
  say how far from 1 a quotient lies where there is nothing to find.
The int8-rtx graph is judged by its rounding twin, which emulates FP16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vggedge.cli.output import print_json, print_note, print_table
from vggedge.data import open_images
from vggedge_export.calibration import Calibration
from vggedge_export.engine import EngineConfig, build_audited_engine
from vggedge_export.equalization import equalized_graph
from vggedge_export.float16 import float16_graph, rounding_twin
from vggedge_export.graph import Graph, read_graph
from vggedge_export.passes import fold_batchnorm_after_relu
from vggedge_export.quantization import (
    INT8,
    INT8_RTX,
    QuantizationRecipe,
    input_scales,
    quantized_graph,
    quantized_layers,
)
from vggedge_runtime.backends.ort import open_ort_session
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.dependencies import require
from vggedge_runtime.device import tool_versions
from vggedge_runtime.preprocess import ImageSpec, Pixels
from vggedge_runtime.progress import ignore_progress
from vggedge_runtime.statistics import Proportion, build_proportion
from vggedge_runtime.tensorrt_api import load_tensorrt

GRAPHS = ("fp32", "fp16", "int8", "int8-rtx")
DRAWS = (1, 2, 3)
CALIBRATION_IMAGES = 200
TURN_SECONDS = 0.1


class PlanFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A TensorRT-RTX plan in numbers."""

    graph: str
    folded: bool
    layers: int
    extra_kernels: int
    quantizations: int
    plan_bytes: int
    not_int8: tuple[str, ...]


class AccuracyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Answers of a graph, ``draw`` being the seed of its calibration images, 0 for none.

    Attributes:
        agreement: with the unfolded fp32 graph.
        accuracy: against the labels.
        mean_abs_difference: of the probabilities from those of the unfolded fp32 graph.
        max_abs_difference: likewise.
    """

    graph: str
    folded: bool
    draw: int
    agreement: Proportion
    accuracy: Proportion
    mean_abs_difference: float
    max_abs_difference: float


class LatencyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The fold's latency over that without it, and the medians, in milliseconds."""

    backend: str
    graph: str
    threads: int
    plain_ms: float
    folded_ms: float
    ratio: float
    low: float
    high: float
    rounds: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured."""

    folds: int
    plans: tuple[PlanFigures, ...]
    accuracy: tuple[AccuracyFigures, ...]
    latency: tuple[LatencyFigures, ...]
    tools: dict[str, str]


def make_graph(name: str, graph: Graph, images: Pixels, folder: Path) -> Graph:
    """The graph ``name`` from an FP32 one, as export makes it with the calibrator "max"."""
    if name == "fp32":
        return graph
    if name == "fp16":
        return float16_graph(graph)
    if name == "int8":
        return quantized_graph(graph, INT8, scales_of(graph, INT8, images, folder))
    even = equalized_graph(graph)
    return quantized_graph(float16_graph(even), INT8_RTX, scales_of(even, INT8_RTX, images, folder))


def scales_of(graph: Graph, recipe: QuantizationRecipe, images: Pixels, folder: Path) -> dict[str, float]:
    """Input scales of every layer that ``recipe`` quantises, by the largest magnitude."""
    layers = quantized_layers(graph, recipe)
    calibration = Calibration(images, 50, folder / "calibration.onnx", ignore_progress)
    found = calibration.measure(graph, [layer.input[0] for layer in layers], with_histograms=False)
    return input_scales(graph, recipe, {layer.name: found.magnitude(layer.input[0], "max") for layer in layers})


def write_runnable(graph: Graph, path: Path) -> None:
    """Write what a CPU can judge a graph by: its rounding twin where it holds FP16."""
    has_float16 = any(array.dtype == np.float16 for array in graph.weights.values())
    (rounding_twin(graph) if has_float16 else graph).write(path)


def measure_plans(made: dict[tuple[str, bool], Graph], image: tuple[int, int, int], folder: Path) -> list[PlanFigures]:
    """Build every graph for TensorRT-RTX, batch 1, all its targets."""
    api = load_tensorrt("tensorrt_rtx")
    figures = []
    for (name, folded), graph in made.items():
        graph.write(folder / "plan.onnx")
        built = build_audited_engine(api, folder / "plan.onnx", image, EngineConfig())
        if built.audit is None:
            raise SystemExit(f"{api.product} {api.version} prints no layer table that can be read.")
        figures.append(
            PlanFigures(
                graph=name,
                folded=folded,
                layers=len(built.audit.layers),
                extra_kernels=built.audit.extra_kernels,
                quantizations=built.audit.quantizations,
                plan_bytes=built.plan.nbytes,
                not_int8=built.audit.not_int8,
            )
        )
    return figures


def answers_of(graph: Graph, images: Pixels, folder: Path) -> NDArray[np.float32]:
    """Probabilities of all images, (n, classes)."""
    write_runnable(graph, folder / "runnable.onnx")
    session = open_ort_session(folder / "runnable.onnx")
    parts = [session.run(None, {"images": images[start : start + 50]})[0] for start in range(0, len(images), 50)]
    return np.concatenate(parts)


def openvino_call(path: Path, threads: int) -> Callable[[Pixels], Any]:
    """One synchronous inference in OpenVINO at the graph's own precision."""
    openvino = require("openvino", "openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_HYPER_THREADING": False,
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda image: request.infer([image], share_inputs=True)[0]


def ort_call(path: Path, threads: int) -> Callable[[Pixels], Any]:
    """One inference in ONNX Runtime."""
    session = open_ort_session(path, threads=threads)
    return lambda image: session.run(None, {"images": image})


CALLS = {"ort": ort_call, "openvino": openvino_call}
TIMED = (
    ("ort, same", "fp32"),
    ("ort", "fp32"),
    ("openvino, same", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "int8"),
    ("openvino", "int8-rtx"),
)


def measure_turn(call: Callable[[Pixels], Any], image: Pixels) -> float:
    """Median milliseconds of the calls of one turn; those of its first quarter only warm up."""
    samples: list[float] = []
    began = time.perf_counter()
    while (start := time.perf_counter()) - began < TURN_SECONDS:
        call(image)
        if start - began > TURN_SECONDS / 4:
            samples.append(time.perf_counter() - start)
    return 1e3 * float(np.median(samples))


def measure_latency(
    backend: str, name: str, threads: int, paths: dict[bool, Path], image: Pixels, rounds: int
) -> LatencyFigures:
    """Time a graph with and without the fold, by turns."""
    turns: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        order = (False, True) if number % 2 == 0 else (True, False)
        calls = {folded: CALLS[backend.split(",")[0]](paths[folded], threads) for folded in order}
        for folded in order:
            turns[folded].append(measure_turn(calls[folded], image))
    quotients = np.array(turns[True]) / np.array(turns[False])
    draws = np.random.default_rng(0).integers(0, rounds, (10_000, rounds))
    low, high = np.percentile(np.median(quotients[draws], axis=1), [2.5, 97.5])
    return LatencyFigures(
        backend=backend,
        graph=name,
        threads=threads,
        plain_ms=float(np.median(turns[False])),
        folded_ms=float(np.median(turns[True])),
        ratio=float(np.median(quotients)),
        low=float(low),
        high=float(high),
        rounds=rounds,
    )


def measure_accuracy(
    sources: dict[bool, Graph], spec: ImageSpec, folder: Path
) -> tuple[list[AccuracyFigures], dict[tuple[str, bool], Graph]]:
    """Answers of all graphs: (figures, the graphs of the first draw)."""
    test = open_images("fingers:2000@1", spec)
    images, targets = test.read(), test.targets
    reference = answers_of(sources[False], images, folder)
    first: dict[tuple[str, bool], Graph] = {}
    figures = []
    for name, folded, draw in _cases():
        print_note(f"{name}{', folded' if folded else ''}, draw {draw}")
        shown = open_images("fingers@2", spec).take(CALIBRATION_IMAGES, seed=draw).read() if draw else images[:1]
        graph = make_graph(name, sources[folded], shown, folder)
        first.setdefault((name, folded), graph)
        answers = answers_of(graph, images, folder)
        off = np.abs(answers - reference)
        figures.append(
            AccuracyFigures(
                graph=name,
                folded=folded,
                draw=draw,
                agreement=build_proportion(int((answers.argmax(1) == reference.argmax(1)).sum()), len(images)),
                accuracy=build_proportion(int((answers.argmax(1) == targets).sum()), len(images)),
                mean_abs_difference=float(off.mean()),
                max_abs_difference=float(off.max()),
            )
        )
    return figures, first


def _cases() -> Iterator[tuple[str, bool, int]]:
    for name in GRAPHS:
        for draw in DRAWS if name.startswith("int8") else (0,):
            yield from ((name, folded, draw) for folded in (False, True))


def measure(bundle: Path, rounds: int) -> Report:
    """Measure everything."""
    opened = Bundle.open(bundle)
    plain = read_graph(opened.verified_path(opened.graph("fp32").file))
    twin = plain.copy()
    folds = fold_batchnorm_after_relu.run(twin)
    if not folds:
        raise SystemExit(f"{bundle}: no BatchNormalization behind a relu to fold; train with --normalization first.")
    twin.drop_unused()
    spec = opened.manifest.image
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        accuracy, made = measure_accuracy({False: plain, True: twin}, spec, folder)
        plans = measure_plans(made, spec.shape, folder)
        paths = {key: folder / f"{key[0]}-{key[1]}.onnx" for key in made}
        for key, graph in made.items():
            graph.write(paths[key])
        image = open_images("fingers:8@1", spec).read()[:1]
        latency = []
        for backend, graph_name in TIMED:
            for threads in (1, 2):
                print_note(f"timing {backend} {graph_name}, {threads} thread(s)")
                with_fold = not backend.endswith("same")
                pair = {False: paths[graph_name, False], True: paths[graph_name, with_fold]}
                latency.append(measure_latency(backend, graph_name, threads, pair, image, rounds))
    tools = tool_versions("onnxruntime", "openvino", "tensorrt_rtx", "numpy")
    return Report(folds=folds, plans=tuple(plans), accuracy=tuple(accuracy), latency=tuple(latency), tools=tools)


def print_report(report: Report) -> None:
    """Three tables."""
    words = {False: "no", True: "yes"}
    print_table(
        f"TensorRT-RTX plans, {report.folds} BatchNormalizations",
        ["graph", "folded", "layers", "extra kernels", "quantisations", "plan bytes"],
        [
            [each.graph, words[each.folded], each.layers, each.extra_kernels, each.quantizations, each.plan_bytes]
            for each in report.plans
        ],
    )
    print_table(
        "Answers to fingers:2000@1",
        ["graph", "folded", "draw", "agreement with fp32", "accuracy", "mean difference", "max difference"],
        [
            [
                each.graph,
                words[each.folded],
                each.draw or "-",
                str(each.agreement),
                str(each.accuracy),
                f"{each.mean_abs_difference:.2e}",
                f"{each.max_abs_difference:.2e}",
            ]
            for each in report.accuracy
        ],
    )
    print_table(
        "Latency of one image, folded over not folded",
        ["backend", "graph", "threads", "not folded", "folded", "ratio", "95 % interval"],
        [
            [
                each.backend,
                each.graph,
                each.threads,
                f"{each.plain_ms:.3f} ms",
                f"{each.folded_ms:.3f} ms",
                f"{each.ratio:.3f}",
                f"{each.low:.3f} to {each.high:.3f}",
            ]
            for each in report.latency
        ],
    )


def main() -> None:
    """Measure, and print tables or, with --json, one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of every latency comparison (default: 40)")
    arguments = parser.parse_args()
    report = measure(arguments.bundle, arguments.rounds)
    if arguments.json:
        print_json(report)
    else:
        print_report(report)


if __name__ == "__main__":
    main()
