from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from vggedge_export import reproof
from vggedge_export.float16 import float16_graph
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.reproof import (
    Limit,
    Reproof,
    ReproofConfig,
    check_files,
    check_gate,
    choose_graphs,
    choose_limit,
    reprove,
)
from vggedge_export.verification import LabelledImages
from vggedge_runtime.backends import base
from vggedge_runtime.backends.ort import OrtBackend, open_ort_session
from vggedge_runtime.bundle import Bundle, DataRecord, Manifest, write_manifest
from vggedge_runtime.errors import BundleError, GateError, SessionError, UsageError
from vggedge_runtime.evidence import GateRecord, LayerRecord
from vggedge_runtime.session import Session
from vggedge_runtime.statistics import build_proportion

EYE = np.eye(3) * 0.05
NO_GREEN = np.diag([1.0, 0.5, 1.0]) * 0.05
"""Answers green only where it is twice as bright as the others."""


def brightest(weights: np.ndarray) -> Graph:
    """The tiny bundle's network: mean over the image, times ``weights`` (3, 3), softmax."""
    nodes = [
        make_node("Cast", ["images"], "pixels", to=1),
        make_node("ReduceMean", ["pixels", "axes"], "means", keepdims=0),
        make_node("MatMul", ["means", "weights"], "scores"),
        make_node("Softmax", ["scores"], "probabilities", axis=-1),
    ]
    constants = {"axes": np.array([1, 2]), "weights": weights.astype(np.float32)}
    inputs = [value_info("images", np.uint8, ["N", 4, 6, 3])]
    return Graph(nodes, constants, inputs, [value_info("probabilities", np.float32, ["N", 3])])


@pytest.fixture
def make_bundle(tiny: Any, tmp_path: Path) -> Callable[..., Bundle]:
    """``make_bundle({"int8": graph}, emulated=("fp16",))``: a bundle of fp32 and these, each with golden answers."""

    def make(
        graphs: dict[str, Graph] | None = None,
        emulated: tuple[str, ...] = (),
        right: int = 3,
        change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    ) -> Bundle:
        graphs = graphs or {}
        bundle = tiny(tmp_path / "bundle", ("fp32", *graphs))
        folder, records = bundle.path, dict(bundle.manifest.graphs)
        golden = np.load(folder / "golden/inputs.npy")
        for name, graph in graphs.items():
            graph.write(folder / f"graphs/model.{name}.onnx")
            np.save(
                folder / f"golden/outputs.{name}.npy",
                open_ort_session(graph.to_bytes()).run(None, {"images": golden})[0],
            )
        for name, record in records.items():
            evidence = msgspec.structs.replace(
                record.evidence,
                obtained="emulated" if name in emulated else "measured",
                accuracy=build_proportion(right, 4),
                images=4,
            )
            records[name] = msgspec.structs.replace(record, evidence=evidence)
        (folder / "manifest.json").unlink()
        write_manifest(folder, change(msgspec.structs.replace(bundle.manifest, graphs=records)))
        return Bundle.open(folder)

    return make


def colours(*means: tuple[int, int, int], targets: tuple[int, ...]) -> LabelledImages:
    """Images of one colour each."""
    pixels = np.array(means, np.uint8)[:, None, None, :].repeat(4, axis=1).repeat(6, axis=2)
    return LabelledImages("colours", pixels, np.array(targets))


# fp32 gets the first three right, and calls the fourth green.
FOUR = colours((200, 0, 0), (150, 190, 0), (0, 0, 200), (0, 90, 60), targets=(0, 1, 2, 2))


def prove(bundle: Bundle, data: LabelledImages = FOUR, **options: Any) -> Reproof:
    return reprove(bundle, data, ReproofConfig(**options))


def with_data(use: str, data: LabelledImages) -> Callable[[Manifest], Manifest]:
    digest = hashlib.sha256(data.images.tobytes()).hexdigest()
    record = DataRecord(name="those", images=len(data.images), sha256=digest)
    return lambda manifest: msgspec.structs.replace(manifest, data={use: record})


def with_gate(max_drop: float, accept: bool = False) -> Callable[[Manifest], Manifest]:
    gate = GateRecord(max_drop=max_drop, accept_undecided=accept, verdicts={})
    return lambda manifest: msgspec.structs.replace(manifest, gate=gate)


def test_a_graph_is_compared_with_fp32_image_by_image(make_bundle: Any) -> None:
    data = LabelledImages("colours", FOUR.images, FOUR.targets)
    places = {1: "folder/green.png", 3: "folder/blue.png"}
    result = reprove(make_bundle({"int8": brightest(NO_GREEN)}), data, ReproofConfig(), place=places.__getitem__)
    fp32, int8 = result.graphs
    assert (fp32.name, fp32.backend, fp32.obtained, fp32.comparison) == ("fp32", "ort", "measured", None)
    assert (fp32.accuracy, fp32.flips) == (build_proportion(3, 4), ())
    assert (int8.name, int8.backend, int8.obtained, int8.not_proved) == ("int8", "ort", "measured", None)
    assert int8.accuracy == build_proportion(3, 4)
    assert int8.comparison.against == "fp32"
    assert int8.comparison.agreement == build_proportion(2, 4)
    assert (int8.comparison.change.lost, int8.comparison.change.gained) == (1, 1)
    green = int8.comparison.classes[1]
    assert (green.label, green.images, green.reference_right, green.candidate_right) == ("green", 1, 1, 0)
    # fp32 is surer of 190 over 150 than of 90 over 60
    lost, gained = int8.flips
    assert (lost.image, lost.true, lost.reference, lost.candidate) == ("folder/green.png", "green", "green", "red")
    assert (gained.image, gained.true, gained.reference, gained.candidate) == (places[3], "blue", "green", "blue")
    assert lost.reference_margin == pytest.approx(np.tanh((190 - 150) * 0.05 / 2), abs=1e-3)
    assert {"machine", "cpu", "onnxruntime"} <= set(result.environment)


class TestFloat16:
    """Green is 1/24 brighter than red: FP32 sees it; FP16, whose step at 200 is 1/8, does not."""

    @pytest.fixture
    def nearly_red(self) -> LabelledImages:
        data = colours((200, 200, 0), (0, 0, 250), targets=(1, 2))
        data.images[0, 0, 0, 1] = 201
        return data

    @pytest.fixture
    def bundle(self, make_bundle: Any) -> Bundle:
        graphs = {"fp16": float16_graph(brightest(EYE)), "int8": brightest(EYE)}
        found: Bundle = make_bundle(graphs, emulated=("fp16",))
        return found

    def test_the_rounding_twin_answers_where_the_backend_computes_in_fp32(
        self, bundle: Bundle, nearly_red: LabelledImages
    ) -> None:
        with Session.open(bundle, precision="fp16") as session:  # proves nothing: no rounding at all
            assert session.predict(nearly_red.images).argmax(1).tolist() == [1, 2]
        fp16 = prove(bundle, nearly_red).graphs[1]
        assert (fp16.name, fp16.backend, fp16.obtained) == ("fp16", "ort", "emulated")
        assert fp16.accuracy == build_proportion(1, 2)
        assert [(flip.image, flip.reference, flip.candidate) for flip in fp16.flips] == [("0", "green", "red")]

    def test_without_onnx_it_is_listed_as_not_proved_and_the_others_are_proved(
        self, bundle: Bundle, nearly_red: LabelledImages, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        result = prove(bundle, nearly_red, max_drop=100)
        fp32, fp16, int8 = result.graphs
        assert [graph.name for graph in result.graphs] == ["fp32", "fp16", "int8"]
        assert fp16.not_proved.startswith(
            "backend ort computes its FP16 tensors in FP32, and cannot emulate them: onnx"
        )
        assert "pip install 'vggedge[export]'" in fp16.not_proved
        assert (fp16.backend, fp16.obtained, fp16.accuracy, fp16.comparison, fp16.verdict) == (None,) * 5
        assert fp32.accuracy == int8.accuracy == build_proportion(2, 2)
        assert int8.verdict.decision == "pass"
        with pytest.raises(GateError) as raised:
            check_gate(result)
        assert str(raised.value).endswith(
            "fp32: fp16 could not be proved here. To go on, install the extra that is named with each graph, leave a "
            "graph out (--precision), or allow more (--max-drop)."
        )

    def test_not_proved_is_no_error_where_nothing_is_judged(
        self, bundle: Bundle, nearly_red: LabelledImages, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        check_gate(prove(bundle, nearly_red))

    def test_a_backend_that_computes_fp16_is_measured(
        self, bundle: Bundle, nearly_red: LabelledImages, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class HalfBackend(OrtBackend):
            name = "half"
            computes_fp16_as_fp32 = False

        monkeypatch.setattr(reproof, "load_backend_class", lambda name: HalfBackend)
        fp16 = prove(bundle, nearly_red).graphs[1]
        assert fp16.obtained == "measured"
        assert fp16.accuracy == build_proportion(2, 2)  # what ONNX Runtime says of the graph itself

    def test_a_graph_that_export_measured_on_another_machine_is_emulated_here(
        self, bundle: Bundle, nearly_red: LabelledImages
    ) -> None:
        record = bundle.manifest.graphs["fp16"]
        layer = LayerRecord(name="predictions", op="MatMul", precision="fp16", macs=9)
        evidence = msgspec.structs.replace(record.evidence, obtained="measured")
        record = msgspec.structs.replace(record, evidence=evidence, layers=(layer,))
        graphs = bundle.manifest.graphs | {"fp16": record}
        bundle = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=graphs))
        fp16 = prove(bundle, nearly_red).graphs[1]
        assert (fp16.obtained, fp16.accuracy) == ("emulated", build_proportion(1, 2))

    def test_who_computes_fp16_as_fp32(self) -> None:
        assert not base.Backend.computes_fp16_as_fp32
        assert OrtBackend.computes_fp16_as_fp32


class TestManifest:
    def test_the_very_images_of_the_export(self, make_bundle: Any) -> None:
        graphs = {"int8": brightest(np.diag([1.0, 0.5, 0.0]) * 0.05)}
        result = prove(make_bundle(graphs, right=3, change=with_data("evaluation", FOUR)))
        assert result.used_for == "evaluation"
        assert [graph.accuracy.count for graph in result.graphs] == [3, 1]
        assert [graph.right_difference for graph in result.graphs] == [0, -2]
        assert [graph.intervals_overlap for graph in result.graphs] == [None, None]

    def test_other_images(self, make_bundle: Any) -> None:
        many = colours(*[(200, 0, 0)] * 40, targets=(1,) * 40)  # all wrong
        result = prove(make_bundle(right=4, change=with_data("evaluation", FOUR)), many)
        assert result.used_for is None
        assert (result.graphs[0].right_difference, result.graphs[0].intervals_overlap) == (None, False)
        assert prove(make_bundle(right=4)).graphs[0].intervals_overlap is True

    def test_images_that_set_the_ranges(self, make_bundle: Any) -> None:
        result = prove(make_bundle(change=with_data("calibration", FOUR)))
        assert (result.used_for, result.graphs[0].right_difference) == ("calibration", None)

    def test_images_that_proved_and_set_the_ranges(self, make_bundle: Any) -> None:
        def both(manifest: Manifest) -> Manifest:
            calibration, evaluation = with_data("calibration", FOUR)(manifest), with_data("evaluation", FOUR)(manifest)
            return msgspec.structs.replace(manifest, data=calibration.data | evaluation.data)

        result = prove(make_bundle(change=both))
        assert (result.used_for, result.graphs[0].right_difference) == ("evaluation", 0)


class TestLimit:
    @pytest.mark.parametrize(
        ("gate", "config", "wanted"),
        [
            (None, ReproofConfig(), None),
            (None, ReproofConfig(max_drop=2), Limit(max_drop=2, accept_undecided=False, source="user")),
            (
                with_gate(1),
                ReproofConfig(max_drop=2, accept_undecided=True),
                Limit(max_drop=2, accept_undecided=True, source="user"),
            ),
            (with_gate(1), ReproofConfig(), Limit(max_drop=1, accept_undecided=False, source="manifest")),
            (with_gate(1, True), ReproofConfig(), Limit(max_drop=1, accept_undecided=True, source="manifest")),
            # the user's own limit is judged as the user says, not as the export was
            (with_gate(1, True), ReproofConfig(max_drop=2), Limit(max_drop=2, accept_undecided=False, source="user")),
        ],
    )
    def test_whose_it_is(self, gate: Any, config: ReproofConfig, wanted: Limit | None, make_bundle: Any) -> None:
        bundle = make_bundle(**({"change": gate} if gate else {}))
        assert choose_limit(bundle, config) == wanted

    def test_nothing_to_accept(self, make_bundle: Any) -> None:
        with pytest.raises(UsageError, match="sets a limit to decide on"):
            choose_limit(make_bundle(), ReproofConfig(accept_undecided=True))

    @pytest.mark.parametrize("points", [-1, 0, 101, float("nan")])
    def test_points(self, points: float) -> None:
        with pytest.raises(UsageError, match="needed are above 0 to 100 points"):
            ReproofConfig(max_drop=points)

    @pytest.fixture
    def hundred(self) -> LabelledImages:
        """100 green images, of which 20 are dim enough for NO_GREEN to lose."""
        return colours(*[(0, 200, 0)] * 80, *[(150, 200, 0)] * 20, targets=(1,) * 100)

    @pytest.mark.parametrize(
        ("max_drop", "decision", "message"),
        [
            (5, "fail", "int8 loses more"),
            (20, "undecided", "int8 loses perhaps more, the images are too few to tell"),
            (40, "pass", None),
        ],
    )
    def test_verdicts(
        self, max_drop: float, decision: str, message: str | None, make_bundle: Any, hundred: LabelledImages
    ) -> None:
        result = prove(make_bundle({"int8": brightest(NO_GREEN)}), hundred, max_drop=max_drop)
        fp32, int8 = result.graphs
        assert (fp32.verdict, int8.verdict.decision, int8.verdict.drop) == (None, decision, 20)
        if message is None:
            check_gate(result)
        else:
            with pytest.raises(GateError, match=f"at most {max_drop} points against fp32: {message}"):
                check_gate(result)

    def test_undecided_may_be_accepted_and_a_failure_not(self, make_bundle: Any, hundred: LabelledImages) -> None:
        bundle = make_bundle({"int8": brightest(NO_GREEN)})
        check_gate(prove(bundle, hundred, max_drop=20, accept_undecided=True))
        with pytest.raises(GateError):
            check_gate(prove(bundle, hundred, max_drop=5, accept_undecided=True))

    @pytest.mark.parametrize(
        ("max_drop", "options", "cures"),
        [
            (5, {}, "leave a graph out (--precision), or allow more (--max-drop)"),
            # on 100 images int8-rtx, which loses nothing, is undecided at 2 points
            (2, {"accept_undecided": True}, "leave a graph out (--precision), or allow more (--max-drop)"),
            (
                20,
                {},
                "prove on more images (DATA, --images), let pass what cannot be decided (--accept-undecided), leave a "
                "graph out (--precision), or allow more (--max-drop)",
            ),
        ],
        ids=["fails", "fails, and undecided would be accepted", "undecided"],
    )
    def test_advice_is_what_helps(
        self, max_drop: float, options: dict, cures: str, make_bundle: Any, hundred: LabelledImages
    ) -> None:
        """More images do not help a graph that is shown to lose too much, nor does accepting what is undecided."""
        bundle = make_bundle({"int8": brightest(NO_GREEN), "int8-rtx": brightest(EYE)})
        with pytest.raises(GateError) as raised:
            check_gate(prove(bundle, hundred, max_drop=max_drop, **options))
        assert str(raised.value).endswith(f". To go on, {cures}.")


class TestChoice:
    @pytest.mark.parametrize(
        ("wanted", "found"),
        [
            (None, ("fp32", "fp16", "int8", "int8-rtx")),
            (("int8",), ("fp32", "int8", "int8-rtx")),
            (("int8-rtx", "fp16"), ("fp32", "fp16", "int8-rtx")),
            (("fp32",), ("fp32",)),
        ],
    )
    def test_graphs(self, wanted: Any, found: tuple[str, ...], tiny: Any, tmp_path: Path) -> None:
        assert choose_graphs(tiny(tmp_path / "b", ("fp16", "fp32", "int8", "int8-rtx")), wanted) == found

    def test_refusals(self, tiny: Any, tmp_path: Path) -> None:
        bundle = tiny(tmp_path / "b", ("fp32", "mixed"))
        with pytest.raises(UsageError, match=r"precision 'fp8' is unknown; known: fp32, fp16, int8, and .* mixed"):
            choose_graphs(bundle, ("mixed", "fp8"))
        with pytest.raises(BundleError, match="no fp16 graph in this bundle; it has: fp32, mixed"):
            choose_graphs(bundle, ("fp16",))
        with pytest.raises(UsageError, match="no precision is named"):
            ReproofConfig(precisions=())
        with pytest.raises(BundleError, match="no graph 'fp32' in this bundle"):
            choose_graphs(tiny(tmp_path / "c", ("int8",)), None)


def test_every_covered_file_is_checked(make_bundle: Any) -> None:
    bundle = make_bundle({"int8": brightest(EYE)})
    told: list[tuple[int, int, str]] = []
    check_files(bundle, lambda *news: told.append(news))
    count = len(bundle.manifest.files)
    assert (count, told[-1]) == (6, (6, 6, "checking files"))
    for name in bundle.manifest.files:
        path = bundle.path / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BundleError, match=f"{name}: its content is not what export wrote"):
            check_files(bundle)
        path.write_bytes(whole)


def test_wrong_golden_answers_stop_it(tiny: Any, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "b", golden=np.eye(3, dtype=np.float32))
    with pytest.raises(SessionError, match="answers the golden inputs wrongly"):
        prove(bundle)


def test_one_session_at_a_time_each_closed(make_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class CountingBackend(OrtBackend):
        now: ClassVar[int] = 0
        seen: ClassVar[list[int]] = []

        def _load(self, graph: Path, threads: int) -> None:
            super()._load(graph, threads)
            CountingBackend.now += 1
            CountingBackend.seen.append(CountingBackend.now)

        def _close(self) -> None:
            super()._close()
            CountingBackend.now -= 1

    monkeypatch.setattr("vggedge_runtime.session.load_backend_class", lambda name: CountingBackend)
    graphs = {"fp16": float16_graph(brightest(EYE)), "int8": brightest(EYE)}
    prove(make_bundle(graphs, emulated=("fp16",)))
    assert (CountingBackend.seen, CountingBackend.now) == ([1, 1, 1], 0)
