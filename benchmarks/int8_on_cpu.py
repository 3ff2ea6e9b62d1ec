"""INT8 at batch 1 on a CPU: OpenVINO on the bundle's int8 graph, beside what else runs the same network in INT8.

The int8 graph is laid out for TensorRT: signed steps, one pair at the input of each layer. OpenVINO could be given
other readings of the network, and LiteRT has its own. The bar: ours takes at most 1.05 of the time of each of them.

    python benchmarks/int8_on_cpu.py MODEL.keras BUNDLE [--full] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from int8_peers import OURS, Peer, run_alone, write_full_bundle, write_peers
from numpy.typing import NDArray

from vggedge.cli.output import print_line, print_note, print_table
from vggedge.data import open_images
from vggedge_runtime.backends.ort import open_ort_session
from vggedge_runtime.backends.ov import OpenVinoBackend
from vggedge_runtime.bundle import Bundle, Manifest
from vggedge_runtime.dependencies import require
from vggedge_runtime.device import describe_environment, tool_versions
from vggedge_runtime.preprocess import ImageSpec, Pixels

Scores = NDArray[np.float32]

BAR = 1.05  # ours / peer: what counts as level
_MEANING = (
    "Is OpenVINO on the bundle's int8 graph level with OpenVINO on any other INT8 reading of the network,",
    f"and with LiteRT? Level: ours takes at most {BAR} of the peer's time, all of the interval; *missed*: all of it",
    "lies above; *not resolved*: it lies on both sides.",
    "",
    "*ours*: the openvino backend of vggedge on the int8 graph, which it rewrites as it loads it. OpenVINO by itself",
    "runs that graph *as it is*, and readings made from it: its pairs moved before pooling; uint8 steps behind every",
    "relu; both; both with the image as the first layer's steps. *NNCF* and *LiteRT* quantise the float model",
    "themselves, the last layer, too.",
    "Ratios below 1 are in our favour. In brackets, outside the bar: what ONNX Runtime, the default backend, takes.",
)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One peer at one number of threads.

    Attributes:
        latency_ms: median over rounds of the median call of a turn.
        fastest_ms: the fastest single call.
        ratio: median over rounds of ours / peer in the same round.
        low: lower end of its 95 % bootstrap interval over the rounds.
        high: upper end.
        agreement: share of images with the same top-1 as the int8 graph in ONNX Runtime.
        max_abs_difference: largest difference of a probability from there.
        int8_convolutions: "13 of 13": those that OpenVINO runs on 8-bit inputs; empty for other runtimes.
        turns_ms: the median call of each round.
    """

    network: str
    threads: int
    peer: str
    in_bar: bool
    latency_ms: float
    fastest_ms: float
    ratio: float
    low: float
    high: float
    agreement: float
    max_abs_difference: float
    int8_convolutions: str
    turns_ms: list[float]


# --- what runs in a process of its own ------------------------------------------------------------------------------


def serve(connection: Connection, peer: Peer, threads: int, file: Path) -> None:
    """Load ``peer``, send (its answers, its INT8 convolutions), then time the first image on request, until None.

    The images are in a file, as the arguments have to be small (see run_alone).
    """
    images = np.load(file)
    answer, convolutions = _RUNTIMES[peer.runtime](peer.file, threads)
    connection.send((np.concatenate([answer(image).copy() for image in images]), convolutions))
    while (seconds := connection.recv()) is not None:
        time_calls(answer, images[0], seconds / 4, 1)
        connection.send(time_calls(answer, images[0], seconds, 3))


def time_calls(answer: Callable[[Pixels], Scores], image: Pixels, seconds: float, least: int) -> list[float]:
    """Latency of each call in ms: as many as ``seconds`` take, and at least ``least``."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    while len(latencies) < least or time.perf_counter() < end:
        started = time.perf_counter()
        answer(image)
        latencies.append(1e3 * (time.perf_counter() - started))
    return latencies


Loaded = tuple[Callable[[Pixels], Scores], str]


def _load_ours(file: str, threads: int) -> Loaded:
    backend = OpenVinoBackend(Path(file), threads=threads)
    return (lambda image: backend.run(image[None])), _count_int8_convolutions(backend._small.get_compiled_model())


def _load_openvino(file: str, threads: int) -> Loaded:
    openvino = require("openvino", "openvino")
    model = openvino.Core().read_model(file)
    model.reshape([1, *list(model.inputs[0].partial_shape)[1:]])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    held = np.empty(compiled.inputs[0].shape, np.uint8)
    request.set_input_tensor(openvino.Tensor(held, shared_memory=True))  # 9 us a call less than to hand it over
    made = request.get_output_tensor().data

    def answer(image: Pixels) -> Scores:
        held[0] = image
        request.infer()
        scores: Scores = made.copy()  # all others, too, give an array of its own
        return scores

    return answer, _count_int8_convolutions(compiled)


def _count_int8_convolutions(compiled: Any) -> str:
    ran = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    precisions = [str(info["runtimePrecision"].value) for info in ran if info["layerType"].value == "Convolution"]
    return f"{sum(each in {'u8', 'i8'} for each in precisions)} of {len(precisions)}"


def _load_litert(file: str, threads: int) -> Loaded:
    interpreter = require("ai_edge_litert.interpreter", "dev").Interpreter(file, num_threads=threads)
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def answer(image: Pixels) -> Scores:
        interpreter.set_tensor(given, image[None])
        interpreter.invoke()
        scores: Scores = interpreter.get_tensor(made)
        return scores

    return answer, ""


def _load_onnxruntime(file: str, threads: int) -> Loaded:
    ort = require("onnxruntime", "ort")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return (lambda image: session.run(None, {"images": image[None]})[0]), ""


_RUNTIMES: dict[str, Callable[[str, int], Loaded]] = {
    "OpenVINO": _load_openvino,
    "vggedge on OpenVINO": _load_ours,
    "LiteRT": _load_litert,
    "ONNX Runtime": _load_onnxruntime,
}


# --- the measurement ------------------------------------------------------------------------------------------------


def measure(network: str, peers: Sequence[Peer], images: Path, threads: int, rounds: int, seconds: float) -> list[Row]:
    """Let the peers, each in its own process, take turns of ``seconds``; every second round goes backwards."""
    answers, turns = take_turns(peers, images, threads, rounds, seconds)
    check = open_ort_session(Path(peers[0].file))  # as the bundle's own proof: the graph as it was exported
    reference = np.concatenate([check.run(None, {"images": image[None]})[0] for image in np.load(images)])
    medians = np.array([[np.median(turn) for turn in peer] for peer in turns])
    rows = []
    for peer, (scores, convolutions), mine, all_turns in zip(peers, answers, medians, turns, strict=True):
        ratio, low, high = median_interval(medians[0] / mine)
        rows.append(
            Row(
                network=network,
                threads=threads,
                peer=peer.name,
                in_bar=peer.in_bar and peer.name != OURS,
                latency_ms=float(np.median(mine)),
                fastest_ms=min(map(min, all_turns)),
                ratio=ratio,
                low=low,
                high=high,
                agreement=float((scores.argmax(1) == reference.argmax(1)).mean()),
                max_abs_difference=float(np.abs(scores - reference).max()),
                int8_convolutions=convolutions,
                turns_ms=mine.tolist(),
            )
        )
    return rows


def take_turns(
    peers: Sequence[Peer], images: Path, threads: int, rounds: int, seconds: float
) -> tuple[list[tuple[Scores, str]], list[list[list[float]]]]:
    """(what each peer sends once it is loaded, the latencies of its turns in ms)."""
    context = multiprocessing.get_context("spawn")
    lines, processes = [], []
    for peer in peers:
        line, end = context.Pipe()
        processes.append(context.Process(target=serve, args=(end, peer, threads, images), daemon=True))
        processes[-1].start()
        end.close()  # so that a peer that dies is an EOFError here, not an endless wait
        lines.append(line)
    answers = [line.recv() for line in lines]
    turns: list[list[list[float]]] = [[] for _ in peers]
    for number in range(rounds):
        for index in range(len(peers)) if number % 2 == 0 else reversed(range(len(peers))):
            lines[index].send(seconds)
            turns[index].append(lines[index].recv())
    for line, process in zip(lines, processes, strict=True):
        line.send(None)
        process.join()
        line.close()
    return answers, turns


def median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median of ``values`` and its 95 % percentile bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (4000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


def judge(rows: Sequence[Row]) -> str:
    """Whether ours is level with all peers of the bar in ``rows``, as far as the intervals tell; names the others."""
    judged = [row for row in rows if row.in_bar]
    missed = [row for row in judged if row.low > BAR]
    open_ = [row for row in judged if row.low <= BAR < row.high]
    words = [f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}] of {row.peer}" for row in missed or open_]
    if not words:
        return "met"
    return f"{'missed' if missed else 'not resolved'}: {', '.join(words)}"


# --- the report -----------------------------------------------------------------------------------------------------


def images_of(name: str, spec: ImageSpec, count: int) -> Pixels:
    """The first ``count`` images of a data set by its name, (count, h, w, 3) uint8."""
    source = open_images(name, spec)
    return np.stack([source.read_one(index) for index in range(min(count, len(source)))])


def report(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(column names, a row of words for every row of figures)."""
    columns = ["network, threads", "peer", "ms", "fastest", "ours / peer [95 %]", "same top-1", "max dp", "INT8 convs"]
    table = [
        [
            f"{row.network}, {row.threads}",
            row.peer if row.in_bar or row.peer == OURS else f"({row.peer})",
            f"{row.latency_ms:.3f}",
            f"{row.fastest_ms:.3f}",
            "-" if row.peer == OURS else f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]",
            f"{100 * row.agreement:.1f} %",
            f"{row.max_abs_difference:.3f}",
            row.int8_convolutions or "-",
        ]
        for row in rows
    ]
    return columns, table


def write_markdown(path: Path, rows: Sequence[Row], verdicts: dict[str, str], protocol: dict[str, str]) -> None:
    """Bar, verdicts, table and protocol as one page."""
    columns, table = report(rows)
    lines = ["# INT8 at batch 1 on a CPU", "", *_MEANING, "", "| network, threads | bar |", "|---|---|"]
    lines += [f"| {where} | {verdict} |" for where, verdict in verdicts.items()]
    lines += ["", *(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *table)), ""]
    lines += ["## Protocol", "", *(f"- {key}: {value}" for key, value in protocol.items()), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def describe(arguments: argparse.Namespace, load_before: float) -> dict[str, str]:
    """How the figures came about."""
    environment = describe_environment() | tool_versions("tensorflow", "ai-edge-litert")
    options = " --full" if arguments.full else ""
    if arguments.nncf_python != sys.executable:
        options += " --nncf-python PYTHON"  # whose path is this machine's business
    return {
        "command": f"python benchmarks/int8_on_cpu.py MODEL.keras BUNDLE{options} --markdown FILE",
        "timed": "uint8 HWC image in NumPy to float32 probabilities in NumPy, normalisation included, the same image "
        "for all, batch 1; OpenVINO with INFERENCE_PRECISION_HINT f32 and PERFORMANCE_HINT LATENCY",
        "turns": f"each peer in a process of its own; {arguments.rounds} rounds of turns of {arguments.seconds} s "
        f"(full vgg16: {arguments.seconds_full} s) after a quarter of that to warm up, at least 3 calls a turn, every "
        "second round backwards; the value of a turn is its median call",
        "ratio": "median over the rounds of ours / peer in the same round, with its 95 % percentile bootstrap interval",
        "agreement": "with the int8 graph in ONNX Runtime as the bundle's proof runs it, over images that did not "
        "calibrate; the full vgg16 has random weights, whose near ties flip easily",
        "machine": ", ".join(f"{key} {value}" for key, value in environment.items()),
        "load average": f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after: what else ran on these cores",
    }


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="MODEL.keras, for LiteRT")
    parser.add_argument("bundle", type=Path, help="its bundle, with the int8 graph")
    parser.add_argument("--full", action="store_true", help="the full vgg16, too: random weights, 224x224; minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, with every turn")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="protocol and table")
    parser.add_argument("--nncf-python", default=sys.executable, metavar="PYTHON", help="a Python that has nncf")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.05, help="length of a turn")
    parser.add_argument("--seconds-full", type=float, default=0.1, help="length of a turn of the full vgg16")
    arguments = parser.parse_args()
    before, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as scratch:
        for network, source, bundle, seconds in _networks(arguments, Path(scratch)):
            manifest = Bundle.open(bundle).manifest
            calibration, images = _images(manifest) if source else _gratings()
            print_note(f"{network}: writing the peers")
            folder = Path(scratch) / f"{network} peers"
            folder.mkdir()
            np.save(folder / "images.npy", images)
            peers = write_peers(source, bundle, folder, calibration, arguments.nncf_python)
            for threads in map(int, arguments.threads.split(",")):
                print_note(f"{network}: {threads} thread(s), {len(peers)} peers")
                rows += measure(network, peers, folder / "images.npy", threads, arguments.rounds, seconds)
    verdicts = {where: judge(each) for where, each in group(rows).items()}
    print_table("INT8 at batch 1 on a CPU", *report(rows))
    for where, verdict in verdicts.items():
        print_line(f"{where} thread(s): {verdict}")
    protocol = describe(arguments, before)
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode({"rows": rows, "verdicts": verdicts, "protocol": protocol}))
    if arguments.markdown:
        write_markdown(arguments.markdown, rows, verdicts, protocol)


def group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by network and number of threads."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(f"{row.network}, {row.threads}", []).append(row)
    return grouped


def _networks(arguments: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path | None, Path, float]]:
    """(name, Keras file or None for random weights, bundle, seconds a turn)."""
    yield arguments.model.stem, arguments.model, arguments.bundle, arguments.seconds
    if arguments.full:
        print_note("full vgg16: exporting")
        run_alone(write_full_bundle, scratch / "full")
        yield "full vgg16", None, scratch / "full", arguments.seconds_full


def _images(manifest: Manifest) -> tuple[Pixels, Pixels]:
    """(up to 300 images that calibrated the bundle, up to 500 that did not)."""
    calibration, evaluation = manifest.data["calibration"], manifest.data["evaluation"]
    return (
        images_of(calibration.name, manifest.image, min(300, calibration.images)),
        images_of(evaluation.name, manifest.image, 500),
    )


def _gratings() -> tuple[Pixels, Pixels]:
    from full_vgg16_export import gratings

    return gratings(8, 0), gratings(8, 1)


if __name__ == "__main__":
    main()
