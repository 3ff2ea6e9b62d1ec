from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge_runtime import bundle as bundles
from vggedge_runtime import evidence, paired
from vggedge_runtime.bundle import (
    FORMAT_VERSION,
    Bundle,
    DataRecord,
    GoldenRecord,
    GraphRecord,
    Manifest,
    PassRecord,
    write_bundle,
    write_manifest,
)
from vggedge_runtime.errors import BundleError
from vggedge_runtime.evidence import (
    CalibrationRecord,
    CalibratorScore,
    Comparison,
    GateRecord,
    LayerRecord,
    PlanPoint,
    PrecisionPlan,
    Sensitivity,
)
from vggedge_runtime.paired import build_class_changes, build_paired_change, find_flips, judge_drop
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.statistics import build_proportion

OLD = Path(__file__).with_name("manifest_before_evidence.json")
"""What export wrote before it proved image by image, without half of the graphs and passes."""

GRAPHS = ("fp32", "fp16", "mixed-rtx")


def comparison(against: str) -> Comparison:
    rng = np.random.default_rng(0)
    reference, candidate = (rng.dirichlet((0.3, 0.3, 0.3), 40).astype(np.float32) for _ in range(2))
    candidate[:25] = reference[:25]
    targets = reference.argmax(axis=1)
    targets[::7] = 1
    before, after = reference.argmax(axis=1), candidate.argmax(axis=1)
    return Comparison(
        against=against,
        obtained="emulated",
        images=40,
        max_abs_difference=float(np.abs(reference - candidate).max()),
        agreement=build_proportion(int((before == after).sum()), 40),
        accuracy=build_proportion(int((after == targets).sum()), 40),
        change=build_paired_change(before == targets, after == targets),
        classes=build_class_changes(reference, candidate, targets, ("cat", "dog", "Ärger ☂")),
        flips=find_flips(reference, candidate, targets, 50),
    )


def plan() -> PrecisionPlan:
    change = build_paired_change(np.arange(30) > 2, np.arange(30) > 4)
    points = tuple(
        PlanPoint(float_layers=("conv", "fc")[:kept], int8_share=1 - kept / 3, change=change, fits=kept > 0)
        for kept in (2, 1, 0)
    )
    return PrecisionPlan(
        max_drop=0.5,
        images=30,
        total_macs=10**11,
        chosen=points[1],
        sensitivities=(Sensitivity(layer="conv", macs=7, divergence=1e-9, change=change),),
        tried=points,
        rule="the most INT8 that fits",
    )


def graph_record(name: str) -> GraphRecord:
    proof = comparison("keras" if name == "fp32" else "fp32")
    if name == "fp32":
        return GraphRecord(file="graphs/fp32.onnx", precision="fp32", made_for=("ort",), op_counts={}, evidence=proof)
    score = CalibratorScore(method="mse", equalized=True, divergence=1.25e-4, agreement=build_proportion(29, 30))
    return GraphRecord(
        file=f"graphs/{name}.onnx",
        precision="int8",
        made_for=("tensorrt",),
        op_counts={"Conv": 2},
        evidence=proof,
        layers=(
            LayerRecord(
                name="conv",
                op="Conv",
                precision="int8",
                macs=10**10,
                largest_output=70000.0,
                int8_magnitude=1.5,
                snr_db=-3.25,
            ),
            LayerRecord(name="fc", op="Gemm", precision="fp16", macs=12),
        ),
        calibration=CalibrationRecord(
            method="mse", equalized=True, equalization_difference=1.5e-7, candidates=(score,)
        ),
        plan=plan(),
        kept_fp32={"conv": 70000.0},
        fp32_scales={"fc": 1.25e-3},
    )


def manifest() -> Manifest:
    proof = comparison("fp32")
    assert proof.change is not None
    return Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        created="2026-01-01T00:00:00+00:00",
        parameters=9,
        image=ImageSpec(height=4, width=6),
        labels=("cat", "dog", "Ärger ☂"),
        graphs={name: graph_record(name) for name in GRAPHS},
        golden=GoldenRecord(inputs="golden/inputs.npy", outputs={name: "golden/outputs.npy" for name in GRAPHS}),
        passes=(PassRecord(name="fold_bias", changes=1, nodes_before=3, nodes_after=2),),
        keras_accuracy=build_proportion(3, 4),
        data={
            use: DataRecord(name=use, images=7, sha256="0" * 64, seen=seen)
            for use, seen in (("calibration", 0), ("selection", 0), ("evaluation", 3))
        },
        tools={"vggedge": "0"},
        files={},
        adaptations=("softmax added",),
        gate=GateRecord(
            max_drop=1.0,
            accept_undecided=True,
            verdicts={
                name: judge_drop(proof.change, limit) for name, limit in zip("abc", (1.0, 30.0, 90.0), strict=True)
            },
        ),
    )


def structs_in(value: Any) -> Iterator[msgspec.Struct]:
    """All structs of a manifest, however deep."""
    if isinstance(value, msgspec.Struct):
        yield value
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from structs_in(each)


def write(folder: Path, content: Manifest) -> Bundle:
    with write_bundle(folder) as staging:
        for name in ("graphs", "golden", "plans"):
            (staging / name).mkdir()
        for file in ("golden/inputs.npy", "golden/outputs.npy", "plans/mixed-rtx.png"):
            (staging / file).write_bytes(file.encode())
        for record in content.graphs.values():
            (staging / record.file).write_bytes(record.file.encode())
        write_manifest(staging, content)
    return Bundle.open(folder)


def test_the_manifest_of_these_tests_has_every_record_and_every_field() -> None:
    """Else a new one would go round untested."""
    there = list(structs_in(manifest()))
    for module in (evidence, paired, bundles):
        for kind in (each for each in vars(module).values() if isinstance(each, type)):
            if not issubclass(kind, msgspec.Struct) or kind.__module__ != module.__name__:
                continue
            if kind is bundles.FileRecord:  # write_manifest makes them
                continue
            found = [each for each in there if type(each) is kind]
            assert found, kind
            for field in msgspec.structs.fields(kind):
                values = [getattr(each, field.name) for each in found]
                if (kind, field.name) != (Manifest, "files"):
                    assert any(value not in (None, (), {}) for value in values), (kind, field.name)
                    assert any(value != field.default for value in values), (kind, field.name)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    wanted = manifest()
    found = write(tmp_path / "bundle", wanted).manifest
    assert msgspec.structs.replace(found, files={}) == wanted
    assert set(found.files) >= {"plans/mixed-rtx.png", "golden/inputs.npy"}
    for before, after in zip(structs_in(wanted), structs_in(msgspec.structs.replace(found, files={})), strict=True):
        assert type(before) is type(after)


def test_a_plot_of_a_plan_is_covered_by_the_manifest(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle", manifest())
    assert bundle.verified_path("plans/mixed-rtx.png").read_bytes() == b"plans/mixed-rtx.png"
    (tmp_path / "bundle/plans/mixed-rtx.png").write_bytes(b"another")
    with pytest.raises(BundleError, match="not what export wrote"):
        bundle.verified_path("plans/mixed-rtx.png")
    write(tmp_path / "bundle", manifest())  # a bundle with plots is one that may be replaced


def test_what_is_computed_of_a_record_is_the_same_after_reading(tmp_path: Path) -> None:
    wanted, found = manifest(), write(tmp_path / "bundle", manifest()).manifest
    for before, after in zip(wanted.graphs.values(), found.graphs.values(), strict=True):
        assert before.evidence.change is not None
        assert after.evidence.change is not None
        assert after.evidence.change.points == before.evidence.change.points
        assert str(after.evidence.change) == str(before.evidence.change)
    assert wanted.gate is not None
    assert found.gate is not None
    decisions = {name: verdict.decision for name, verdict in found.gate.verdicts.items()}
    assert decisions == {"a": "fail", "b": "undecided", "c": "pass"}
    assert [verdict.describe() for verdict in found.gate.verdicts.values()] == [
        verdict.describe() for verdict in wanted.gate.verdicts.values()
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("graphs", "fp16", "layers", 0, "precision"), "int4"),
        (("graphs", "fp16", "layers", 0, "macs"), "many"),
        (("graphs", "fp16", "evidence", "obtained"), "guessed"),
        (("graphs", "fp16", "evidence", "change", "lost"), None),
        (("graphs", "fp16", "calibration", "candidates"), 3),
        (("graphs", "fp16", "plan", "chosen"), None),
        (("graphs", "fp16", "calibration", "equalized"), "perhaps"),
        (("graphs", "fp16", "kept_fp32"), {"conv": "large"}),
        (("graphs", "fp16", "fp32_scales"), {"fc": "small"}),
        (("data", "evaluation", "seen"), "some"),
        (("gate", "verdicts", "a", "decision"), "maybe"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_field_of_another_type_is_a_damaged_manifest(path: tuple, value: object, tmp_path: Path) -> None:
    write(tmp_path / "bundle", manifest())
    source = tmp_path / "bundle/manifest.json"
    data = place = json.loads(source.read_bytes())
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    source.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"damaged manifest.*" + str([key for key in path if type(key) is str][-1])):
        Bundle.open(tmp_path / "bundle")


# --- bundles from before these fields


def test_what_a_bundle_says_not_of_equalisation_scales_and_images_seen_has_defaults(tmp_path: Path) -> None:
    """Written with calibrators compared, and before these fields."""
    write(tmp_path / "bundle", manifest())
    source = tmp_path / "bundle/manifest.json"
    data = json.loads(source.read_bytes())
    record = data["graphs"]["mixed-rtx"]
    for holder, fields in (
        (record, ("fp32_scales",)),
        (record["calibration"], ("equalized", "equalization_difference")),
        (record["calibration"]["candidates"][0], ("equalized",)),
        (data["data"]["evaluation"], ("seen",)),
    ):
        for name in fields:
            del holder[name]
    source.write_text(json.dumps(data))
    found = Bundle.open(tmp_path / "bundle").manifest
    graph = found.graphs["mixed-rtx"]
    assert graph.fp32_scales == {}
    assert graph.calibration is not None
    assert (graph.calibration.equalized, graph.calibration.equalization_difference) == (False, None)
    (score,) = graph.calibration.candidates
    assert (score.method, score.equalized, score.divergence) == ("mse", False, 1.25e-4)
    assert found.data["evaluation"].seen == 0


@pytest.fixture
def old(tmp_path: Path) -> Manifest:
    shutil.copy(OLD, tmp_path / "manifest.json")
    return Bundle.open(tmp_path).manifest


def test_the_old_manifest_is_old() -> None:
    data = json.loads(OLD.read_bytes())
    assert data["format_version"] == 1
    assert "gate" not in data
    assert "selection" not in data["data"]
    for graph in data["graphs"].values():
        assert set(graph) == {"file", "precision", "made_for", "op_counts", "evidence"}
        assert {"change", "classes", "flips"}.isdisjoint(graph["evidence"])


def test_an_old_manifest_opens_with_defaults(old: Manifest) -> None:
    assert old.gate is None
    assert {data.seen for data in old.data.values()} == {0}
    assert list(old.data) == ["calibration", "evaluation"]
    for graph in old.graphs.values():
        assert (graph.layers, graph.calibration, graph.plan) == ((), None, None)
        assert (graph.kept_fp32, graph.fp32_scales) == ({}, {})
        assert (graph.evidence.change, graph.evidence.classes, graph.evidence.flips) == (None, (), ())


def test_an_old_manifest_keeps_what_it_says(old: Manifest) -> None:
    assert list(old.graphs) == ["fp32", "int8"]
    proof = old.graphs["int8"].evidence
    assert (proof.against, proof.obtained, proof.images) == ("fp32", "measured", 2000)
    assert proof.agreement == build_proportion(1995, 2000)
    assert (proof.accuracy.count, proof.accuracy.n, proof.max_abs_difference) == (1970, 2000, 0.5354601144790649)
    assert old.labels == tuple("012345")
    assert len(old.files) == 6


def test_graphs_do_not_share_their_defaults(old: Manifest) -> None:
    old.graphs["fp32"].kept_fp32["conv"] = 1.0
    assert old.graphs["int8"].kept_fp32 == {}
