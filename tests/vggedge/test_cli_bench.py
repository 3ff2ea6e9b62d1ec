from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from vggedge.cli import bench
from vggedge_runtime.bench import BenchResult
from vggedge_runtime.bundle import hash_file

CommandLine = Callable[..., tuple[object, str, str]]


@pytest.fixture(autouse=True)
def _short_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench.BenchConfig
    monkeypatch.setattr(bench, "BenchConfig", lambda **options: config(**options, warmup_seconds=0.0))


def test_json_holds_every_sample(tiny_bundle: Path, command_line: CommandLine) -> None:
    options = ["--iterations", 120, "--seconds", 0, "--batch", 2, "--threads", 1, "--json"]
    code, out, err = command_line("bench", tiny_bundle, *options)
    assert (code, err) == (0, "")
    result = msgspec.json.decode(out, type=BenchResult)
    assert (result.backend, result.graph, result.batch) == ("ort", "fp32", 2)
    samples = result.latency.samples_ms
    assert len(samples) == result.config.iterations == 120
    assert result.latency.max_ms == max(samples)
    assert result.latency.mean_ms == pytest.approx(np.mean(samples))
    assert result.latency.percentiles_ms["p90"] == pytest.approx(np.percentile(samples, 90))
    assert result.latency.percentiles_ms["p99"] is None


def test_the_table(tiny_bundle: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("bench", tiny_bundle, "--iterations", 200, "--seconds", 0)
    assert code == 0
    assert "Latency of fp32 on ort, batch 1" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert float(rows["p50"][0]) <= float(rows["p95"][0]) <= float(rows["max"][0])
    assert rows["p99"] == ["needs", "1000", "samples"]
    assert rows["p99.9"] == ["needs", "10000", "samples"]
    assert "200 calls one after another" in out
    assert err == "fp32 on ort (auto: the first installed of ort, openvino); measuring for 0 s ...\n"


def test_the_rate_counts_images(tiny_bundle: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = command_line("bench", tiny_bundle, "--iterations", 5, "--seconds", 0, "--batch", 4, "--json")
    result = msgspec.json.decode(out, type=BenchResult)
    latency = msgspec.structs.replace(result.latency, mean_ms=2.0)
    monkeypatch.setattr(bench, "measure_session", lambda *_: msgspec.structs.replace(result, latency=latency))
    code, out, _ = command_line("bench", tiny_bundle)
    assert code == 0
    assert "2000 images/s" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "no manifest.json in it"),
        (["{bundle}", "--backend", "tpu"], 2, "backend 'tpu' is unknown"),
        (["{bundle}", "--precision", "int8"], 1, "no int8 graph"),
        (["{bundle}", "--iterations", "0"], 2, "'--iterations'"),
        (["{bundle}", "--batch", "0"], 2, "'--batch'"),
        (["{bundle}", "--seconds", "-1"], 2, "'--seconds'"),
        (["{bundle}", "--seconds", "nan"], 2, "seconds"),
        (["{bundle}", "--seconds", "inf"], 2, "finite times"),
    ],
)
def test_errors(arguments: list[str], code: int, message: str, tiny_bundle: Path, command_line: CommandLine) -> None:
    found, out, err = command_line("bench", *(each.format(bundle=tiny_bundle) for each in arguments), "--json")
    assert (found, out) == (code, "")
    assert message in err


def test_a_session_that_answers_wrongly_is_not_measured(tiny_bundle: Path, command_line: CommandLine) -> None:
    manifest = tiny_bundle / "manifest.json"
    data = json.loads(manifest.read_text())
    np.save(tiny_bundle / "golden/outputs.fp32.npy", np.full((3, 3), 1 / 3, np.float32))
    digest = hash_file(tiny_bundle / "golden/outputs.fp32.npy")
    data["files"]["golden/outputs.fp32.npy"]["sha256"] = digest
    manifest.write_text(json.dumps(data))
    code, out, err = command_line("bench", tiny_bundle)
    assert (code, out) == (1, "")
    assert "answers the golden inputs wrongly" in err
