"""vggedge verify: a bundle proved again, on this machine and on labelled images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from vggedge.cli import output
from vggedge.cli.reading import open_labelled, read_labelled
from vggedge.data import ImageSet
from vggedge_export.reproof import (
    GraphProof,
    Limit,
    Reproof,
    ReproofConfig,
    check_files,
    check_gate,
    choose_graphs,
    choose_limit,
    is_met,
    reprove,
)
from vggedge_runtime.backends.base import backend_choices
from vggedge_runtime.bundle import Bundle

NAME = "verify"

_SHOWN_FLIPS = 5  # of a graph
_SHOWN_CLASSES = 5  # of a graph


def command(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by vggedge export.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled images, best never seen in training.")],
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of fp32, fp16, int8 and the bundle's graphs, comma-separated; all graphs if left out. fp32 always "
            "answers: the others are compared with it."
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help=f"One of {backend_choices()}.")] = "auto",
    images: Annotated[int, typer.Option(min=1, help="Prove on at most so many.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of these images.")] = 0,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="What a graph may lose against fp32, else exit code 3; the limit of the export, if it had one and "
            "this is left out.",
        ),
    ] = None,
    accept_undecided: Annotated[
        bool, typer.Option("--accept-undecided", help="Let through, too, what the images are too few to decide on.")
    ] = False,
    json: output.JsonFlag = False,
) -> None:
    """Check every file of BUNDLE, and prove its graphs on this machine: against fp32 and against the manifest."""
    config = ReproofConfig(
        backend=backend,
        precisions=None if precision is None else tuple(part.strip() for part in precision.split(",") if part.strip()),
        max_drop=max_drop,
        accept_undecided=accept_undecided,
    )
    bundle = Bundle.open(path)
    choose_graphs(bundle, config.precisions)  # what can be refused is refused before any work
    choose_limit(bundle, config)
    with output.progress(quiet=json) as advance:
        check_files(bundle, advance)
        manifest = bundle.manifest
        chosen = open_labelled(data, manifest.image, manifest.labels, "the bundle's model").take(images, seed)
        loaded = read_labelled(chosen, "images", advance)
        result = reprove(bundle, loaded, config, place=_place_in(chosen), progress=advance)
    result = msgspec.structs.replace(result, bundle=output.format_path(path))
    if json:
        output.print_json(result)
    else:
        _print_result(result)
    check_gate(result)


def _place_in(images: ImageSet) -> Callable[[int], str]:
    return lambda row: output.format_path(Path(images.name_one(row)))


def _print_result(result: Reproof) -> None:
    fp32 = result.graphs[0]
    title = f"Proof of {result.bundle} on {result.data}: fp32 on {fp32.backend}, and the others against it"
    columns = ["graph", "how", "agreement", "accuracy [95 %]", "change [95 %]", "manifest"]
    output.print_table(title, columns, [_row(graph) for graph in result.graphs])
    for line in _describe_manifest(result):
        output.print_line(line)
    for graph in result.graphs:
        for line in _describe_graph(graph):
            output.print_line(line)
    if any(graph.obtained == "emulated" for graph in result.graphs):
        output.print_line(
            "Emulated: a twin of the graph that rounds every result to FP16 ran, as this backend computes FP16 in FP32."
        )
    _print_flips(result)
    _print_verdicts(result)


def _row(graph: GraphProof) -> list[object]:
    in_manifest = f"{100 * graph.in_manifest.share:.2f} %"
    if graph.not_proved is not None:
        return [graph.name, "not proved", "", "", "", in_manifest]
    compared = graph.comparison
    return [
        graph.name,
        f"{graph.obtained} on {graph.backend}",
        "" if compared is None else f"{100 * compared.agreement.share:.2f} %",
        graph.accuracy,
        "" if compared is None else str(compared.change).replace(" points", ""),
        in_manifest,
    ]


def _describe_manifest(result: Reproof) -> list[str]:
    """How what was found here goes with what the manifest says."""
    proved = [graph for graph in result.graphs if graph.not_proved is None]
    if result.used_for == "evaluation":
        found = ", ".join(f"{graph.name} {graph.right_difference or 0:+d}" for graph in proved)
        same = all(graph.right_difference == 0 for graph in proved)
        counted = "as many right answers here as there" if same else f"right answers here against there: {found}"
        return [f"Manifest: proved on these very images; {counted}."]
    apart = [graph for graph in proved if not graph.intervals_overlap]
    overlap = "its intervals and those here do not all overlap" if apart else "its intervals and those here overlap"
    lines = [f"Manifest: proved on another set, some of whose images may be among these; {overlap}."]
    lines += [f"{graph.name}: {graph.accuracy} here, {graph.in_manifest} in the manifest." for graph in apart]
    if result.used_for is not None:
        done = {"calibration": "set the INT8 ranges", "selection": "chose among calibrators and plans"}[result.used_for]
        lines.append(f"These very images {done} at export: what they say of INT8 is too good.")
    return lines


def _describe_graph(graph: GraphProof) -> list[str]:
    """What should be known of a graph besides its row, a sentence each."""
    if graph.not_proved is not None:
        return [f"{graph.name}: not proved: {graph.not_proved}"]
    compared = graph.comparison
    if compared is None or compared.change is None or not graph.flips:
        return []
    change = compared.change
    lines = [
        f"{graph.name}: images answered otherwise than by fp32: {len(graph.flips)}, of which {change.lost} lost and "
        f"{change.gained} gained (exact McNemar test, p = {change.p_value:.2g})."
    ]
    worse = [each for each in compared.classes if each.lost > each.gained]
    worse.sort(key=lambda each: (each.gained - each.lost) / each.images)
    if worse:
        shown = ", ".join(
            f"{each.label} ({each.reference_right} to {each.candidate_right} of {each.images})"
            for each in worse[:_SHOWN_CLASSES]
        )
        rest = f" and {len(worse) - _SHOWN_CLASSES} more" if len(worse) > _SHOWN_CLASSES else ""
        lines.append(f"{graph.name}: fewer right answers than fp32 in the classes {shown}{rest}.")
    return lines


def _print_flips(result: Reproof) -> None:
    rows: list[list[object]] = [
        [
            graph.name,
            flip.true,
            f"{flip.reference} ({flip.reference_margin:.2f})",
            f"{flip.candidate} ({flip.candidate_margin:.2f})",
            flip.image,
        ]
        for graph in result.graphs
        for flip in graph.flips[:_SHOWN_FLIPS]
    ]
    if rows:
        output.print_line()
        title = f"Answered otherwise, up to {_SHOWN_FLIPS} a graph: where fp32's margin over its next class is largest"
        output.print_table(title, ["graph", "true class", "fp32", "graph's answer", "image"], rows)


def _print_verdicts(result: Reproof) -> None:
    limit = result.limit
    if limit is None:
        output.print_line("Nothing was judged: the bundle was exported without a limit, and no --max-drop was given.")
        return
    output.print_line(_describe_limit(limit))
    for graph in result.graphs:
        if graph.not_proved is not None:
            output.print_line(f"Gate, {graph.name}: not met: it could not be proved here.")
        elif graph.verdict is not None:
            met = is_met(graph.verdict, limit)
            said = {"pass": "passes", "fail": "fails", "undecided": "let through undecided" if met else "undecided"}
            output.print_line(f"Gate, {graph.name}: {said[graph.verdict.decision]}: {graph.verdict.describe()}.")


def _describe_limit(limit: Limit) -> str:
    source = "--max-drop" if limit.source == "user" else "of the export, as the manifest says"
    undecided = ", and what the images cannot decide is let through" if limit.accept_undecided else ""
    return f"Limit: at most {limit.max_drop:g} points lost against fp32 ({source}){undecided}."
