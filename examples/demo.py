"""The main job from start to end, with the commands a user would type.

Trains the compact VGG-16 on drawn hands that show 0 to 5 fingers, exports it, lets it answer pictures it has
never seen, measures its latency on this CPU, and sums up. Everything lands in the folder ``demo``.

    python examples/demo.py [FOLDER]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from vggedge.cli.output import format_bytes, print_line, print_table
from vggedge_runtime import Bundle
from vggedge_runtime.engine_cache import list_engines
from vggedge_runtime.tensorrt_api import installed_products


def main(folder: Path) -> None:
    """Run the commands below, then print one table made from what they wrote."""
    started = time.perf_counter()
    model, bundle, unseen, figures = (folder / name for name in ("hand.keras", "hand", "unseen", "bench.json"))
    if unseen.exists():
        shutil.rmtree(unseen)  # of an earlier demo; `vggedge images` does not write into a folder that is in use
    engine = [] if installed_products() else ["--no-engine"]

    run("train", "fingers:6000", "--model", "vgg16-compact", "-o", model)
    # Seeds 1, 2 and 3 draw pictures that training, which used seed 0, never saw.
    run("export", model, "--calibration", "fingers@2", "--evaluation", "fingers:2000@1", "-o", bundle, *engine)
    run("images", "fingers:12@3", "-o", unseen)
    run("infer", bundle, unseen, "--top", "2")
    figures.write_text(run("bench", bundle, "--json", show=False), encoding="utf-8")

    print_summary(bundle, json.loads(figures.read_text(encoding="utf-8")))
    print_line(f"Model        {model}  with its labels, image spec and training history beside it")
    print_line(f"Bundle       {bundle}  graphs, golden answers, engines; the proof is in manifest.json")
    print_line(f"Pictures     {unseen}")
    print_line(f"Latencies    {figures}  every sample")
    print_line(f"Whole demo   {time.perf_counter() - started:.0f} s")


def run(*words: object, show: bool = True) -> str:
    """Run one vggedge command, shown as it is typed; returns its stdout if that is not shown. Stops on failure."""
    command = [str(word) for word in words]
    print_line(f"\n$ vggedge {' '.join(command)}")
    done = subprocess.run(
        [sys.executable, "-m", "vggedge", *command], stdout=None if show else subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout or ""


def print_summary(path: Path, figures: dict[str, object]) -> None:
    """Print accuracy, agreement and sizes of every graph, and the latency of the one that was measured."""
    bundle = Bundle.open(path)
    engines = {record.key.graph: record for record in list_engines(path)}
    rows = []
    for name, graph in bundle.manifest.graphs.items():
        measured = figures["latency"] if name == figures["graph"] else None
        engine = engines.get(name)
        rows.append(
            [
                name,
                graph.evidence.accuracy,
                f"{100 * graph.evidence.agreement.share:.2f} %",
                format_bytes(bundle.manifest.files[graph.file].size_bytes),
                format_bytes(engine.size_bytes) if engine else "-",
                f"{measured['percentiles_ms']['p50']:.3f} ms" if isinstance(measured, dict) else "not measured",
            ]
        )
    images = bundle.manifest.graphs["fp32"].evidence.images
    print_line("\nSummary")
    print_table(
        f"{bundle.manifest.name}, {bundle.manifest.parameters:,} parameters, {images:,} unseen images; "
        "fp16 and int8-rtx emulated on the CPU",
        ["graph", "accuracy [95 %]", "same answer", "graph size", "RTX engine", "p50 here"],
        rows,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
