"""vggedge pack: a bundle's graph or engine for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from vggedge.cli import output
from vggedge_export.packing import PLATFORMS, TARGETS, PackConfig, PackResult, pack
from vggedge_export.triton import MAX_BATCH, MAX_QUEUE_DELAY_US
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.graphs import PRECISIONS

NAME = "pack"

_TRITON = "Triton"


def command(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by vggedge export.")],
    target: Annotated[str, typer.Option("--to", help=f"{', '.join(TARGETS[:-1])} or {TARGETS[-1]}.")],
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; new or empty.")],
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(PRECISIONS)} or the name of a graph; if left out, fp32 for a graph, and the only engine "
            "that there is."
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Which engine, by the start of its folder's name.")
    ] = None,
    platform: Annotated[
        str | None,
        typer.Option(help=f"{' or '.join(PLATFORMS)}; onnxruntime if left out.", rich_help_panel=_TRITON),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model; the bundle's if left out.", rich_help_panel=_TRITON)
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Largest batch of a graph, {MAX_BATCH} if left out; an engine has its own.",
            rich_help_panel=_TRITON,
        ),
    ] = None,
    max_queue_delay_us: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"How long a request may wait for others to share its batch, {MAX_QUEUE_DELAY_US} if left out: about "
            "one inference of a compact VGG.",
            rich_help_panel=_TRITON,
        ),
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="ONNX Runtime on the server's GPU, not its CPU.", rich_help_panel=_TRITON)
    ] = False,
    json: output.JsonFlag = False,
) -> None:
    """Write what other tools want: a plain ONNX file, an engine with its command line, or a Triton model repository."""
    config = PackConfig(
        target=target,
        precision=precision,
        engine=engine,
        platform=platform,
        model_name=name,
        max_batch=max_batch,
        max_queue_delay_us=max_queue_delay_us,
        gpu=gpu,
    )
    result = pack(Bundle.open(path), folder, config)
    result = msgspec.structs.replace(result, bundle=output.format_path(path), folder=output.format_path(folder))
    if json:
        output.print_json(result)
    else:
        _print_result(result)


def _print_result(result: PackResult) -> None:
    rows = [[name, output.format_bytes(record.size_bytes), record.sha256[:16]] for name, record in result.files.items()]
    output.print_table(f"Packed {result.bundle} into {result.folder}", ["file", "size", "sha256"], rows)
    what = f"Graph {result.graph}, made for " if result.engine is None else "Engine: "
    output.print_line(f"{what}{result.made_for}.")
    if result.command is not None:
        output.print_line("Run it where the tool is installed:")
        output.print_line(f"  {result.command}")
