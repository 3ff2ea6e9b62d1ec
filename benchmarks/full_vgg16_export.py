"""Time and peak memory of exporting the full VGG-16: 138 million weights at 224x224, all precisions, engines.

Weights are random (He), images are drawn gratings, 32 to calibrate on and 32 to prove on: this measures the
machinery, not accuracy. The peak is the resident set of the process that exports; engines are built in another one.

    python benchmarks/full_vgg16_export.py [--json]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vggedge.architecture import get_spec
from vggedge.cli.output import print_line, print_note, print_table
from vggedge.model import build_vgg
from vggedge_export.pipeline import ExportConfig, ExportResult, export
from vggedge_export.verification import Images, LabelledImages
from vggedge_runtime.preprocess import ImageSpec, Pixels
from vggedge_runtime.tensorrt_api import installed_products

COUNT, SIDE, CLASSES = 32, 224, 1000


def gratings(count: int, seed: int) -> Pixels:
    """Coloured sine gratings with noise, (count, 224, 224, 3) uint8: structure that spreads the activations."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE, :3][:2]  # each (side, side, 3): one wave a channel
    images = []
    for _ in range(count):
        across, down = generator.uniform(-0.2, 0.2, (2, 3))
        wave = np.sin(across * columns + down * rows + generator.uniform(0, 6, 3))
        noise = generator.normal(0, 20, (SIDE, SIDE, 3))
        images.append(np.clip(127 + 100 * wave + noise, 0, 255).astype(np.uint8))
    return np.stack(images)


def measure() -> tuple[ExportResult, float]:
    """Export once into a temporary folder: (result, seconds)."""
    # As `vggedge export` does it: the oneDNN allocator would keep 0.8 GB to the end.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    models = [build_vgg(get_spec("vgg16"), seed=0)]
    sets = [LabelledImages(name, gratings(COUNT, seed), np.arange(COUNT)) for seed, name in enumerate("ce")]
    steps: list[str] = []

    def note(done: int, total: int, what: str) -> None:
        if steps[-1:] != [what]:
            steps.append(what)
            print_note(f"{time.perf_counter() - started:6.1f} s  {peak_bytes() / 1e9:.2f} GB  {what}")

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = export(
            models.pop,  # the only reference: export frees the Keras weights once they are in the graph
            Path(folder) / "bundle",
            image=ImageSpec(height=SIDE, width=SIDE),
            labels=tuple(map(str, range(CLASSES))),
            images=Images(calibration=sets[0], evaluation=sets[1]),
            # Choosing a calibrator needs a third set and would only repeat what is measured here.
            config=ExportConfig(engine="auto" if installed_products() else "none", calibrator="max"),
            progress=note,
        )
        return result, time.perf_counter() - started


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def main() -> None:
    """Measure, and print a table or, with --json, one object."""
    result, seconds = measure()
    evidence = {name: graph.evidence for name, graph in result.manifest.graphs.items()}
    if "--json" in sys.argv:
        figures = {
            "seconds": seconds,
            "peak_bytes": peak_bytes(),
            "max_abs_difference": {name: each.max_abs_difference for name, each in evidence.items()},
            "agreement": {name: each.agreement.share for name, each in evidence.items()},
            "engine_bytes": {each.key.graph: each.size_bytes for each in result.engines},
            "tools": result.manifest.tools,
        }
        print(json.dumps(figures, indent=2))
        return
    files, engines = result.manifest.files, {each.key.graph: each for each in result.engines}
    rows = [
        [
            name,
            f"{graph.evidence.max_abs_difference:.1e} of {graph.evidence.against}",
            f"{files[graph.file].size_bytes / 1e6:.1f} MB",
            f"{engines[name].size_bytes / 1e6:.1f} MB, {engines[name].build_seconds:.1f} s" if name in engines else "-",
        ]
        for name, graph in result.manifest.graphs.items()
    ]
    print_table("Full VGG-16, 224x224x3, 1000 classes", ["graph", "max difference", "graph size", "engine"], rows)
    print_line(f"{seconds:.1f} s, peak {peak_bytes() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
