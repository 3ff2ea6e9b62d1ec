"""vggedge build: engines of a bundle, for this machine or ahead of time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from vggedge.cli import output
from vggedge.cli.engine_tables import print_engines
from vggedge_export.building import BuildResult, build_engines, choose_builder, choose_graphs
from vggedge_export.engine_config import EngineConfig
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.errors import UsageError

NAME = "build"

_PRODUCTS = {"auto": "auto", "tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

_Bundle: TypeAlias = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by vggedge export.")]
_For: TypeAlias = Annotated[
    str,
    typer.Option(
        "--for",
        metavar="PRODUCT",
        help="tensorrt: for the GPU here, Jetsons too. rtx: TensorRT-RTX, for desktop GPUs, with or without one here. "
        "auto: what is installed and can build here.",
    ),
]
_Precision: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Of fp32, fp16, int8 and the bundle's graphs, comma-separated; all for the product if left out."),
]
_Batch: TypeAlias = Annotated[
    str, typer.Option(help="One batch, static: lowest latency; or smallest,best,largest, as 1,4,8.")
]
_Target: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Compute capabilities, as 8.9,12.0; all that run INT8 if left out. TensorRT-RTX only."),
]
_Workspace: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What kernels may use, as 512MB or 2GB; if left out half of what is free, and with rtx no limit.",
    ),
]
_Level: TypeAlias = Annotated[
    int | None, typer.Option(help="0 (fast build) to 5 (every tactic); 3 if left out. TensorRT only.")
]
_Tf32: TypeAlias = Annotated[
    bool, typer.Option("--tf32/--no-tf32", help="Float32 products in TF32; without it for comparing with fp32.")
]
_TimingCache: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--timing-cache/--no-timing-cache",
        help="Keep timings of kernels in the user's cache folder. TensorRT only, and there on by default.",
        show_default=False,
    ),
]
_KeepBest: TypeAlias = Annotated[
    int, typer.Option(help="Build so many times and keep the fastest. TensorRT with a GPU only.")
]
_Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Build what is there already, too.")]


def command(
    path: _Bundle,
    product: _For = "auto",
    precision: _Precision = None,
    batch: _Batch = "1",
    target: _Target = None,
    workspace: _Workspace = None,
    optimization_level: _Level = None,
    tf32: _Tf32 = True,
    timing_cache: _TimingCache = None,
    keep_best: _KeepBest = 1,
    force: _Force = False,
    json: output.JsonFlag = False,
) -> None:
    """Build engines from BUNDLE's graphs and put them into it: for this machine, or ahead of time for others."""
    config = EngineConfig(
        batches=_read_batches(batch),
        targets=_split("--target", target) or (),
        workspace_bytes=None if workspace is None else _read_size(workspace),
        optimization_level=optimization_level,
        tf32=tf32,
        timing_cache=timing_cache,
        keep_best=keep_best,
    )
    if product not in _PRODUCTS:
        raise UsageError(f"--for is {product!r}; known: {', '.join(_PRODUCTS)}.")
    bundle = Bundle.open(path)
    builder = choose_builder(_PRODUCTS[product])
    graphs = choose_graphs(bundle, builder, _split("--precision", precision))
    with output.progress(quiet=json) as advance:
        result = build_engines(path, builder, graphs, config, force=force, progress=advance)
    output.print_json(result) if json else _print_result(result)


def _print_result(result: BuildResult) -> None:
    records = [each.record for each in result.engines]
    there = [each.record for each in result.engines if each.was_there]
    print_engines(records, there, were_run=any(each.latencies_ms for each in result.engines))
    for each in result.engines:
        if each.latencies_ms:
            times = ", ".join(f"{latency:.3f}" for latency in each.latencies_ms)
            output.print_line(f"{each.record.key.graph}: the fastest was kept of {times} ms.")
    if there:
        output.print_line("What is there already was built from the same graph by the same choices; --force rebuilds.")
    output.print_line(f"Bundle: {result.bundle}")


def _split(option: str, text: str | None) -> tuple[str, ...] | None:
    """The parts between commas; None where the option was not given. An empty one is a script's unset variable."""
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise UsageError(f"{option} is {text!r}; needed is at least one name. Leave the option out for all.")
    return parts


def _read_batches(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"\s*\d+\s*", part, re.ASCII) for part in parts):
        raise UsageError(f"--batch is {text!r}; needed is one number, or smallest,best,largest, as 1,4,8.")
    numbers = [int(part) for part in parts]
    return (numbers[0], numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1], numbers[2])


def _read_size(text: str) -> int:
    """Bytes of ``512MB``, ``1.5 GB`` or ``2GiB``."""
    found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kmg]i?|)b?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None:
        raise UsageError(f"--workspace is {text!r}; needed is a size such as 512MB, 1.5GB or 2GiB.")
    return int(float(found[1]) * _UNITS[found[2].lower()])
