"""vggedge bench: latency of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vggedge.cli import output
from vggedge_runtime.backends.base import backend_choices
from vggedge_runtime.bench import BenchConfig, BenchResult, measure_session
from vggedge_runtime.session import Session
from vggedge_runtime.statistics import samples_needed

NAME = "bench"


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder written by vggedge export.")],
    backend: Annotated[str, typer.Option(help=f"One of {backend_choices()}.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16, int8, or the name of a graph.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads an inference; 0: the library's choice.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="At least so many timed calls,")] = 1000,
    seconds: Annotated[float, typer.Option(min=0, help="and for at least so long.")] = 3.0,
    json: output.JsonFlag = False,
) -> None:
    """Measure the latency of a call, image in memory to probabilities in memory. --json holds every sample."""
    config = BenchConfig(iterations=iterations, seconds=seconds)
    with Session.open(bundle, backend, precision, threads=threads) as session:
        if not json:
            output.print_note(f"{session.graph} on {session.backend} ({session.why}); measuring for {seconds:g} s ...")
        result = measure_session(session, config, batch)
    if json:
        output.print_json(result)
    else:
        _print_table(result)


def _print_table(result: BenchResult) -> None:
    latency = result.latency
    rows: list[list[object]] = [["mean", f"{latency.mean_ms:.3f}"]]
    for name, value in latency.percentiles_ms.items():
        shown = f"{value:.3f}" if value is not None else f"needs {samples_needed(float(name[1:]))} samples"
        rows.append([name, shown])
    rows.append(["max", f"{latency.max_ms:.3f}"])
    output.print_table(f"Latency of {result.graph} on {result.backend}, batch {result.batch}", ["", "ms"], rows)
    rate = 1e3 * result.batch / latency.mean_ms
    machine = result.environment
    output.print_line(f"{len(latency.samples_ms)} calls one after another, {rate:.0f} images/s; {machine['cpu']}.")
