"""Latency of a session: warm-up, then enough calls for long enough, every sample kept.

The figure is what a caller feels, single-stream at batch 1: the next image goes in when the last answer is
out, and the answer is in a NumPy array on the host when the clock stops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import msgspec
import numpy as np

from vggedge_runtime.device import describe_environment
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.session import Session
from vggedge_runtime.statistics import percentiles


class BenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How long to measure. Both lower bounds must hold, as in trtexec.

    Attributes:
        iterations: fewest timed calls.
        seconds: shortest time of measuring.
        warmup_seconds: time of calls before, whose samples are thrown away.
    """

    iterations: int = 1000
    seconds: float = 3.0
    warmup_seconds: float = 0.5

    def __post_init__(self) -> None:
        times = (self.seconds, self.warmup_seconds)
        if self.iterations < 1 or not all(math.isfinite(each) and each >= 0 for each in times):
            raise UsageError(
                f"bench: {self.iterations} iterations, {self.seconds} s and {self.warmup_seconds} s of warm-up; needed "
                "are at least 1 iteration and finite times of 0 s or more."
            )


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Timed calls and what follows from them.

    Attributes:
        samples_ms: one latency a call, in order.
        mean_ms: arithmetic mean.
        max_ms: the slowest call; nothing is clipped.
        percentiles_ms: p50, p90, ...; None where there are too few samples for it.
    """

    samples_ms: list[float]
    mean_ms: float
    max_ms: float
    percentiles_ms: dict[str, float | None]


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark of one session.

    Attributes:
        bundle: its folder.
        backend: what ran it.
        graph: which graph.
        graph_sha256: hash of its ONNX file.
        threads: CPU threads of one inference, as asked for; 0 is the library's choice.
        batch: images a call.
        config: how it was measured.
        latency: a call of ``Session.predict`` with an image that is decoded and resized already.
        environment: machine and versions.
    """

    bundle: str
    backend: str
    graph: str
    graph_sha256: str
    threads: int
    batch: int
    config: BenchConfig
    latency: Measurement
    environment: dict[str, str]


def measure_session(session: Session, config: BenchConfig, batch: int = 1) -> BenchResult:
    """Time ``session.predict`` on noise: no layer of a VGG takes a time that depends on the pixels."""
    if batch < 1:
        raise UsageError(f"batch is {batch}; needed is at least 1.")
    shape = (batch, *session.image_spec.shape)
    manifest = session.bundle.manifest
    images: Pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return BenchResult(
        bundle=str(session.bundle.path),
        backend=session.backend,
        graph=session.graph,
        graph_sha256=manifest.files[manifest.graphs[session.graph].file].sha256,
        threads=session.threads,
        batch=batch,
        config=config,
        latency=measure_latency(lambda: session.predict(images), config),
        environment=describe_environment(),
    )


def measure_latency(call: Callable[[], object], config: BenchConfig) -> Measurement:
    """Time ``call`` until both bounds of ``config`` hold."""
    clock = time.perf_counter_ns
    end = clock() + round(config.warmup_seconds * 1e9)
    call()
    while clock() < end:
        call()
    samples: list[int] = []
    end = clock() + round(config.seconds * 1e9)
    while len(samples) < config.iterations or clock() < end:
        started = clock()
        call()
        samples.append(clock() - started)
    milliseconds = np.array(samples) / 1e6
    return Measurement(
        samples_ms=milliseconds.tolist(),
        mean_ms=float(milliseconds.mean()),
        max_ms=float(milliseconds.max()),
        percentiles_ms=percentiles(milliseconds),
    )
