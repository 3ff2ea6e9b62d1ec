"""Session: an open bundle that answers images."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggedge_runtime.backends.base import Backend, Probabilities, choose_backend, load_backend_class
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.errors import BundleError, DataError, SessionError, UsageError
from vggedge_runtime.graphs import GRAPHS, PRECISIONS, golden_tolerance, graphs_of
from vggedge_runtime.preprocess import ImageSpec, Pixels, check_batch, read_image


class Session:
    """A bundle opened on one backend. Make it with ``Session.open``; use it as a context manager.

    Safe for many threads: a lock lets one call at a time through.

    Attributes:
        bundle: the opened bundle.
        backend: name of the backend that runs it.
        graph: name of the graph that runs.
        why: why ``auto`` chose so, in words.
        threads: CPU threads of one inference, as asked for; 0 leaves the choice to the library.
    """

    def __init__(
        self, bundle: Bundle, backend: str, graph: str, why: str, runner: Backend, *, threads: int = 0
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.graph = graph
        self.why = why
        self.threads = threads
        self._runner = runner
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        backend: str = "auto",
        precision: str = "auto",
        *,
        threads: int = 0,
    ) -> Session:
        """Open a bundle, check its hashes, load the graph and run the golden inputs once.

        Args:
            bundle: folder or opened Bundle.
            backend: ``auto`` or a name from backends/base.py.
            precision: ``auto``, ``fp32``, ``fp16``, ``int8``, or the exact name of a graph. ``auto`` takes what the
                backend runs fastest and right: fp32 on ``ort``; on ``openvino`` an INT8 graph if the bundle has one
                and the CPU is an x86 with VNNI, else fp32. So the same bundle may answer in INT8 on one backend or
                machine and in FP32 on another; ``graph`` says which, and naming a precision settles it.
            threads: CPU threads of one inference; 0 leaves the choice to the library.

        Raises:
            BundleError: missing, damaged, or without such a graph.
            UsageError: no such backend or precision.
            MissingDependency: the backend's library is not installed.
            SessionError: the answers to the golden inputs are wrong; a session that answers wrongly does
                not start.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if threads < 0:
            raise UsageError(f"threads is {threads}; needed is 0 (the library's choice) or more.")
        name, why = choose_backend() if backend == "auto" else (backend, "asked for")
        kind = load_backend_class(name)
        graph = choose_graph(opened, kind, precision)
        runner = kind(opened.verified_path(opened.graph(graph).file), threads=threads)
        session = cls(opened, name, graph, why, runner, threads=threads)
        try:
            session._check_golden()
        except BaseException:
            session.close()
            raise
        return session

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the probabilities."""
        return self.bundle.manifest.labels

    @property
    def image_spec(self) -> ImageSpec:
        """How an image has to be prepared; ``predict`` does it for paths."""
        return self.bundle.manifest.image

    def predict(self, images: Any) -> Probabilities:
        """Answer images with class probabilities.

        Args:
            images: one uint8 RGB array (h, w, 3), a batch (n, h, w, 3), one path, or several paths.

        Returns:
            float32 (n, classes); a copy that later calls leave alone. One image gives n = 1.

        Raises:
            DataError: an unreadable file, or an array of the wrong type or shape.
            SessionError: the session is closed.
        """
        batch = self._batch_from(images)
        with self._lock:
            return self._runner.run(batch)

    def close(self) -> None:
        """Free the backend; a second call does nothing."""
        with self._lock:
            self._runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batch_from(self, images: Any) -> Pixels:
        spec = self.image_spec
        if isinstance(images, np.ndarray):
            return check_batch(images, spec)
        if isinstance(images, (str, os.PathLike)):
            return read_image(images, spec)[np.newaxis]
        if isinstance(images, Iterable):
            paths = list(images)
            if paths and all(isinstance(path, (str, os.PathLike)) for path in paths):
                return np.stack([read_image(path, spec) for path in paths])
        raise DataError(
            f"predict() got {type(images).__name__}; it takes a uint8 RGB array ({spec.height}, {spec.width}, 3), "
            "a batch of them, a path, or a list of paths."
        )

    def _check_golden(self) -> None:
        golden = self.bundle.manifest.golden
        if self.graph not in golden.outputs:
            raise BundleError(f"{self.bundle.path}: no golden answer for graph {self.graph!r}. Export it again.")
        inputs = np.load(self.bundle.verified_path(golden.inputs), allow_pickle=False)
        wanted = np.load(self.bundle.verified_path(golden.outputs[self.graph]), allow_pickle=False)
        if wanted.shape[-1] != len(self.labels):
            raise BundleError(
                f"{self.bundle.path}: {len(self.labels)} labels, and its golden answers are of {wanted.shape[-1]} "
                "classes. The manifest was changed; export it again."
            )
        found = self._runner.run(check_batch(inputs, self.image_spec))
        problem = describe_difference(wanted, found, golden_tolerance(self.graph, self.backend))
        if problem:
            raise SessionError(
                f"{self.bundle.path}: graph {self.graph} on backend {self.backend} answers the golden inputs wrongly: "
                f"{problem}. It is not started. Try another backend or precision, and report this one."
            )


def describe_difference(wanted: NDArray[np.float32], found: NDArray[np.float32], tolerance: float) -> str | None:
    """What is wrong with ``found``, both (n, classes) probabilities; None if nothing is."""
    if found.shape != wanted.shape:
        return f"the output has shape {found.shape}, needed is {wanted.shape}"
    if not np.isfinite(found).all():
        return "the output holds NaN or infinity"
    if not np.isfinite(wanted).all():  # every comparison with NaN would pass
        return "the golden answer holds NaN or infinity"
    largest = float(np.abs(found - wanted).max())
    if largest > tolerance:
        return f"a probability is off by {largest:.3g}, allowed is {tolerance:g}"
    top = np.sort(wanted, axis=1)
    clear = top[:, -1] - top[:, -2] > tolerance
    if (found.argmax(1) != wanted.argmax(1))[clear].any():
        return "a top-1 class differs"
    return None


def choose_graph(bundle: Bundle, kind: type[Backend], precision: str) -> str:
    """Name of the graph to run: the one asked for, or the best that the bundle has for this backend."""
    graphs = bundle.manifest.graphs
    if precision in graphs:
        if precision not in GRAPHS:
            raise BundleError(
                f"{bundle.path}: its graph {precision!r} is unknown to this vggedge, which knows {', '.join(GRAPHS)}. "
                "Upgrade vggedge, or choose another precision."
            )
        return precision
    if precision == "auto":
        wanted = [name for each in (*kind.precisions, *PRECISIONS) for name in graphs_of(each)]
    elif precision in PRECISIONS:
        wanted = list(graphs_of(precision))
    else:
        raise UsageError(
            f"precision {precision!r} is unknown; known: auto, {', '.join(PRECISIONS)}, and the graphs of this "
            f"bundle: {', '.join(graphs)}."
        )
    for name in wanted:
        if name in graphs:
            return name
    advice = "" if precision == "auto" else f" with --precision {precision}"
    raise BundleError(
        f"{bundle.path}: no {precision} graph in this bundle; it has: {', '.join(graphs)}. Export again{advice}."
    )
