from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from vggedge_runtime import bench
from vggedge_runtime.bench import BenchConfig, BenchResult, measure_latency, measure_session
from vggedge_runtime.bundle import hash_file
from vggedge_runtime.errors import UsageError
from vggedge_runtime.session import Session
from vggedge_runtime.statistics import percentiles


class Clock:
    """Time that passes in calls only: call number i takes durations_ms[i], the last one from then on."""

    def __init__(self, *durations_ms: float) -> None:
        self.now_ns = 12_345
        self.durations_ms = durations_ms
        self.calls = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def call(self) -> None:
        self.now_ns += round(1e6 * self.durations_ms[min(self.calls, len(self.durations_ms) - 1)])
        self.calls += 1


def measure(clock: Clock, config: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> bench.Measurement:
    monkeypatch.setattr(bench.time, "perf_counter_ns", clock.perf_counter_ns)
    return measure_latency(clock.call, config)


class TestMeasureLatency:
    def test_iterations_hold_when_time_is_up_early(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(2.0)
        found = measure(clock, BenchConfig(iterations=30, seconds=0.001, warmup_seconds=0.01), monkeypatch)
        assert found.samples_ms == [2.0] * 30
        assert clock.calls == 5 + 30

    def test_seconds_hold_when_the_calls_are_quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(0.5)
        found = measure(clock, BenchConfig(iterations=3, seconds=1, warmup_seconds=0.2), monkeypatch)
        assert len(found.samples_ms) == 2000
        assert clock.calls == 400 + 2000

    def test_one_call_warms_up_at_least_and_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(900.0, 1.0)
        found = measure(clock, BenchConfig(iterations=4, seconds=0, warmup_seconds=0), monkeypatch)
        assert found.samples_ms == [1.0] * 4

    def test_every_sample_is_kept_in_order_and_nothing_is_clipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        durations = [0.0, *np.random.default_rng(0).integers(1, 50, 299) / 8, 5000.0]
        found = measure(Clock(*durations), BenchConfig(iterations=300, seconds=0, warmup_seconds=0), monkeypatch)
        assert found.samples_ms == durations[1:]
        assert found.max_ms == 5000
        assert found.mean_ms == pytest.approx(sum(durations) / 300)
        assert found.percentiles_ms == percentiles(durations[1:])
        assert found.percentiles_ms["p95"] is not None
        assert found.percentiles_ms["p99"] is None

    def test_real_time(self) -> None:
        found = measure_latency(lambda: time.sleep(0.002), BenchConfig(iterations=5, seconds=0, warmup_seconds=0))
        assert 2 <= min(found.samples_ms) <= found.mean_ms <= found.max_ms < 2000

    def test_an_error_in_the_call_comes_out(self) -> None:
        with pytest.raises(ZeroDivisionError):
            measure_latency(lambda: 1 / 0, BenchConfig(iterations=1, seconds=0))


class TestConfig:
    @pytest.mark.parametrize(
        "options",
        [
            {"iterations": 0},
            {"seconds": -0.1},
            {"warmup_seconds": -1},
            {"seconds": float("nan")},
            {"seconds": float("inf")},
            {"warmup_seconds": float("nan")},
        ],
    )
    def test_wrong_bounds(self, options: dict[str, float]) -> None:
        with pytest.raises(UsageError, match="at least 1 iteration"):
            BenchConfig(**options)


class TestMeasureSession:
    def test_the_result_is_json(self, tiny_bundle: Path) -> None:
        config = BenchConfig(iterations=25, seconds=0, warmup_seconds=0)
        with Session.open(tiny_bundle, threads=2) as session:
            result = measure_session(session, config, batch=2)
        text = msgspec.json.encode(result)
        assert msgspec.json.decode(text, type=BenchResult) == result
        data = json.loads(text)
        assert (data["bundle"], data["backend"], data["graph"], data["batch"]) == (str(tiny_bundle), "ort", "fp32", 2)
        assert data["threads"] == 2
        assert data["graph_sha256"] == hash_file(tiny_bundle / "graphs/model.fp32.onnx")
        assert data["config"] == {"iterations": 25, "seconds": 0, "warmup_seconds": 0}
        assert len(data["latency"]["samples_ms"]) == 25
        assert min(data["latency"]["samples_ms"]) > 0
        assert {"machine", "cpu", "cores", "python", "numpy", "onnxruntime"} <= set(data["environment"])

    def test_it_times_whole_batches_of_the_bundles_size(
        self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Session.open(tiny_bundle) as session:
            seen: list[tuple[tuple[int, ...], str]] = []
            monkeypatch.setattr(session, "predict", lambda images: seen.append((images.shape, str(images.dtype))))
            measure_session(session, BenchConfig(iterations=3, seconds=0, warmup_seconds=0), batch=5)
        assert seen == [((5, 4, 6, 3), "uint8")] * 4

    def test_no_images(self, tiny_bundle: Path) -> None:
        with Session.open(tiny_bundle) as session, pytest.raises(UsageError, match="batch is 0"):
            measure_session(session, BenchConfig(), batch=0)
