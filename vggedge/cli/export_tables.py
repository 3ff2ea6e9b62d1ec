"""What export found, for the terminal."""

from __future__ import annotations

from vggedge.cli import output
from vggedge.cli.engine_tables import print_engines
from vggedge_export.pipeline import ExportResult
from vggedge_runtime.bundle import GraphRecord, Manifest
from vggedge_runtime.evidence import CalibrationRecord

_SIGNIFICANT = 0.05  # McNemar's p-value below which a loss is pointed out


def print_export(result: ExportResult) -> None:
    """Print the proof, what was chosen and why, the engines, and where it all lies."""
    manifest = result.manifest
    _print_proof(manifest)
    for line in _describe_doubts(manifest):
        output.print_line(line)
    for words in manifest.adaptations:
        output.print_line(f"Adapted: {words}.")
    for name, graph in manifest.graphs.items():
        for line in describe_graph(name, graph):
            output.print_line(line)
    if manifest.gate is not None:
        _print_gate(manifest)
    folded = next(step.nodes_after for step in manifest.passes if step.name == "fold_constants")
    output.print_line(
        f"Graph: {folded} nodes once the weights are folded, {sum(manifest.graphs['fp32'].op_counts.values())} after "
        "all passes. Emulated: a twin of the graph that rounds every result to FP16.\n"
    )
    if result.engines:
        print_engines(result.engines)
    output.print_line(f"Bundle: {result.bundle}")


def _print_proof(manifest: Manifest) -> None:
    rows: list[list[object]] = [["keras", "measured", "", "", manifest.keras_accuracy, "", ""]]
    for name, graph in manifest.graphs.items():
        proof = graph.evidence
        rows.append(
            [
                name,
                proof.obtained,
                f"{proof.max_abs_difference:.1e}",
                f"{100 * proof.agreement.share:.2f} %",
                proof.accuracy,
                "" if proof.change is None else str(proof.change).replace(" points", ""),
                output.format_bytes(manifest.files[graph.file].size_bytes),
            ]
        )
    columns = ["graph", "how", "max diff.", "agreement", "accuracy [95 %]", "change, points [95 %]", "size"]
    output.print_table(
        f"Proof on {manifest.data['evaluation']}: fp32 against Keras, the others against fp32", columns, rows
    )


def _describe_doubts(manifest: Manifest) -> list[str]:
    """What takes from the worth of the whole proof, a sentence each."""
    lines = []
    data, fp32 = manifest.data["evaluation"], manifest.graphs["fp32"].evidence
    if data.seen:
        lines.append(
            f"Doubt: {data.seen} of the {data.images} evaluation images also calibrated or chose, so that the proof is "
            "too good. Name others with --evaluation."
        )
    largest = max((each.images for each in fp32.classes), default=0) / fp32.images
    if fp32.accuracy.low <= largest:
        lines.append(
            f"Doubt: fp32 is hardly better than to answer always the most frequent class ({100 * largest:.1f} %). That "
            "others agree with it then proves nothing: train the model first, or check its pixels and labels."
        )
    calibration = manifest.graphs["int8"].calibration if "int8" in manifest.graphs else None
    if calibration is not None and calibration.method == "trained":
        lines.append(
            "Doubt: the model was fine-tuned for INT8, and the other graphs compute without the clipping that it was "
            "tuned with. What they lose against the model it came from is not in this table: compare with its export."
        )
    return lines


def describe_graph(name: str, graph: GraphRecord) -> list[str]:
    """What was chosen for a graph and what should be known of it, a sentence each."""
    lines = []
    change = graph.evidence.change
    if change is not None and change.lost > change.gained and change.p_value < _SIGNIFICANT:
        lines.append(
            f"{name}: loses accuracy, and not by chance: {change.lost} images lost, {change.gained} gained "
            f"(exact McNemar test, p = {change.p_value:.2g})."
        )
    if graph.kept_fp32:
        kept = ", ".join(f"{layer} ({largest:.2g})" for layer, largest in graph.kept_fp32.items())
        lines.append(f"{name}: in FP32, as FP16 ends at 65504: {kept}.")
    if graph.fp32_scales:
        small = ", ".join(f"{layer} ({magnitude:.2g} / 127)" for layer, magnitude in graph.fp32_scales.items())
        lines.append(f"{name}: INT8 with FP32 scales, as these are below FP16's normal numbers: {small}.")
    if graph.calibration is not None:
        lines.append(f"{name}: {_describe_ranges(graph.calibration)}.")
    if graph.plan is not None:
        chosen = graph.plan.chosen
        in_float = f"left in float: {', '.join(chosen.float_layers)}" if chosen.float_layers else "all layers that can"
        lines.append(
            f"{name}: {100 * chosen.int8_share:.2f} % of the multiply-accumulates in INT8, {in_float}; "
            f"{graph.plan.rule}. Plot: plans/{name}.png."
        )
    return lines


def _describe_ranges(calibration: CalibrationRecord) -> str:
    source = "as training fixed them" if calibration.method == "trained" else f"by {calibration.method}"
    lines = [f"INT8 ranges {source}{', of equalised layers' if calibration.equalized else ''}"]
    for title, is_even in (("divergence from float, nats an image", False), ("of equalised layers", True)):
        scores = [each for each in calibration.candidates if each.equalized == is_even]
        if scores:
            lines.append(f"{title}: {', '.join(f'{each.method} {each.divergence:.2g}' for each in scores)}")
    return "; ".join(lines)


def _print_gate(manifest: Manifest) -> None:
    gate = manifest.gate
    if gate is None:
        return
    for name, verdict in gate.verdicts.items():
        said = {"pass": "passes", "undecided": "let through undecided", "fail": "fails"}[verdict.decision]
        output.print_line(f"Gate, {name}: {said}: {verdict.describe()}.")
