from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from PIL import Image

from vggedge_runtime import session as sessions
from vggedge_runtime.backends import base
from vggedge_runtime.backends.base import Backend, Probabilities
from vggedge_runtime.backends.ort import OrtBackend, open_ort_session
from vggedge_runtime.bundle import Bundle, GraphRecord, Manifest
from vggedge_runtime.errors import BundleError, DataError, MissingDependency, SessionError, UsageError
from vggedge_runtime.graphs import GRAPHS, golden_tolerance
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.session import Session, choose_graph, describe_difference

SHAPE = (4, 6, 3)


def golden_images() -> Pixels:
    """Those of the tiny bundle."""
    return np.random.default_rng(7).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


def softmax_of_means(images: Pixels) -> np.ndarray:
    """What the tiny bundle's network computes, once more and by hand."""
    powers = np.exp(images.astype(np.float64).mean(axis=(1, 2)) * 0.05)
    return powers / powers.sum(axis=1, keepdims=True)


def noise(count: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


class FakeBackend(Backend):
    """Answers as the tiny network does, without a library; keeps what happened to it."""

    name = "fake"
    module = "numpy"
    precisions = ("fp16", "fp32")
    made: ClassVar[list[FakeBackend]] = []

    def _load(self, graph: Path, threads: int) -> None:
        self.graph, self.threads, self.runs = graph, threads, 0
        FakeBackend.made.append(self)

    def _run(self, images: Pixels) -> Probabilities:
        self.runs += 1
        return softmax_of_means(images).astype(np.float32)

    def _close(self) -> None:
        self.graph = Path()


def reshaped(bundle: Bundle, *, input: str = "images", batch: int | str = "N") -> Path:
    """The bundle's fp32 graph with another name of its input, or for one size of batch only."""
    onnx = pytest.importorskip("onnx")
    path = bundle.path / "graphs/model.fp32.onnx"
    model = onnx.load(path)
    entry = model.graph.input[0]
    entry.name = model.graph.node[0].input[0] = input
    if isinstance(batch, int):
        entry.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, path)
    return path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeBackend]:
    """Makes FakeBackend the only one there is; gives those that were made."""
    monkeypatch.setattr(base, "BACKENDS", {"fake": f"{__name__}:FakeBackend"})
    monkeypatch.setattr(base, "load_backend_class", lambda name: FakeBackend)
    monkeypatch.setattr(sessions, "load_backend_class", lambda name: FakeBackend)
    monkeypatch.setattr(FakeBackend, "made", [])
    return FakeBackend.made


class TestPredict:
    @pytest.fixture
    def session(self, tiny_bundle: Path) -> Any:
        with Session.open(tiny_bundle, "ort") as session:
            yield session

    def test_what_is_open(self, session: Session) -> None:
        assert (session.backend, session.graph, session.why) == ("ort", "fp32", "asked for")
        assert session.labels == ("red", "green", "blue")
        assert session.image_spec.shape == SHAPE

    def test_one_image(self, session: Session) -> None:
        image = np.zeros(SHAPE, np.uint8)
        image[..., 1] = 100  # exp(5) against exp(0) twice
        got = session.predict(image)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, [[1 / 150.4131591, 148.4131591 / 150.4131591, 1 / 150.4131591]], atol=1e-6)

    def test_a_batch_is_answered_image_by_image(self, session: Session) -> None:
        images = noise(5)
        got = session.predict(images)
        assert got.shape == (5, 3)
        np.testing.assert_allclose(got, softmax_of_means(images), atol=1e-6)
        np.testing.assert_allclose(got[3:4], session.predict(images[3]), atol=1e-6)

    def test_views_in_any_memory_order(self, session: Session) -> None:
        images = noise(4)[::-2, :, ::-1]
        np.testing.assert_allclose(session.predict(images), softmax_of_means(images), atol=1e-6)

    def test_paths(self, session: Session, tmp_path: Path) -> None:
        paths = []
        for channel, name in enumerate(("r", "g", "b")):
            image = np.zeros((40, 60, 3), np.uint8)
            image[..., channel] = 255
            paths.append(tmp_path / f"{name}.png")
            Image.fromarray(image).save(paths[-1])
        np.testing.assert_array_equal(session.predict(paths).argmax(1), [0, 1, 2])
        np.testing.assert_array_equal(session.predict(tuple(map(str, paths[::-1]))).argmax(1), [2, 1, 0])
        np.testing.assert_array_equal(session.predict(iter(paths[:2])).argmax(1), [0, 1])
        assert session.predict(paths[2]).shape == (1, 3)
        assert session.predict(str(paths[2])).argmax() == 2

    def test_answers_are_copies(self, session: Session) -> None:
        images = noise(2)
        first = session.predict(images[:1])
        kept = first.copy()
        second = session.predict(images[1:])
        assert not np.shares_memory(first, second)
        assert (second != kept).any()
        np.testing.assert_array_equal(first, kept)
        first[:] = 0
        np.testing.assert_array_equal(session.predict(images[:1]), kept)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.zeros(SHAPE, np.float32), "dtype is float32; the graph takes uint8"),
            (np.zeros(SHAPE, np.int64), "dtype is int64"),
            (np.zeros((6, 4, 3), np.uint8), r"shape is \(6, 4, 3\); needed is \(4, 6, 3\)"),
            (np.zeros((4, 6), np.uint8), r"shape is \(4, 6\)"),
            (np.zeros((0, *SHAPE), np.uint8), "n at least 1"),
            ([], "got list"),
            ([np.zeros(SHAPE, np.uint8)], "got list"),
            (["a.png", 3], "got list"),
            (b"a.png", "got bytes"),
            (None, "got NoneType"),
            ("nowhere.png", "no such file"),
        ],
    )
    def test_what_it_does_not_take(self, images: Any, message: str, session: Session) -> None:
        with pytest.raises(DataError, match=message):
            session.predict(images)
        assert session.predict(noise(1)).shape == (1, 3)  # and goes on

    def test_many_threads(self, session: Session) -> None:
        images = noise(64)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda index: session.predict(images[index]), range(64)))
        np.testing.assert_allclose(np.concatenate(answers), softmax_of_means(images), atol=1e-6)


class TestThreads:
    def test_one_call_at_a_time_reaches_the_backend(
        self, tiny_bundle: Path, fake: list[FakeBackend], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inside = threading.Semaphore(1)
        gate = threading.Event()

        def run(self: FakeBackend, images: Pixels) -> Probabilities:
            if not inside.acquire(blocking=False):
                raise AssertionError("two threads in the backend")
            gate.wait(0.005)
            inside.release()
            return softmax_of_means(images).astype(np.float32)

        monkeypatch.setattr(FakeBackend, "_run", run)
        with Session.open(tiny_bundle, "fake") as session, ThreadPoolExecutor(6) as pool:
            assert len(list(pool.map(session.predict, noise(24)))) == 24


class TestClose:
    def test_closed_is_closed(self, tiny_bundle: Path) -> None:
        with Session.open(tiny_bundle) as session:
            session.predict(noise(1))
        with pytest.raises(SessionError, match="backend ort is closed; open a new session"):
            session.predict(noise(1))
        session.close()

    def test_an_error_inside_closes_too(self, tiny_bundle: Path) -> None:
        with pytest.raises(ZeroDivisionError), Session.open(tiny_bundle) as session:
            _ = 1 / 0
        with pytest.raises(SessionError, match="closed"):
            session.predict(noise(1))


class TestGoldenCheck:
    def test_a_session_that_answers_wrongly_does_not_start(
        self, tmp_path: Path, tiny: Callable[..., Bundle], fake: list[FakeBackend], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = tiny(tmp_path / "b")
        with Session.open(bundle):
            pass
        monkeypatch.setattr(FakeBackend, "_run", lambda self, images: softmax_of_means(images)[:, ::-1])
        with pytest.raises(
            SessionError, match=r"fp32 on backend fake answers the golden inputs wrongly: a probability"
        ):
            Session.open(bundle)
        assert fake[-1]._closed

    def test_swapped_colours(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        bundle = tiny(tmp_path / "b", weights=np.eye(3)[::-1] * 0.05)
        with pytest.raises(SessionError, match=r"is off by .*allowed is 0\.001"):
            Session.open(bundle)

    def test_nan(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        with pytest.raises(SessionError, match="NaN or infinity"):
            Session.open(tiny(tmp_path / "b", weights=np.full((3, 3), np.nan)))

    def test_wrong_number_of_classes(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        with pytest.raises(SessionError, match=r"shape \(3, 4\), needed is \(3, 3\)"):
            Session.open(tiny(tmp_path / "b", weights=np.ones((3, 4))))

    def test_golden_answers_that_are_no_numbers(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        with pytest.raises(SessionError, match="golden answer holds NaN"):
            Session.open(tiny(tmp_path / "b", golden=np.full((3, 3), np.nan, np.float32)))

    def test_labels_that_do_not_fit_the_answers(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        with pytest.raises(BundleError, match=r"2 labels.*3 classes"):
            Session.open(tiny(tmp_path / "b", labels=("red", "green")))

    def test_a_graph_without_golden_answer(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        def forget(manifest: Manifest) -> Manifest:
            return msgspec.structs.replace(manifest, golden=msgspec.structs.replace(manifest.golden, outputs={}))

        with pytest.raises(BundleError, match="no golden answer for graph 'fp32'"):
            Session.open(tiny(tmp_path / "b", change=forget))

    def test_a_graph_of_a_later_version(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        bundle = tiny(tmp_path / "b", ("fp32", "fp4"))
        with pytest.raises(BundleError, match=r"graph 'fp4' is unknown to this vggedge.*fp32"):
            Session.open(bundle, precision="fp4")

    @pytest.mark.parametrize("file", ["golden/inputs.npy", "golden/outputs.fp32.npy"])
    def test_tampered_golden_files_are_not_read(self, file: str, tiny_bundle: Path) -> None:
        path = tiny_bundle / file
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        with pytest.raises(BundleError, match=r"npy: its content is not what export wrote"):
            Session.open(tiny_bundle)

    def test_a_tampered_graph_is_not_loaded(self, tiny_bundle: Path, fake: list[FakeBackend]) -> None:
        path = tiny_bundle / "graphs/model.fp32.onnx"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        with pytest.raises(BundleError, match=r"onnx: its content is not what export wrote"):
            Session.open(tiny_bundle)
        assert fake == []

    def test_it_runs_once(self, tiny_bundle: Path, fake: list[FakeBackend]) -> None:
        with Session.open(tiny_bundle, threads=3) as session:
            assert session.threads == 3
            assert [(backend.runs, backend.threads) for backend in fake] == [(1, 3)]


def small_cnn(graph: str) -> bytes:
    """Convolution, relu, dense layer, softmax for 4x6 images; int8 as export writes it, with Q/DQ pairs."""
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(5)
    kernel = rng.normal(0.02, 0.1, (8, 3, 3, 3)).astype(np.float32)
    dense = rng.normal((0.1, -0.1, 0), 0.5, (192, 3)).astype(np.float32)
    constants = {"dense": dense, "step": np.float32(1 / 128), "one": np.float32(1)}
    if graph == "int8":
        wide = np.float32(np.abs(kernel).max() / 127)
        constants |= {"kernel8": np.rint(kernel / wide).astype(np.int8), "wide": wide, "zero": np.int8(0)}
        constants["reach"] = np.float32(2 / 127)
        inner = """even8 = QuantizeLinear(even, step, zero)  even_ = DequantizeLinear(even8, step, zero)
            kernel = DequantizeLinear(kernel8, wide, zero)
            a = Conv<pads = [1, 1, 1, 1]>(even_, kernel)  b = Relu(a)
            b8 = QuantizeLinear(b, reach, zero)  c = DequantizeLinear(b8, reach, zero)"""
    else:
        constants["kernel"] = kernel
        inner = "a = Conv<pads = [1, 1, 1, 1]>(even, kernel)  c = Relu(a)"
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        small (uint8[N, 4, 6, 3] images) => (float[N, 3] probabilities) {{
            pixels = Cast<to = 1>(images)  scaled = Mul(pixels, step)  moved = Sub(scaled, one)
            even = Transpose<perm = [0, 3, 1, 2]>(moved)
            {inner}
            d = Flatten(c)  e = MatMul(d, dense)  probabilities = Softmax(e)
        }}"""
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


class TestSmallFaults:
    """Faults of a backend that change every answer a little; the golden check has to see them."""

    @pytest.mark.parametrize(
        ("graph", "fault"),
        [
            ("fp32", lambda images: np.roll(images, 1, axis=1)),
            ("fp32", lambda images: np.roll(images, 1, axis=2)),
            ("int8", lambda images: np.roll(images, 1, axis=1)),
            ("int8", lambda images: np.roll(images, 1, axis=2)),
            # Not int8: one step of brightness is one step of its first activation, no more than rounding.
            ("fp32", lambda images: np.where(images < 255, images + 1, 255).astype(np.uint8)),
        ],
        ids=["fp32-a row lower", "fp32-a column on", "int8-a row lower", "int8-a column on", "fp32-a step brighter"],
    )
    def test_is_refused(
        self,
        graph: str,
        fault: Callable[[Pixels], Pixels],
        tmp_path: Path,
        tiny: Callable[..., Bundle],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        model = small_cnn(graph)
        wanted = open_ort_session(model).run(None, {"images": golden_images()})[0]
        bundle = tiny(tmp_path / "b", (graph,), model=model, golden=wanted)
        Session.open(bundle, "ort", graph).close()
        run = OrtBackend._run
        monkeypatch.setattr(OrtBackend, "_run", lambda self, images: run(self, fault(images)))
        with pytest.raises(SessionError, match="answers the golden inputs wrongly: a probability is off by"):
            Session.open(bundle, "ort", graph)


class TestGoldenTolerance:
    @pytest.mark.parametrize("graph", GRAPHS)
    def test_onnx_runtime_gets_no_more_than_a_device(self, graph: str) -> None:
        assert 0 < golden_tolerance(graph, "ort") <= GRAPHS[graph].golden_tolerance
        for backend in ("tensorrt", "tensorrt_rtx", "a later one"):
            assert golden_tolerance(graph, backend) == GRAPHS[graph].golden_tolerance

    def test_int8_on_onnx_runtime(self) -> None:
        """Above one value's other rounding (3.2e-2 seen), below what a shifted image makes."""
        assert golden_tolerance("int8", "ort") == 5e-2


class TestOpen:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"backend": "tpu"}, UsageError, "backend 'tpu' is unknown; known: auto, ort, openvino"),
            ({"precision": "fp8"}, UsageError, "precision 'fp8' is unknown; known: auto, fp32, fp16, int8.* fp32"),
            ({"precision": "int8"}, BundleError, "no int8 graph in this bundle; it has: fp32.*--precision int8"),
            ({"threads": -1}, UsageError, "threads is -1"),
        ],
    )
    def test_wrong_requests(
        self, options: dict[str, Any], error: type[Exception], message: str, tiny_bundle: Path
    ) -> None:
        with pytest.raises(error, match=message):
            Session.open(tiny_bundle, **options)

    def test_auto_says_what_it_took(self, tiny_bundle: Path) -> None:
        with Session.open(tiny_bundle) as session:
            assert session.backend == "ort"
            assert session.why == "auto: the first installed of ort, openvino"

    def test_auto_without_any_library_names_the_extra(self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(base, "is_installed", lambda module: False)
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(MissingDependency, match=r"vggedge\[ort\]"):
            Session.open(tiny_bundle)

    def test_a_graph_that_is_no_onnx(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        def spoil(manifest: Manifest) -> Manifest:
            graph = msgspec.structs.replace(manifest.graphs["fp32"], file="labels.txt")
            return msgspec.structs.replace(manifest, graphs={"fp32": graph})

        with pytest.raises(SessionError, match=r"labels\.txt: ONNX Runtime cannot load it"):
            Session.open(tiny(tmp_path / "b", change=spoil))

    def test_a_graph_without_the_input(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        bundle = tiny(tmp_path / "b")
        graph = reshaped(bundle, input="pixels_of_another")
        with pytest.raises(SessionError, match=r"input pixels_of_another, needed is images.*Export"):
            OrtBackend(graph)

    def test_a_graph_that_fails_when_it_runs(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        backend = OrtBackend(reshaped(tiny(tmp_path / "b"), batch=2))
        assert backend.run(noise(2)).shape == (2, 3)
        with pytest.raises(SessionError, match=r"(?s)ONNX Runtime fails on images of shape \(3, 4, 6, 3\) \(.*Got: 3"):
            backend.run(noise(3))


class TestChooseGraph:
    @pytest.mark.parametrize(
        ("has", "precision", "graph"),
        [
            (("fp32", "fp16", "int8"), "auto", "fp16"),  # FakeBackend's first
            (("fp32", "int8"), "auto", "fp32"),
            (("int8-rtx",), "auto", "int8-rtx"),  # nothing that it likes: what there is
            (("fp32", "int8-rtx", "int8"), "int8", "int8"),
            (("fp32", "int8-rtx"), "int8", "int8-rtx"),
            (("fp32", "int8", "int8-rtx"), "int8-rtx", "int8-rtx"),
            (("fp32", "fp16"), "fp32", "fp32"),
        ],
    )
    def test_choice(self, has: tuple[str, ...], precision: str, graph: str, tiny_bundle: Path) -> None:
        manifest = Bundle.open(tiny_bundle).manifest
        records: dict[str, GraphRecord] = dict.fromkeys(has, manifest.graphs["fp32"])
        bundle = Bundle(tiny_bundle, msgspec.structs.replace(manifest, graphs=records))
        assert choose_graph(bundle, FakeBackend, precision) == graph

    def test_onnxruntime_gets_fp32(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        bundle = tiny(tmp_path / "b", ("fp32", "fp16", "int8"))
        with Session.open(bundle) as automatic, Session.open(bundle, precision="int8") as asked:
            assert (automatic.graph, asked.graph) == ("fp32", "int8")


class TestDescribeDifference:
    WANTED = np.array([[0.7, 0.2, 0.1], [0.40, 0.35, 0.25]], np.float32)

    def found(self, row: int, *values: float) -> np.ndarray:
        found = self.WANTED.copy()
        found[row] = values
        return found

    def test_the_same(self) -> None:
        assert describe_difference(self.WANTED, self.WANTED.copy(), 0.0) is None

    def test_a_difference_within_the_tolerance(self) -> None:
        assert describe_difference(self.WANTED, self.found(0, 0.65, 0.25, 0.1), 0.06) is None

    def test_a_difference_above_it(self) -> None:
        problem = describe_difference(self.WANTED, self.found(0, 0.65, 0.25, 0.1), 0.04)
        assert problem == "a probability is off by 0.05, allowed is 0.04"

    def test_another_class_on_a_clear_image(self) -> None:
        wanted = np.array([[0.53, 0.47]], np.float32)
        found = np.array([[0.49, 0.51]], np.float32)
        assert describe_difference(wanted, found, 0.05) == "a top-1 class differs"  # the margin is 0.06
        assert describe_difference(wanted, found, 0.07) is None

    def test_another_class_where_the_margin_is_within_the_tolerance(self) -> None:
        assert describe_difference(self.WANTED, self.found(1, 0.36, 0.39, 0.25), 0.06) is None

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_no_number(self, value: float) -> None:
        problem = describe_difference(self.WANTED, self.found(1, value, 0.5, 0.5), 1.0)
        assert problem == "the output holds NaN or infinity"

    def test_no_number_wanted(self) -> None:
        problem = describe_difference(self.found(0, np.nan, 0.5, 0.5), self.WANTED, 1.0)
        assert problem == "the golden answer holds NaN or infinity"

    @pytest.mark.parametrize("found", [WANTED[:1], WANTED[:, :2], WANTED[0], WANTED.T])
    def test_shape_does_not_broadcast(self, found: np.ndarray) -> None:
        problem = describe_difference(self.WANTED, found, 1.0)
        assert problem == f"the output has shape {found.shape}, needed is (2, 3)"
