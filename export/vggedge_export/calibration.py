"""Ranges of activations over a calibration set: what INT8 scales are made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vggedge_export.graph import INPUT, Graph, make_node, value_info
from vggedge_runtime.backends.ort import open_ort_session
from vggedge_runtime.errors import ConversionError
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.progress import Advance


def largest_magnitudes(
    graph: Graph, tensors: Sequence[str], images: Pixels, *, batch: int, scratch: Path, progress: Advance
) -> dict[str, float]:
    """Largest absolute value of every tensor over all images.

    The maximum is taken inside the graph, so that nothing but two numbers a tensor leave it, whatever the
    image size; and a maximum does not depend on how the images fall into batches. The second number is a mean:
    ONNX Runtime's maximum passes over NaN, a mean does not.

    Args:
        graph: FP32 graph; not changed.
        tensors: names of float tensors in it.
        images: uint8 (n, h, w, 3).
        batch: images at a time; bounds memory only.
        scratch: file to write the probing graph to; removed again.
        progress: told the number of images done.

    Raises:
        ConversionError: a tensor is not finite on some image, or zero on all.
    """
    tensors = list(dict.fromkeys(tensors))  # two layers may read one tensor
    _write_probe(graph, tensors, scratch)
    session = open_ort_session(scratch)
    scratch.unlink()
    maxima = np.zeros(len(tensors))
    for start in range(0, len(images), batch):
        answers = session.run(None, {INPUT: images[start : start + batch]})
        largest, mean = np.array(answers, dtype=np.float64).reshape(len(tensors), 2).T
        finite = np.isfinite(largest) & np.isfinite(mean)
        if not finite.all():
            bad = tensors[int(np.flatnonzero(~finite)[0])]
            raise ConversionError(f"{bad}: not finite on a calibration image. The model itself is broken there.")
        maxima = np.maximum(maxima, largest)
        progress(min(start + batch, len(images)), len(images), "calibrating")
    dead = [tensor for tensor, value in zip(tensors, maxima, strict=True) if value == 0]
    if dead:
        raise ConversionError(
            f"{', '.join(dead)}: zero on all {len(images)} calibration images, so no INT8 scale can be found. "
            "Either the images are unlike the training images, or the layer died in training: check accuracy first."
        )
    return dict(zip(tensors, map(float, maxima), strict=True))


def _write_probe(graph: Graph, tensors: Sequence[str], path: Path) -> None:
    """Write a graph that answers, for every tensor, the maximum and the mean of its absolute values."""
    probe = graph.copy()
    probe.outputs = []
    for tensor in tensors:
        magnitude = f"{tensor}/calibration_abs"
        probe.nodes.append(make_node("Abs", [tensor], magnitude))
        for op in ("ReduceMax", "ReduceMean"):
            result = f"{tensor}/calibration_{op}"
            probe.nodes.append(make_node(op, [magnitude], result, keepdims=0))
            probe.outputs.append(value_info(result, np.float32, []))
    probe.drop_unused()
    probe.write(path)
