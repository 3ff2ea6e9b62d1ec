"""What a study of a claim leaves behind: verdicts with their rules, a table, a plot, and a protocol."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from vggedge.cli.output import print_line, print_note, print_table
from vggedge_runtime.dependencies import require, version_of
from vggedge_runtime.device import tool_versions

Verdict: TypeAlias = Literal["supported", "not shown here", "contradicted here"]

RESULTS = Path(__file__).parent / "results"

# Okabe & Ito 2008, colours that the colour-blind tell apart; the yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One statement of a claim, judged.

    Attributes:
        statement: what should hold.
        rule: how the figures decide, fixed in the script.
        figures: those that decided.
        verdict: what the rule made of them.
    """

    statement: str
    rule: str
    figures: str
    verdict: Verdict


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Figures as a reader sees them; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Study:
    """One claim and what was found.

    Attributes:
        name: of the files and of the script.
        claim: in one sentence.
        source: where the claim stands.
        parts: its statements with their verdicts.
        table: the figures.
        protocol: how they came about, beyond what every study states.
        measurements: all of them, as plain data for the JSON.
        figure: a matplotlib Figure.
    """

    name: str
    claim: str
    source: str
    parts: tuple[Part, ...]
    table: Table
    protocol: dict[str, str]
    measurements: Any
    figure: Any


def judge(low: float, high: float, *, margin: float = 0.0) -> Verdict:
    """Whether an interval shows a gain: all of it above ``margin``, all of it below, or neither."""
    if low > margin:
        return "supported"
    return "contradicted here" if high < margin else "not shown here"


def run(name: str, measure: Callable[[bool], Study]) -> None:
    """Read the command line of the script ``name``, do its study (``measure(quick)``), write and print it."""
    parser = argparse.ArgumentParser(description=f"Study of a claim: {name.replace('_', ' ')}.")
    parser.add_argument("--quick", action="store_true", help="few images, one or two seeds: shows that it runs")
    parser.add_argument("--output", type=Path, help=f"folder for {name}.json, .md and .png")
    arguments = parser.parse_args()
    default = Path(tempfile.gettempdir()) / "vggedge-claims" if arguments.quick else RESULTS
    output = arguments.output or default
    if arguments.quick and output.resolve() == RESULTS.resolve():
        parser.error(f"--quick proves nothing and would replace the results in {RESULTS.name}; name another --output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {output}: the folder cannot be made ({error.strerror}); name another.")
    started = time.perf_counter()
    study = measure(arguments.quick)
    minutes = (time.perf_counter() - started) / 60
    paths = write_study(study, output, describe_run(name, arguments.quick, minutes))
    print_table(study.claim, study.table.columns, study.table.rows)
    for part in study.parts:
        print_line(f"{part.verdict}: {part.statement} ({part.figures})")
    print_note(f"{minutes:.1f} minutes; written: {', '.join(map(str, paths))}")


def describe_run(name: str, quick: bool, minutes: float) -> dict[str, str]:
    """What every study states of its run: command, class of machine, versions, duration."""
    versions = {
        "Python": platform.python_version(),
        "TensorFlow": version_of("tensorflow", "tensorflow-cpu") or "none",
        **tool_versions("vggedge", "keras", "numpy", "onnxruntime"),
    }
    return {
        "command": f"python benchmarks/claims/{name}.py{' --quick' if quick else ''}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, no GPU used",
        "versions": ", ".join(f"{tool} {version}" for tool, version in versions.items()),
        "duration": f"{minutes:.1f} minutes",
    }


def write_study(study: Study, output: Path, run_protocol: dict[str, str]) -> list[Path]:
    """Write NAME.json, NAME.md and NAME.png into the folder ``output``; returns the three paths."""
    protocol = run_protocol | study.protocol
    record = {
        "claim": study.claim,
        "source": study.source,
        "parts": study.parts,
        "table": study.table,
        "protocol": protocol,
        "measurements": study.measurements,
    }
    paths = [output / f"{study.name}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    paths[1].write_text(format_study(study, protocol), encoding="utf-8")
    # No software version in the file: the same figures then give the same bytes.
    study.figure.savefig(paths[2], dpi=110, metadata={"Software": None})
    return paths


def format_study(study: Study, protocol: dict[str, str]) -> str:
    """The study as Markdown."""
    lines = [f"# {study.claim}", "", f"Source: {study.source}", ""]
    for part in study.parts:
        lines += [f"**{part.verdict}**: {part.statement}", "", f"- Figures: {part.figures}", f"- Rule: {part.rule}", ""]
    lines += [*format_table(study.table.columns, study.table.rows), "", f"![{study.claim}]({study.name}.png)", ""]
    lines += ["## Protocol", "", *(f"- {key}: {value}" for key, value in protocol.items()), ""]
    return "\n".join(lines)


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    ruler = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, ruler, *rows)]


def build_figure(width: float, height: float, title: str) -> Any:
    """A matplotlib Figure of its Agg canvas, without pyplot's global state; inches."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", "train").FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, wrap=True)
    return figure
