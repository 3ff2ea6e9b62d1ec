"""What export found, for the terminal."""

from __future__ import annotations

from vggedge.cli import output
from vggedge_export.pipeline import ExportResult
from vggedge_runtime.bundle import GraphRecord, Manifest
from vggedge_runtime.engine_cache import EngineRecord

_SIGNIFICANT = 0.05  # McNemar's p-value below which a loss is pointed out


def print_export(result: ExportResult) -> None:
    """Print the proof, what was chosen and why, the engines, and where it all lies."""
    manifest = result.manifest
    _print_proof(manifest)
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
        _print_engines(result.engines)
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
        lines.append(f"{name}: in FP32, out of FP16's range: {kept}.")
    calibration = graph.calibration
    if calibration is not None and calibration.candidates:
        scores = ", ".join(f"{each.method} {each.divergence:.2g}" for each in calibration.candidates)
        lines.append(f"{name}: INT8 ranges by {calibration.method}; divergence from float, nats an image: {scores}.")
    elif calibration is not None:
        source = "as training fixed them" if calibration.method == "trained" else f"by {calibration.method}"
        lines.append(f"{name}: INT8 ranges {source}.")
    if graph.plan is not None:
        chosen = graph.plan.chosen
        in_float = f"left in float: {', '.join(chosen.float_layers)}" if chosen.float_layers else "all layers that can"
        lines.append(
            f"{name}: {100 * chosen.int8_share:.2f} % of the multiply-accumulates in INT8, {in_float}; "
            f"{graph.plan.rule}. Plot: plans/{name}.png."
        )
    return lines


def _print_gate(manifest: Manifest) -> None:
    gate = manifest.gate
    if gate is None:
        return
    for name, verdict in gate.verdicts.items():
        said = {"pass": "passes", "undecided": "let through undecided", "fail": "fails"}[verdict.decision]
        output.print_line(f"Gate, {name}: {said}: {verdict.describe()}.")


def _print_engines(engines: tuple[EngineRecord, ...]) -> None:
    key = engines[0].key  # product, version and devices are those of all that one export builds
    rows = [
        [
            each.key.graph,
            *_count_kernels(each),
            output.format_bytes(each.size_bytes),
            f"{each.build_seconds:.1f} s",
        ]
        for each in engines
    ]
    title = f"Engines by {key.product} {key.version} for {', '.join(key.devices)}"
    output.print_table(title, ["engine", "kernels", "extra", "read INT8", "size", "built in"], rows)
    output.print_line(
        "Engines were built, not run: their speed is not measured here. Extra kernels are those beside convolutions, "
        "dense layers and pooling.\n"
    )


def _count_kernels(engine: EngineRecord) -> tuple[str, str, str]:
    """(kernels, extra ones, layers that read INT8 of those that should), as the builder told; else unknown."""
    audit = engine.audit
    if audit is None:
        return ("unknown", "unknown", "unknown")
    quantized = len(audit.int8) + len(audit.not_int8) + len(audit.untold)
    return (str(len(audit.layers)), str(audit.extra_kernels), f"{len(audit.int8)} of {quantized}" if quantized else "-")
