"""Engines, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from vggedge.cli import output
from vggedge_runtime.engine_cache import EngineRecord


def print_engines(
    engines: Sequence[EngineRecord], there: Sequence[EngineRecord] = (), *, were_run: bool = False
) -> None:
    """Print a table of engines that one product has for the same devices.

    Args:
        engines: at least one.
        there: those of them that had been built before.
        were_run: whether they were, to choose among them.
    """
    key = engines[0].key  # product, version and devices are those of all
    rows = [
        [
            each.key.graph,
            *count_kernels(each),
            output.format_bytes(each.size_bytes),
            "there already" if each in there else f"{each.build_seconds:.1f} s",
        ]
        for each in engines
    ]
    title = f"Engines by {key.product} {key.version} for {', '.join(key.devices)}"
    output.print_table(title, ["engine", "kernels", "extra", "read INT8", "size", "built in"], rows)
    unknown = [each.key.graph for each in engines if each.audit is None]
    if unknown:
        output.print_line(f"Nothing is known of the kernels of {', '.join(unknown)}: {key.product} told no layers.")
    not_run = "" if were_run else "Engines were built, not run: their speed is not measured here. "
    output.print_line(f"{not_run}Extra kernels are those beside convolutions, dense layers and pooling.\n")


def count_kernels(engine: EngineRecord) -> tuple[str, str, str]:
    """(kernels, extra ones, layers that read INT8 of those that should), as the builder told; else unknown."""
    audit = engine.audit
    if audit is None:
        return ("unknown", "unknown", "unknown")
    quantized = len(audit.int8) + len(audit.not_int8) + len(audit.untold)
    return (str(len(audit.layers)), str(audit.extra_kernels), f"{len(audit.int8)} of {quantized}" if quantized else "-")
