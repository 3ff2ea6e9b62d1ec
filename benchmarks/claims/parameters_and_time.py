"""Dense layers hold most parameters, convolutions take most time: counted for the family, measured for two of it.

python benchmarks/claims/parameters_and_time.py [--quick] [--output DIR]
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reporting import COLOURS, Part, Study, Table, Verdict, build_figure, run

from vggedge.analysis import Analysis, analyse
from vggedge.architecture import SPECS
from vggedge.cli.output import print_note
from vggedge.model import build_vgg
from vggedge_export.conversion import graph_from_keras
from vggedge_export.passes import apply_passes
from vggedge_runtime.dependencies import require

NAME = "parameters_and_time"
KINDS = ("convolutions", "dense layers", "the rest")
TIMED = ("vgg16", "vgg16-compact")
THREADS = 1
WARMUP = 3
MAJORITY = 0.5

Shares = dict[str, float]
"""Of each of KINDS, 0 to 1."""


@dataclass(frozen=True)
class Timing:
    """Time of single runs by kind of layer, (runs,) milliseconds each."""

    milliseconds: dict[str, Sequence[float]]

    def shares(self, kind: str) -> list[float]:
        """Share of one kind of each run's sum, 0 to 1."""
        totals = np.sum(list(self.milliseconds.values()), axis=0)
        return list(np.asarray(self.milliseconds[kind]) / totals)


def measure(quick: bool) -> Study:
    """Count for every variant, run two of them in ONNX Runtime, and judge."""
    analyses = {name: analyse(spec) for name, spec in SPECS.items()}
    timed = TIMED[1:] if quick else TIMED
    runs = 3 if quick else 30
    timings = {name: measure_layers(name, runs) for name in timed}
    return Study(
        name=NAME,
        claim="Dense layers hold most parameters, convolutions take most time",
        source="Simonyan & Zisserman 2014, arXiv 1409.1556, table 2 and section 2.3 (parameters); the time is common "
        "knowledge of which the paper has no figure",
        parts=(
            judge_parameters("the paper's widths", [each for name, each in analyses.items() if "compact" not in name]),
            judge_parameters("the compact widths", [each for name, each in analyses.items() if "compact" in name]),
            *(judge_time(name, timing) for name, timing in timings.items()),
        ),
        table=_build_table(analyses, timings),
        protocol={
            "counts": "by arithmetic from the specs (vggedge.analysis), each at its own input size",
            "time": f"the exported FP32 graph, random weights, ONNX Runtime's own profile of every node, {THREADS} "
            f"thread, batch 1, {runs} runs after {WARMUP} of warm-up; shares are of the sum over the nodes of a run",
            "what is a convolution": "nodes of the operations Conv, with the relu that ONNX Runtime fuses into them; "
            "dense layers: Gemm and MatMul; the rest: poolings, normalisation, layout changes, softmax",
        },
        measurements={
            "shares": {name: each.shares for name, each in analyses.items()},
            "milliseconds": {name: each.milliseconds for name, each in timings.items()},
        },
        figure=draw(analyses, timings),
    )


def measure_layers(variant: str, runs: int) -> Timing:
    """Export ``variant`` with random weights and profile it."""
    print_note(f"exporting {variant} ...")
    spec = SPECS[variant]
    graph = graph_from_keras(build_vgg(spec, seed=0))
    apply_passes(graph)
    image = np.random.default_rng(0).integers(0, 256, (1, *spec.input), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        graph.write(path)
        del graph  # half a gigabyte of weights for vgg16
        print_note(f"running {variant} {WARMUP + runs} times ...")
        return read_profile(profile(path, image, WARMUP + runs), WARMUP)


def profile(path: Path, image: Any, runs: int) -> list[dict[str, Any]]:
    """Events of ONNX Runtime's profiler over ``runs`` runs of the graph at ``path``."""
    ort = require("onnxruntime", "ort")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = THREADS
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(runs):
        session.run(None, {"images": image})
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def read_profile(events: Sequence[dict[str, Any]], warmup: int) -> Timing:
    """Sum the kernel times of each run by kind of layer; the first ``warmup`` runs are left out.

    Every node is one event a run, so the k-th event of a node's name is of the k-th run.
    """
    seen: dict[str, int] = defaultdict(int)
    sums: dict[str, dict[int, float]] = {kind: defaultdict(float) for kind in KINDS}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            number = seen[event["name"]]
            seen[event["name"]] += 1
            sums[kind_of(event["args"]["op_name"])][number] += event["dur"] / 1000
    runs = range(warmup, max(seen.values()))
    return Timing({kind: [times[number] for number in runs] for kind, times in sums.items()})


def kind_of(operation: str) -> str:
    """Which of KINDS a node is, by its operation; ONNX Runtime's fused ones have the name in theirs."""
    if "Conv" in operation:
        return "convolutions"
    return "dense layers" if "Gemm" in operation or "MatMul" in operation else "the rest"


def judge_parameters(which: str, analyses: Sequence[Analysis]) -> Part:
    """Whether the dense layers hold the majority in all these variants."""
    shares = {each.spec.name: parameter_shares(each)["dense layers"] for each in analyses}
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    return Part(
        statement=f"dense layers hold most parameters, at {which}",
        rule="supported if their share is above 50 % in every variant, contradicted if in none",
        figures=f"{100 * shares[least]:.1f} % ({least}) to {100 * shares[most]:.1f} % ({most})",
        verdict=judge_majority(list(shares.values())),
    )


def judge_time(variant: str, timing: Timing) -> Part:
    """Whether the convolutions take the majority of all runs."""
    shares = timing.shares("convolutions")
    return Part(
        statement=f"convolutions take most time of {variant}",
        rule="supported if their share is above 50 % in every run, contradicted if in none",
        figures=f"{_format_share(shares)} of a run's time, median and range of {len(shares)} runs",
        verdict=judge_majority(shares),
    )


def judge_majority(shares: Sequence[float]) -> Verdict:
    """All above a half, none, or some."""
    above = [each > MAJORITY for each in shares]
    return "supported" if all(above) else "not shown here" if any(above) else "contradicted here"


def parameter_shares(analysis: Analysis) -> Shares:
    """Of the parameters."""
    return _complete({each.what: each.parameter_share for each in analysis.shares})


def mac_shares(analysis: Analysis) -> Shares:
    """Of the multiply-accumulates."""
    return _complete({each.what: each.mac_share for each in analysis.shares})


def _complete(shares: Shares) -> Shares:
    named = {kind: shares[kind] for kind in KINDS[:2]}
    return named | {KINDS[2]: 1 - sum(named.values())}


def _build_table(analyses: dict[str, Analysis], timings: dict[str, Timing]) -> Table:
    rows = []
    for name, each in analyses.items():
        parameters, macs = parameter_shares(each), mac_shares(each)
        timing = timings.get(name)
        times = (timing.shares(kind) for kind in KINDS[:2]) if timing else ()
        row = (
            name,
            f"{each.parameters:,}",
            f"{100 * parameters['dense layers']:.1f} %",
            f"{100 * macs['convolutions']:.2f} %",
            *(map(_format_share, times) if timing else ("not measured", "not measured")),
        )
        rows.append(row)
    columns = (
        *("network", "parameters", "of these in dense layers", "convolutions' share of multiply-accumulates"),
        *("convolutions' share of the time", "dense layers' share of the time"),
    )
    return Table(columns=columns, rows=tuple(rows))


def _format_share(shares: Sequence[float]) -> str:
    return f"{100 * np.median(shares):.1f} % ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def draw(analyses: dict[str, Analysis], timings: dict[str, Timing]) -> Any:
    """Shares of parameters, multiply-accumulates and time of the timed variants, stacked."""
    figure = build_figure(8.5, 4.5, "Where are a VGG's parameters, and where does its time go?")
    all_axes = figure.subplots(1, len(timings), sharey=True, squeeze=False)[0]
    for axes, (name, timing) in zip(all_axes, timings.items(), strict=True):
        times = {kind: float(np.median(timing.shares(kind))) for kind in KINDS}
        bars = (parameter_shares(analyses[name]), mac_shares(analyses[name]), times)
        floor = np.zeros(len(bars))
        for kind, colour, hatch in zip(KINDS, COLOURS, ("", "//", ".."), strict=False):
            heights = 100 * np.array([each[kind] for each in bars])
            axes.bar(range(len(bars)), heights, bottom=floor, color=colour, hatch=hatch, edgecolor="white", label=kind)
            floor += heights
        height, width, _ = analyses[name].spec.input
        axes.set_title(f"{name}, {height}x{width}", fontsize=10)
        axes.set_xticks(range(len(bars)), ("parameters", "multiply-\naccumulates", "measured\ntime"))
    all_axes[0].set_ylabel("share, %")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS))
    return figure


if __name__ == "__main__":
    run(NAME, measure)
