"""What a graph's tensors hold over a calibration set: what INT8 scales and the choice of FP16 are made from.

Two streams over the images. The first takes every tensor's largest magnitude inside the graph, so that two numbers a
tensor leave it, whatever the image size. The second counts the magnitudes of the tensors that INT8 needs into
histograms whose bins the first one fixed. Both are sums over single values, so nothing depends on how the images
fall into batches, and nothing but one batch is held. A third, over fewer images, looks at the outputs of the layers
(output_error.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggedge_export.calibrators import BINS, CALIBRATORS, Histogram
from vggedge_export.graph import INPUT, Graph, make_node, value_info
from vggedge_export.output_error import FRACTIONS, best_magnitudes, output_error_probe
from vggedge_export.verification import batch_for, spread_rows
from vggedge_runtime.backends.ort import open_ort_session
from vggedge_runtime.dependencies import require, version_of
from vggedge_runtime.errors import ConversionError
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.progress import Advance

OUTPUT_ERROR = "output"
METHODS = (*CALIBRATORS, OUTPUT_ERROR)
"""How INT8 ranges can be set."""

_OUTPUT_BATCHES = 16  # for output_error.py, which computes every layer a dozen times: 512 images at 64x64, 32 at 224
_DIGEST_BYTES = hashlib.sha256().digest_size
_CACHE_FORMAT = "3"  # counts with the key: what older code measured is not read


@dataclass(frozen=True)
class Activations:
    """What tensors of a graph held over the calibration images.

    Attributes:
        largest: largest magnitude of every float tensor that a node gives.
        histograms: of the magnitudes of the tensors that were asked for.
        by_output: of these, the magnitudes that leave the outputs of the layers behind least off (output_error.py).
    """

    largest: dict[str, float]
    histograms: dict[str, Histogram]
    by_output: dict[str, float] = field(default_factory=dict)

    def magnitude(self, tensor: str, method: str) -> float:
        """The magnitude that INT8 step 127 is to stand for, by one of METHODS."""
        if method == "max":
            return self.largest[tensor]
        return self.by_output[tensor] if method == OUTPUT_ERROR else CALIBRATORS[method](self.histograms[tensor])


@dataclass(frozen=True)
class Calibration:
    """The calibration set and how it is gone through.

    Attributes:
        images: uint8 (n, h, w, 3).
        batch: images at a time; bounds memory only.
        scratch: file to write probing graphs to; removed again.
        progress: told the number of images done.
        cache: folder that keeps what was measured, by the hashes of graph and images; None keeps nothing.
    """

    images: Pixels
    batch: int
    scratch: Path
    progress: Advance
    cache: Path | None = None

    def measure(self, graph: Graph, tensors: Sequence[str], *, with_histograms: bool) -> Activations:
        """Measure ``graph``, an FP32 graph, which is not changed.

        Args:
            graph: what to run.
            tensors: inputs of layers to be quantised; histograms are made of these.
            with_histograms: whether a method but ``max`` is going to be asked for, that of outputs included.

        Raises:
            ConversionError: a tensor is not finite on some image, or one of ``tensors`` is zero on all.
        """
        tensors = list(dict.fromkeys(tensors))  # two layers may read one tensor
        entry = None if self.cache is None else self.cache / f"{self._key(graph, tensors, with_histograms)}.npz"
        found = _read_activations(entry) if entry is not None else None
        if found is None:
            found = self._measure(graph, tensors, with_histograms)
            if entry is not None:
                _write_activations(entry, found)
        return found

    def _measure(self, graph: Graph, tensors: Sequence[str], with_histograms: bool) -> Activations:
        largest = self._largest(graph)
        dead = [tensor for tensor in tensors if largest[tensor] == 0]
        if dead:
            raise ConversionError(
                f"{', '.join(dead)}: zero on all {len(self.images)} calibration images, so no INT8 scale can be found. "
                "Either the images are unlike the training images, or the layer died in training: check accuracy first."
            )
        wanted = {tensor: largest[tensor] for tensor in tensors} if with_histograms else {}
        return Activations(largest, self._histograms(graph, wanted), self._by_output(graph, wanted))

    def _largest(self, graph: Graph) -> dict[str, float]:
        """Largest magnitude of every float tensor that a node gives.

        A mean is taken, too: ONNX Runtime's maximum passes over NaN, a mean does not. It may be infinite where all
        values are finite, as their sum.
        """
        tensors = _float_tensors(graph)
        probe = graph.copy()
        probe.outputs = []
        for tensor in tensors:
            magnitude = f"{tensor}/calibration_abs"
            probe.nodes.append(make_node("Abs", [tensor], magnitude))
            for op in ("ReduceMax", "ReduceMean"):
                result = f"{tensor}/calibration_{op}"
                probe.nodes.append(make_node(op, [magnitude], result, keepdims=0))
                probe.outputs.append(value_info(result, np.float32, []))
        maxima = np.zeros(len(tensors))
        for answers in self._run(probe, "calibrating"):
            largest, mean = np.array(answers, dtype=np.float64).reshape(len(tensors), 2).T
            finite = np.isfinite(largest) & ~np.isnan(mean)
            if not finite.all():
                bad = tensors[int(np.flatnonzero(~finite)[0])]
                raise ConversionError(f"{bad}: not finite on a calibration image. The model itself is broken there.")
            maxima = np.maximum(maxima, largest)
        return dict(zip(tensors, map(float, maxima), strict=True))

    def _histograms(self, graph: Graph, largest: dict[str, float]) -> dict[str, Histogram]:
        """Histograms of the magnitudes above 0, in BINS equal bins up to the largest."""
        if not largest:
            return {}
        probe = graph.copy()
        probe.outputs = [value_info(tensor, np.float32, _axes(graph, tensor)) for tensor in largest]
        counts = {tensor: np.zeros(BINS, np.int64) for tensor in largest}
        for answers in self._run(probe, "counting activations"):
            for tensor, values in zip(largest, answers, strict=True):
                counts[tensor] += _count(values, largest[tensor])
        return {tensor: Histogram(counts[tensor], largest[tensor]) for tensor in largest}

    def _by_output(self, graph: Graph, largest: dict[str, float]) -> dict[str, float]:
        if not largest:
            return {}
        count = _OUTPUT_BATCHES * batch_for(self.images)  # not self.batch, which is to bound memory only
        images = self.images[spread_rows(len(self.images), count)]
        probe = output_error_probe(graph, largest)
        smaller = replace(self, images=images, batch=max(1, self.batch // len(FRACTIONS)))
        return best_magnitudes(largest, smaller._run(probe, "comparing INT8 ranges"))

    def _run(self, probe: Graph, what: str) -> Iterator[list[Any]]:
        """Answers of ``probe``, batch by batch."""
        images = self.images
        probe.drop_unused()
        probe.write(self.scratch)
        session = open_ort_session(self.scratch, prepack=False)
        self.scratch.unlink()
        for start in range(0, len(images), self.batch):
            yield session.run(None, {INPUT: images[start : start + self.batch]})
            self.progress(min(start + self.batch, len(images)), len(images), what)

    def _key(self, graph: Graph, tensors: Sequence[str], with_histograms: bool) -> str:
        digest = hashlib.sha256()
        kind = f"{_CACHE_FORMAT} {BINS} {with_histograms} {version_of('onnxruntime', 'onnxruntime-gpu')}"
        for part in (kind, graph.sha256(), *tensors, str(self.images.shape)):
            digest.update(part.encode() + b"\0")
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()


def cache_folder() -> Path:
    """Where the command line keeps calibrations: ``vggedge/calibration`` in the user's cache folder (XDG base dirs)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vggedge" / "calibration"


def _float_tensors(graph: Graph) -> list[str]:
    """Float32 results of all nodes, in order."""
    types, code = graph.element_types(), require("onnx", "export").TensorProto.FLOAT
    return [name for node in graph.nodes for name in node.output if types.get(name) == code]


def _axes(graph: Graph, tensor: str) -> list[str]:
    """Names for the axes of a layer's input, of which there are as many as its kernel has."""
    readers = (node for node in graph.consumers(tensor) if node.op_type in ("Conv", "Gemm") and node.input[0] == tensor)
    kernels = (graph.weights[node.input[1]] for node in readers if node.input[1] in graph.weights)
    return [f"{tensor}/axis_{axis}" for axis in range(next(kernels).ndim)]


def _count(values: NDArray[np.float32], largest: float) -> NDArray[np.int64]:
    """How many magnitudes above 0 of ``values`` lie in each bin; bin i ends at (i + 1) / BINS * largest."""
    magnitudes = np.abs(values.reshape(-1))
    magnitudes = magnitudes[magnitudes > 0]
    # Right-closed, so that the largest one falls into the last bin; float64, or bins of huge ranges would shift.
    places = np.ceil(magnitudes.astype(np.float64) * (BINS / largest)).astype(np.int64) - 1
    return np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)


def _read_activations(path: Path) -> Activations | None:
    """What the cache has; None if it has nothing, or something damaged, which is then measured and written anew.

    An .npz with its own hash behind it. A zip's checksums cover its members only, and what is damaged elsewhere ends
    in a dozen kinds of exception, or in other numbers.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as stored:
        largest = dict(zip(stored["tensors"].tolist(), stored["largest"].tolist(), strict=True))
        rows = zip(stored["histogram_tensors"].tolist(), stored["counts"], strict=True)
        by_output = dict(zip(stored["output_tensors"].tolist(), stored["by_output"].tolist(), strict=True))
        return Activations(largest, {name: Histogram(counts, largest[name]) for name, counts in rows}, by_output)


def _write_activations(path: Path, found: Activations) -> None:
    """Keep ``found``; where the folder cannot be written nothing is kept, which costs time only."""
    body = io.BytesIO()
    np.savez(
        body,
        tensors=np.array(list(found.largest)),
        largest=np.array(list(found.largest.values())),
        histogram_tensors=np.array(list(found.histograms), dtype=str),
        output_tensors=np.array(list(found.by_output), dtype=str),
        by_output=np.array(list(found.by_output.values()), dtype=np.float64),
        counts=np.array([each.counts for each in found.histograms.values()], dtype=np.int64).reshape(-1, BINS),
    )
    content = body.getvalue()
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content + hashlib.sha256(content).digest())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # on a read-only file system this fails as well
            partial.unlink(missing_ok=True)
