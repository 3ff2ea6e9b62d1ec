"""vggedge inspect: what is in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from vggedge.cli import output
from vggedge.cli.engine_tables import count_kernels
from vggedge.cli.export_tables import describe_graph
from vggedge_runtime.bundle import Bundle, Manifest
from vggedge_runtime.engine_layers import EngineLayer
from vggedge_runtime.errors import BundleError
from vggedge_runtime.evidence import LayerRecord
from vggedge_runtime.inspection import (
    EngineView,
    Inspection,
    LayerListing,
    Tensor,
    find_damage,
    inspect_bundle,
    list_layers,
)

NAME = "inspect"

_SHA256_DIGITS = 8  # as many as git shows; --json has them all
_SHOWN_LABELS = 10
_SHOWN_NAME = 25  # characters of a layer's or kernel's name, and
_SHOWN_NODE = 15  # of the node it comes from: the tables then fit into 100 columns


def command(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by vggedge export.")],
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="GRAPH|ENGINE",
            help="The layers of a graph and of its engines; or the kernels of one engine, named by the first 4 "
            "or more digits of its fingerprint.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file and every plan; one that was changed is an error.")
    ] = False,
    json: output.JsonFlag = False,
) -> None:
    """Show what is in BUNDLE: graphs and their proof, engines and whether they fit this machine, data, limits."""
    bundle = Bundle.open(path)
    found = msgspec.structs.replace(inspect_bundle(bundle), bundle=output.format_path(path))
    listing = None if layers is None else list_layers(found, layers)
    if verify:
        with output.progress(quiet=json) as advance:
            found = msgspec.structs.replace(found, damaged=find_damage(bundle, found, advance))
    if json:
        output.print_json(found if listing is None else listing)
    elif listing is not None:
        _print_layers(listing)
    else:
        _print_bundle(found)
    if found.damaged:
        raise BundleError("\n".join(found.damaged))


def _print_bundle(found: Inspection) -> None:
    _print_head(found)
    _print_graphs(found.manifest)
    _print_proof(found.manifest)
    _print_engines(found)
    if found.damaged is None:
        output.print_line("Hashes: not checked; --verify does that.")
    elif not found.damaged:
        output.print_line(f"Hashes: all right, of {len(found.manifest.files)} files and {len(found.engines)} plans.")


def _print_head(found: Inspection) -> None:
    manifest = found.manifest
    image, labels = manifest.image, manifest.labels
    shown = ", ".join(labels[:_SHOWN_LABELS]) + (
        f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
    )
    normalized = "by the model itself" if image.normalization is None else "by what export put at the graph's head"
    size = output.format_bytes(found.size_bytes)
    lines = [
        f"{manifest.name}: {manifest.parameters:,} parameters, format version {manifest.format_version}, made "
        f"{manifest.created}",
        f"Size: {size} in {len(manifest.files)} files and {len(found.engines)} engines",
        *(f"Input: {_describe_tensor(each)}, RGB, {image.describe()} ({image.kernel})" for each in found.inputs),
        f"Pixels: normalised {normalized}",
        *(f"Output: {_describe_tensor(each)}: {shown}" for each in found.outputs),
        *(f"Adapted: {words}." for words in manifest.adaptations),
        *(f"Data, {use}: {data}, sha256 {data.sha256[:_SHA256_DIGITS]}" for use, data in manifest.data.items()),
        f"Golden: {manifest.golden.inputs}, answers of {', '.join(manifest.golden.outputs)}",
        f"Tools: {', '.join(f'{name} {version}' for name, version in manifest.tools.items()) or 'not recorded'}",
    ]
    for line in lines:
        output.print_line(line)
    output.print_line()


def _describe_tensor(tensor: Tensor) -> str:
    return f"{tensor.name}, {tensor.type} [{', '.join(map(str, tensor.shape))}]"


def _print_graphs(manifest: Manifest) -> None:
    rows: list[list[object]] = []
    for name, graph in manifest.graphs.items():
        file = manifest.files[graph.file]
        size, made_for = output.format_bytes(file.size_bytes), ", ".join(graph.made_for)
        rows.append([name, graph.file, size, file.sha256[:_SHA256_DIGITS], made_for])
    output.print_table("Graphs", ["graph", "file", "size", "sha256", "made for"], rows)
    for name, graph in manifest.graphs.items():
        counted = sorted(graph.op_counts.items(), key=lambda pair: (-pair[1], pair[0]))
        ops = ", ".join(f"{op} {count}" for op, count in counted)
        output.print_line(f"{name}: {sum(graph.op_counts.values())} nodes{': ' if ops else ''}{ops}")
    output.print_line()


def _print_proof(manifest: Manifest) -> None:
    rows: list[list[object]] = []
    for name, graph in manifest.graphs.items():
        proof = graph.evidence
        change = "" if proof.change is None else str(proof.change).replace(" points", "")
        difference, agreement = f"{proof.max_abs_difference:.1e}", f"{100 * proof.agreement.share:.2f} %"
        rows.append([name, proof.obtained, difference, agreement, proof.accuracy, change])
    columns = ["graph", "how", "max diff.", "agreement", "accuracy [95 %]", "change [95 %]"]
    pairs: dict[str, list[str]] = {}
    for name, graph in manifest.graphs.items():
        pairs.setdefault(graph.evidence.against, []).append(name)
    images = sorted({graph.evidence.images for graph in manifest.graphs.values()})
    where = f"Proof at export, on {', '.join(f'{each:,}' for each in images)} images"
    against = "; ".join(f"{', '.join(names)} against {other}" for other, names in pairs.items())
    output.print_table(f"{where}: {against}", columns, rows)
    output.print_line(f"Keras model: {manifest.keras_accuracy}. Change: of the accuracy, points.")
    for name, graph in manifest.graphs.items():
        for line in describe_graph(name, graph):
            output.print_line(line)
    if manifest.gate is None:
        output.print_line("Gate: none; export was given no --max-drop.")
    else:
        for name, verdict in manifest.gate.verdicts.items():
            output.print_line(f"Gate, {name}: {verdict.decision}: {verdict.describe()}.")
    output.print_line()


def _print_engines(found: Inspection) -> None:
    groups: dict[str, list[tuple[str, EngineView]]] = {}
    for name, engine in found.engines.items():
        key = engine.record.key
        title = f"Engines by {key.product} {key.version} for {', '.join(key.devices)}"
        groups.setdefault(title, []).append((name, engine))
    columns = ["engine", "graph", "batches", "kernels", "extra", "read INT8", "size", "fits here"]
    for title, engines in groups.items():
        output.print_table(title, columns, [_engine_row(*each) for each in engines])
    if found.engines and found.no_gpu is not None:
        output.print_line(f"Fits here: not known: {found.no_gpu}")
    elif found.engines:
        output.print_line(f"Fits here: on {found.gpu}, at the best batch.")
    elif not found.unreadable:
        output.print_line("Engines: none.")
    for name, engine in found.engines.items():
        if engine.mismatches:
            output.print_line(f"{name} does not fit: {'; '.join(map(str, engine.mismatches))}.")
    for sentence in found.unreadable:
        output.print_line(f"Engine that cannot be read: {sentence}")


def _engine_row(name: str, engine: EngineView) -> list[object]:
    record = engine.record
    smallest, best, largest = record.key.batches
    batches = str(best) if smallest == largest else f"{smallest}, {best}, {largest}"
    fits = {True: "yes", False: "no", None: "unknown"}[engine.fits]
    return [name, record.key.graph, batches, *count_kernels(record), output.format_bytes(record.size_bytes), fits]


def _print_layers(listing: LayerListing) -> None:
    if listing.layers:
        total = sum(layer.macs for layer in listing.layers)
        columns = ["layer", "op", "precision", "MACs", "INT8 magnitude", "largest output", "SNR dB"]
        rows = [_layer_row(layer, total) for layer in listing.layers]
        output.print_table(f"Layers of {listing.graph}, {total:,} multiply-accumulates an image", columns, rows)
        output.print_line(
            "INT8 magnitude: of the input that INT8 step 127 stands for. Largest output: on the calibration images. "
            "SNR: of the output, against the float graph.\n"
        )
    for name, kernels in listing.engines.items():
        columns = ["kernel", "kind", "reads", "weights", "writes", "first ONNX node"]
        output.print_table(f"Kernels of engine {name}", columns, [_kernel_row(kernel) for kernel in kernels])


def _layer_row(layer: LayerRecord, total: int) -> list[object]:
    return [
        _cut(layer.name, _SHOWN_NAME),
        layer.op,
        layer.precision,
        f"{layer.macs / total:.1%}" if total else "-",
        "-" if layer.int8_magnitude is None else f"{layer.int8_magnitude:.4g}",
        "-" if layer.largest_output is None else f"{layer.largest_output:.4g}",
        "-" if layer.snr_db is None else f"{layer.snr_db:.1f}",
    ]


def _kernel_row(kernel: EngineLayer) -> list[object]:
    nodes = _cut(kernel.nodes[0], _SHOWN_NODE) if kernel.nodes else "-"
    more = f" +{len(kernel.nodes) - 1}" if len(kernel.nodes) > 1 else ""
    types = (", ".join(each) or "-" for each in (kernel.inputs, kernel.weights, kernel.outputs))
    return [_cut(kernel.name, _SHOWN_NAME), kernel.kind, *types, nodes + more]


def _cut(text: str, length: int) -> str:
    """``text``, its middle left out where it is longer: both the start and the end of a kernel's name tell it apart."""
    if len(text) <= length:
        return text
    end = (length - 3) // 2
    return f"{text[: length - 3 - end]}...{text[len(text) - end :]}"
