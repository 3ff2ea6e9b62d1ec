"""What goes with a packed graph or engine, in words: its contract, how images are prepared, and the evidence."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from vggedge_export.graph import INPUT, OUTPUT
from vggedge_runtime.bundle import Bundle, GraphRecord
from vggedge_runtime.engine_cache import EngineRecord
from vggedge_runtime.preprocess import ImageSpec, Normalization

_WIDTH = 110


def describe_batches(batches: tuple[int, int, int]) -> str:
    """``batch 4``, or ``batches 1 to 8, best 4``."""
    smallest, best, largest = batches
    return f"batch {best}" if smallest == largest else f"batches {smallest} to {largest}, best {best}"


def describe_engine(engine: EngineRecord, *, fingerprint: bool = False) -> str:
    """Graph, product, version, devices and batches of an engine in words, and its fingerprint if asked for."""
    key = engine.key
    ahead = all(re.fullmatch(r"\d+\.\d+", device) for device in key.devices)
    where = f"compute capability {', '.join(key.devices)}" if ahead else ", ".join(key.devices)
    words = f"{key.graph} for {key.product} {key.version} on {where}, {describe_batches(key.batches)}"
    return f"{words} [{key.fingerprint}]" if fingerprint else words


def describe_image(spec: ImageSpec) -> list[str]:
    """How an image file becomes the input, a sentence each."""
    lines = [
        "Decode it, turn it upright as its EXIF orientation says, and make it 8-bit RGB: grey is repeated, alpha "
        "dropped, 16-bit grey divided by 257.",
        f"It is {spec.describe()}, with Pillow's {spec.kernel} kernel, which widens with the scale.",
        "Pass these bytes as they are, 0 to 255, rows first and channels last. Nothing is normalised outside.",
    ]
    if spec.normalization is not None:
        lines.append(f"Inside, the graph computes {_describe_normalization(spec.normalization)}.")
    return lines


def build_notes(
    bundle: Bundle, graph: str, file: str | None, *, engine: EngineRecord | None = None, command: str | None = None
) -> str:
    """The text that goes with a packed graph, or engine of it.

    Args:
        bundle: where it comes from.
        graph: its name.
        file: name of the packed file; None leaves the file's paragraph out.
        engine: the engine, where one is packed.
        command: what runs it.
    """
    manifest = bundle.manifest
    record = bundle.graph(graph)
    what = f"the engine of its graph {graph}" if engine else f"its graph {graph}"
    parts = [[f"{manifest.name}: {what}, packed by vggedge; exported at {manifest.created}."]]
    parts.append([_made_for(record, engine)])
    if file is not None:
        found = engine or manifest.files[record.file]
        parts.append([f"{file}: {found.size_bytes} bytes, sha256 {found.sha256}, unchanged from the bundle."])
    if command is not None:
        parts.append(["It runs, from this folder, with:", f"    {command}"])
    height, width, channels = manifest.image.shape
    parts.append(
        [
            f"Input {INPUT}: uint8 [N, {height}, {width}, {channels}], RGB, 0 to 255.",
            f"Output {OUTPUT}: float32 [N, {len(manifest.labels)}], each row a softmax, in the order of labels.txt.",
            _describe_n(engine),
        ]
    )
    parts.append(["From an image file to the input:", *_list(describe_image(manifest.image))])
    if manifest.adaptations:
        parts.append(["Export added to the model:", *_list(manifest.adaptations)])
    parts.append(["Evidence, from the bundle's manifest:", *_list(_evidence(bundle, record, engine))])
    return "\n\n".join("\n".join(_wrap(line) for line in part) for part in parts) + "\n"


def _made_for(record: GraphRecord, engine: EngineRecord | None) -> str:
    if engine is not None:
        return f"It is {describe_engine(engine)}; it fits no other product, version or device."
    return f"Precision {record.precision}, laid out for {', '.join(record.made_for)}; elsewhere it may be slow."


def _describe_n(engine: EngineRecord | None) -> str:
    if engine is None:
        return "N is free."
    smallest, best, largest = engine.key.batches
    if smallest == largest:
        return f"N is {best}: every inference takes exactly as many images."
    return f"N is {smallest} to {largest}; the engine was tuned for {best}."


def _evidence(bundle: Bundle, record: GraphRecord, engine: EngineRecord | None) -> list[str]:
    evidence = record.evidence
    data = bundle.manifest.data.get("evaluation")
    named = f" ({data.name})" if data else ""
    ran = "this very graph ran" if evidence.obtained == "measured" else "a twin that rounds every result to FP16 ran"
    change = evidence.change
    changed = "" if change is None else f"; {change.lost} answers lost, {change.gained} gained"
    lines = [
        f"Accuracy {evidence.accuracy} on {evidence.images} images{named}, {evidence.obtained}: {ran}, in ONNX "
        "Runtime on a CPU. In brackets, here and below, the 95 % interval.",
        f"Against {evidence.against}: same top-1 class on {evidence.agreement}, a probability differs by at most "
        f"{evidence.max_abs_difference:.2g}{changed}.",
        f"The Keras model's accuracy: {bundle.manifest.keras_accuracy}.",
    ]
    if engine is not None:
        lines.append("These are the graph's figures. An engine's kernels round otherwise; check it where it runs.")
    lines.append("Latency: not measured.")
    return lines


def _describe_normalization(normalization: Normalization) -> str:
    mean = ", ".join(f"{value:g}" for value in normalization.mean)
    std = ", ".join(f"{value:g}" for value in normalization.std)
    turned = "; then it turns the channels round to BGR" if normalization.order == "bgr" else ""
    return f"(pixel - mean) / std with mean {mean} and std {std} for R, G, B{turned}"


def _list(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _wrap(line: str) -> str:
    """A list entry hangs; a command, which is indented, stays whole."""
    if line.startswith(" "):
        return line
    hang = "  " if line.startswith("- ") else ""
    return "\n".join(textwrap.wrap(line, _WIDTH, subsequent_indent=hang, break_long_words=False))
