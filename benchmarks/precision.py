"""What FP16, INT8 and mixed precision cost in accuracy, and what the budget and fine-tuning bring back.

Trains the compact VGG-16 on three data sets and exports it as a user would; then makes one of the models hard for INT8
(a few channels scaled by 100, the next layer's weights divided, so that FP32 computes the same) and exports that
by the plainest ranges, by the best, within a budget, and after fine-tuning. Every figure is of a bundle's manifest.

    python benchmarks/precision.py [--quick] [--output FOLDER] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from vggedge.cli.output import print_line, print_note, print_table
from vggedge.model import ModelCard, read_model, write_model
from vggedge_runtime import Bundle
from vggedge_runtime.bundle import GraphRecord
from vggedge_runtime.device import tool_versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

BARS = {"fp16": 0.1, "int8": 0.5, "int8-rtx": 1.0}
"""Points of accuracy that a graph may lose at most."""
LEAST_AGREEMENT = 98.5
"""Per cent of images on which int8 keeps the class, at least."""

JUDGED = ("fingers", "fingers-hard", "digits")
"""Models that the bars are for. A hardened one shows what happens where they cannot be met."""

HARDENED = ("block3_conv1", "block4_conv1", "fc1")
"""Layers of which every eighth channel is scaled; none has a BatchNorm behind it."""
FACTOR = 100.0
BUDGET = 0.5


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One graph of one bundle.

    Attributes:
        subject: the model and how it was exported.
        graph: its name.
        record: what the manifest says of it.
    """

    subject: str
    graph: str
    record: GraphRecord


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is done.

    Attributes:
        images: to train on, by data set.
        epochs: by data set; None takes the recipe's.
        evaluation: images that prove.
        selection: images that choose.
        tuning_epochs: of fine-tuning.
    """

    images: dict[str, int]
    epochs: dict[str, int]
    evaluation: int
    selection: int
    tuning_epochs: int


FULL = Plan(
    images={"fingers": 6000, "fingers-hard": 12000},
    epochs={"fingers": 10, "fingers-hard": 10, "digits": 40},
    evaluation=10_000,
    selection=4000,
    tuning_epochs=3,
)
QUICK = Plan(
    images={"fingers": 240, "fingers-hard": 120},
    epochs={"fingers": 2, "fingers-hard": 1, "digits": 1},
    evaluation=60,
    selection=60,
    tuning_epochs=1,
)


def run(*words: object) -> int:
    """Run one vggedge command, shown as it is typed; returns its exit code."""
    command = [str(word) for word in words]
    print_note(f"$ vggedge {' '.join(command)}")
    done = subprocess.run([sys.executable, "-m", "vggedge", *command], stdout=subprocess.DEVNULL, check=False)
    return done.returncode


def check(*words: object) -> None:
    """Run one command that has to succeed."""
    if code := run(*words):
        sys.exit(code)


def rows_of(subject: str, bundle: Path) -> list[Row]:
    """Every graph of a bundle but fp32, which stands for itself."""
    graphs = Bundle.open(bundle).manifest.graphs
    return [Row(subject=subject, graph=name, record=record) for name, record in graphs.items()]


def export(model: Path, calibration: str, evaluation: str, bundle: Path, plan: Plan, *more: object) -> int:
    """Export with the images of ``plan``; returns the exit code."""
    counts = ["--evaluation-images", plan.evaluation]
    if "--calibrator" not in more or "--max-drop" in more:  # else nothing is chosen
        counts += ["--selection-images", plan.selection]
    data = ["--calibration", calibration, "--evaluation", evaluation]
    return run("export", model, *data, *counts, "-o", bundle, "--no-engine", *more)


def measure_fingers(level: str, folder: Path, plan: Plan) -> list[Row]:
    """Train on drawn hands of seed 0, calibrate on seed 2, prove on seed 1."""
    model = folder / f"{level}.keras"
    images = f"{level}:{plan.images[level]}@0"
    # On hard hands alone the compact net stays at chance; from easy ones it gets away.
    begin = ["--initial", folder / "fingers.keras"] if level == "fingers-hard" else ["--model", "vgg16-compact"]
    check("train", images, *begin, "--epochs", plan.epochs[level], "-o", model)
    if export(model, f"{level}@2", f"{level}:{plan.evaluation}@1", folder / level, plan):
        sys.exit(1)
    return rows_of(level, folder / level)


def measure_digits(folder: Path, plan: Plan) -> list[Row]:
    """The 1,797 scans of scikit-learn: few images, real ones."""
    subprocess.run([sys.executable, str(ROOT / "examples/digits/make_digits.py"), str(folder / "scans")], check=True)
    model, epochs = folder / "digits.keras", plan.epochs["digits"]
    options = ["--model", "vgg16-compact", "--epochs", epochs, "--batch-size", 32]
    check("train", folder / "scans/train", *options, "-o", model)
    if export(model, str(folder / "scans/train"), str(folder / "scans/test"), folder / "digits", plan):
        sys.exit(1)
    return rows_of("digits", folder / "digits")


def measure_hardened(folder: Path, plan: Plan) -> list[Row]:
    """The fingers model made hard for INT8: plainly, within a budget, and fine-tuned."""
    model, tuned = folder / "hardened.keras", folder / "tuned.keras"
    harden(folder / "fingers.keras", model)
    data = ["fingers@2", f"fingers:{plan.evaluation}@1"]
    rows = []
    for name, source, options in (
        ("hardened, ranges max", model, ["--calibrator", "max"]),
        ("hardened, ranges max, --max-drop 0.5", model, ["--calibrator", "max", "--max-drop", BUDGET]),
        ("hardened", model, []),
        ("hardened, --max-drop 0.5", model, ["--max-drop", BUDGET]),
        ("hardened, fine-tuned", tuned, []),
    ):
        if source == tuned:
            images = f"fingers:{plan.images['fingers']}@0"
            check("finetune", model, images, "--epochs", plan.tuning_epochs, "-o", tuned)
        bundle = folder / name.replace(" ", "_").replace(",", "")
        code = export(source, *data, bundle, plan, *options)
        rows += rows_of(name, bundle) if code == 0 else []
        if code:
            print_note(f"{name}: exit code {code}, nothing was exported")
    return rows


def harden(source: Path, target: Path) -> None:
    """Scale some channels of some layers by FACTOR and divide what reads them, so that FP32 answers stay."""
    network, card = read_model(source)
    layers = [layer for layer in network.layers if any("kernel" in weight.name for weight in layer.weights)]
    names = [layer.name for layer in layers]
    for name in HARDENED:
        layer, behind = layers[names.index(name)], layers[names.index(name) + 1]
        kernel, bias = layer.get_weights()
        kernel[..., ::8] *= FACTOR
        bias[::8] *= FACTOR
        layer.set_weights([kernel, bias])
        following, *rest = behind.get_weights()
        following[..., ::8, :] /= FACTOR
        behind.set_weights([following, *rest])
    if not isinstance(card, ModelCard):
        sys.exit(f"{source}: no card beside it")
    write_model(network, target, card)


def describe(row: Row) -> list[str]:
    """A row as a reader sees it."""
    proof, chosen = row.record.evidence, row.record.plan
    change = proof.change
    return [
        row.subject,
        row.graph,
        proof.obtained,
        str(proof.accuracy),
        f"{100 * proof.agreement.share:.2f} %",
        "" if change is None or row.graph == "fp32" else str(change).replace(" points", ""),
        "" if change is None or row.graph == "fp32" else f"{change.p_value:.2g}",
        row.record.calibration.method if row.record.calibration else "",
        f"{100 * chosen.chosen.int8_share:.1f} %" if chosen else "",
        verdict(row),
    ]


def verdict(row: Row) -> str:
    """Whether the bar is met: by the estimate, and whether the interval leaves a doubt."""
    change, bar = row.record.evidence.change, BARS.get(row.graph)
    if bar is None or change is None or row.subject not in JUDGED:
        return ""
    agrees = row.graph != "int8" or 100 * row.record.evidence.agreement.share >= LEAST_AGREEMENT
    if -change.points > bar or not agrees:
        return "missed"
    return "met" if -change.low <= bar else "met, not surely"


COLUMNS = [
    *("subject", "graph", "how", "accuracy [95 %]", "agreement", "change, points [95 %]", "p", "ranges"),
    *("INT8 work", "bar"),
]


def write_results(rows: list[Row], output: Path, facts: dict[str, str]) -> None:
    """Write precision.md and precision.json."""
    output.mkdir(parents=True, exist_ok=True)
    table = [COLUMNS, ["---"] * len(COLUMNS), *map(describe, rows)]
    lines = [f"| {' | '.join(each)} |" for each in table]
    protocol = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    text = f"# What precision costs\n\n{chr(10).join(lines)}\n\n## Protocol\n\n{protocol}\n"
    (output / "precision.md").write_text(text, encoding="utf-8")
    figures = msgspec.json.encode({"rows": rows, "protocol": facts})
    (output / "precision.json").write_bytes(msgspec.json.format(figures, indent=1) + b"\n")


def protocol(plan: Plan, seconds: float) -> dict[str, Any]:
    """What a reader needs to believe the table, or to make it again."""
    versions = {"Python": platform.python_version(), **tool_versions("keras", "tensorflow", "onnxruntime", "numpy")}
    return {
        "command": "python benchmarks/precision.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "duration": f"{seconds / 60:.1f} minutes",
        "images": "drawn hands of seed 0 train, seed 2 calibrates (200) and chooses "
        f"({plan.selection:,} at most), seed 1 proves; digits: every fifth scan of a class proves",
        "change": "accuracy minus that of fp32 on the same images, 95 % bootstrap interval; p: exact McNemar test",
        "bar": f"points lost at most: {', '.join(f'{name} {bar:g}' for name, bar in BARS.items())}; int8 agrees on at "
        f"least {LEAST_AGREEMENT} % of the images; models that were made hard have none. `not surely`: the interval "
        "reaches beyond the bar",
        "hardened": f"every eighth channel of {', '.join(HARDENED)} times {FACTOR:g}, the weights behind it divided",
        "emulated": "a twin of the graph that rounds every result to FP16 answered, in ONNX Runtime",
    }


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images and epochs: shows that it runs")
    parser.add_argument("--output", type=Path, help="folder for precision.md and precision.json")
    parser.add_argument("--work", type=Path, help="folder that keeps models and bundles")
    arguments = parser.parse_args()
    if arguments.quick and arguments.output is None:
        parser.error("--quick proves nothing and would replace the results; name an --output.")
    work = arguments.work or Path(tempfile.mkdtemp(prefix="vggedge-precision-"))
    work.mkdir(parents=True, exist_ok=True)
    plan, started = QUICK if arguments.quick else FULL, time.perf_counter()
    rows = [row for level in ("fingers", "fingers-hard") for row in measure_fingers(level, work, plan)]
    rows += measure_digits(work, plan)
    rows += measure_hardened(work, plan)
    write_results(rows, arguments.output or RESULTS, protocol(plan, time.perf_counter() - started))
    print_table("What precision costs", COLUMNS, [describe(row) for row in rows])
    print_line(f"Written to {arguments.output or RESULTS}; {time.perf_counter() - started:.0f} s")
    if arguments.work is None:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
