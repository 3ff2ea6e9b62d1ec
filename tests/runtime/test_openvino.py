"""The OpenVINO backend: right answers, INT8 as in ONNX Runtime, wrong answers refused, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_runtime.backends import base, ov
from vggedge_runtime.backends.ort import open_ort_session
from vggedge_runtime.backends.ov import OpenVinoBackend, has_exact_int8
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.errors import MissingDependency, SessionError
from vggedge_runtime.graphs import GRAPHS, golden_tolerance
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.session import Session

openvino = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

SHAPE = (4, 6, 3)
needs_vnni = pytest.mark.skipif(ov._EXACT_INT8 is False, reason="this CPU has no VNNI")
GRAPHS_TRIED = [pytest.param(name, marks=needs_vnni if name.startswith("int8") else ()) for name in ("fp32", "int8")]


def softmax_of_means(images: Pixels) -> np.ndarray:
    """What the tiny bundle's network computes, once more and by hand."""
    powers = np.exp(images.astype(np.float64).mean(axis=(1, 2)) * 0.05)
    return powers / powers.sum(axis=1, keepdims=True)


def noise(count: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def golden_images() -> Pixels:
    """Those of the tiny bundle."""
    return np.random.default_rng(7).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


def small_cnn(graph: str, seed: int = 5, *, batch: str = "N") -> bytes:
    """Two convolutions with relus, dense layer and softmax for 4x6 images; int8 as export writes it.

    The relus' steps reach 1 and 3: a part of the activations lies above.
    """
    rng = np.random.default_rng(seed)
    weights = {"k": rng.normal(0.02, 0.2, (8, 3, 3, 3)), "l": rng.normal(0.02, 0.15, (8, 8, 3, 3))}
    constants: dict[str, Any] = {"dense": rng.normal(0, 0.2, (192, 3)).astype(np.float32)}
    constants |= {"step": np.float32(1 / 128), "one": np.float32(1), "zero": np.int8(0)}
    constants |= {"k_reach": np.float32(1 / 128), "l_reach": np.float32(1 / 127), "d_reach": np.float32(3 / 127)}
    cast = 10 if graph == "fp16" else 1
    if graph == "fp16":
        constants = {name: np.asarray(value, np.float16) for name, value in constants.items() if name != "zero"}

    def pair(data: str, name: str) -> str:
        if graph != "int8":
            return f"{name}_in = Identity({data})"
        return (
            f"{name}_8 = QuantizeLinear({data}, {name}_reach, zero) "
            f"{name}_in = DequantizeLinear({name}_8, {name}_reach, zero)"
        )

    for name, kernel in weights.items():
        scale = np.float32(np.abs(kernel).max() / 127)
        if graph == "int8":
            constants |= {f"{name}_8w": np.rint(kernel / scale).astype(np.int8), f"{name}_s": scale}
        else:
            constants[f"{name}_w"] = kernel.astype(np.float16 if graph == "fp16" else np.float32)
    kernels = [f"{name}_w = DequantizeLinear({name}_8w, {name}_s, zero)" for name in weights] * (graph == "int8")
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        small (uint8[{batch}, 4, 6, 3] images) => (float[{batch}, 3] probabilities) {{
            pixels = Cast<to = {cast}>(images)  scaled = Mul(pixels, step)  moved = Sub(scaled, one)
            even = Transpose<perm = [0, 3, 1, 2]>(moved)
            {" ".join(kernels)}
            {pair("even", "k")}  a = Conv<pads = [1, 1, 1, 1]>(k_in, k_w)  b = Relu(a)
            {pair("b", "l")}  c = Conv<pads = [1, 1, 1, 1]>(l_in, l_w)  d = Relu(c)
            {pair("d", "d")}  e = Flatten(d_in)  f = MatMul(e, dense)
            g = Cast<to = 1>(f)  probabilities = Softmax(g)
        }}"""
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def write_small(folder: Path, graph: str, **options: Any) -> Path:
    path = folder / f"small.{graph}.onnx"
    path.write_bytes(small_cnn(graph, **options))
    return path


class TestAnswers:
    @pytest.fixture
    def session(self, tiny_bundle: Path) -> Any:
        with Session.open(tiny_bundle, "openvino", threads=1) as session:
            yield session

    def test_what_is_open(self, session: Session) -> None:
        assert (session.backend, session.graph, session.why) == ("openvino", "fp32", "asked for")

    # One, as many as run one by one, and more, in the order in which a second model is made.
    @pytest.mark.parametrize("counts", [(1, 4, 5, 1), (33, 2, 6)])
    def test_batches_of_any_size(self, counts: tuple[int, ...], session: Session) -> None:
        for count in counts:
            images = noise(count, seed=count)
            got = session.predict(images)
            assert (got.dtype, got.shape) == (np.float32, (count, 3))
            np.testing.assert_allclose(got, softmax_of_means(images), atol=1e-6)

    @pytest.mark.parametrize("count", [4, 12])
    def test_views_in_any_memory_order(self, count: int, session: Session) -> None:
        images = noise(2 * count)[::-2, :, ::-1]
        np.testing.assert_allclose(session.predict(images), softmax_of_means(images), atol=1e-6)

    @pytest.mark.parametrize("count", [1, 6])
    def test_answers_are_copies(self, count: int, session: Session) -> None:
        images = noise(2 * count)
        first = session.predict(images[:count])
        kept = first.copy()
        second = session.predict(images[count:])
        assert not np.shares_memory(first, second)
        assert (second != kept).any()
        np.testing.assert_array_equal(first, kept)
        first[:] = 0
        np.testing.assert_array_equal(session.predict(images[:count]), kept)

    def test_many_threads(self, session: Session) -> None:
        images = noise(64)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda index: session.predict(images[index]), range(64)))
        np.testing.assert_allclose(np.concatenate(answers), softmax_of_means(images), atol=1e-6)

    @needs_vnni
    @pytest.mark.parametrize("seed", range(5))
    def test_int8_answers_are_those_of_onnxruntime(self, seed: int, tmp_path: Path) -> None:
        path = write_small(tmp_path, "int8", seed=seed)
        images = noise(48, seed)
        wanted = open_ort_session(path).run(None, {"images": images})[0]
        backend = OpenVinoBackend(path)
        for found in (backend.run(images), np.concatenate([backend.run(images[i : i + 1]) for i in range(48)])):
            # A step rounded the other way changes one answer, and no more than a little.
            assert np.median(np.abs(found - wanted)) < 1e-6
            assert np.abs(found - wanted).max() < golden_tolerance("int8", "openvino")

    @needs_vnni
    def test_int8_runs_in_int8_and_counts_from_zero_behind_relus(self, tmp_path: Path) -> None:
        backend = OpenVinoBackend(write_small(tmp_path, "int8"))
        ran = [node.get_rt_info() for node in backend._small.get_compiled_model().get_runtime_model().get_ops()]
        convolutions = [str(i["runtimePrecision"].value) for i in ran if i["layerType"].value == "Convolution"]
        # The image has steps on both sides of 0: OpenVINO takes them as uint8 with a zero point.
        assert convolutions == ["u8", "u8"]
        quantizers = [node for node in backend._model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
        lows = [float(node.input_value(1).get_node().get_data().item()) for node in quantizers]
        assert lows == [-1, 0, 0]

    @pytest.mark.parametrize("graph", ["fp32", "fp16"])
    def test_floats_are_fp32(self, graph: str, tmp_path: Path) -> None:
        """Stated, as the plugin would take bfloat16 where the CPU has it; and FP16 is never computed."""
        backend = OpenVinoBackend(write_small(tmp_path, graph))
        compiled = backend._small.get_compiled_model()
        ran = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
        precisions = {
            str(info["runtimePrecision"].value)
            for info in ran
            if info["layerType"].value in {"Convolution", "FullyConnected", "MatMul", "Softmax"}
        }
        assert precisions == {"f32"}
        assert OpenVinoBackend.computes_fp16_as_fp32

    @pytest.mark.parametrize(("threads", "wanted"), [(1, 1), (2, 2)])
    def test_threads(self, threads: int, wanted: int, tmp_path: Path) -> None:
        backend = OpenVinoBackend(write_small(tmp_path, "fp32"), threads=threads)
        assert backend._small.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == wanted


FAULTS: dict[str, Callable[[Pixels], Pixels]] = {
    "a row lower": lambda images: np.roll(images, 1, axis=1),
    "a column on": lambda images: np.roll(images, 1, axis=2),
    "colours swapped": lambda images: images[..., ::-1],
    "upside down": lambda images: images[:, ::-1],
}


class TestGoldenCheck:
    @pytest.mark.parametrize("seed", [1, 5, 9])
    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.parametrize("graph", GRAPHS_TRIED)
    def test_a_wrong_reading_is_refused(
        self,
        graph: str,
        fault: str,
        seed: int,
        tmp_path: Path,
        tiny: Callable[..., Bundle],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        model = small_cnn(graph, seed)
        wanted = open_ort_session(model).run(None, {"images": golden_images()})[0]
        bundle = tiny(tmp_path / "b", (graph,), model=model, golden=wanted)
        Session.open(bundle, "openvino", graph).close()
        run, change = OpenVinoBackend._run, FAULTS[fault]
        monkeypatch.setattr(OpenVinoBackend, "_run", lambda self, images: run(self, change(images)))
        with pytest.raises(SessionError, match="openvino answers the golden inputs wrongly: a probability is off by"):
            Session.open(bundle, "openvino", graph)

    def test_tolerance(self) -> None:
        """Above what rounding gave on golden images (1.3e-3), below what overflowing sums gave (6e-2)."""
        assert golden_tolerance("int8", "openvino") == 5e-2
        for graph in ("fp32", "fp16", "int8-rtx", "mixed"):
            assert golden_tolerance(graph, "openvino") == GRAPHS[graph].golden_tolerance


class TestChoice:
    @pytest.mark.parametrize(
        ("machine", "flags", "exact"),
        [
            ("x86_64", "fpu avx2 avx512f avx512_vnni", True),
            ("AMD64", "fpu avx2 avx_vnni", True),
            ("x86_64", "fpu avx2 avx512f avx512bw avx512_bf16", False),
            ("aarch64", "fp asimd asimddp", None),
        ],
    )
    def test_cpus_whose_int8_sums_are_exact(self, machine: str, flags: str, exact: bool | None) -> None:
        assert has_exact_int8(machine, f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n") is exact
        assert has_exact_int8(machine, "") is None

    def test_int8_is_first_only_where_it_is_exact(self) -> None:
        assert OpenVinoBackend.precisions == (("int8", "fp32") if ov._EXACT_INT8 else ("fp32",))

    def test_auto_takes_int8_before_fp32(
        self, tmp_path: Path, tiny: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = tiny(tmp_path / "b", ("fp32", "int8-rtx", "int8"))
        for precisions, graph in ((("int8", "fp32"), "int8"), (("fp32",), "fp32")):
            monkeypatch.setattr(OpenVinoBackend, "precisions", precisions)
            with Session.open(bundle, "openvino") as session:
                assert session.graph == graph

    def test_auto_prefers_onnxruntime(self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert base.choose_backend()[0] == "ort"
        monkeypatch.setattr(base, "is_installed", lambda module: module == "openvino")
        with Session.open(tiny_bundle) as session:
            assert session.backend == "openvino"

    def test_int8_that_would_overflow_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ov, "_EXACT_INT8", False)
        with pytest.raises(SessionError, match=r"quantised, and this CPU has neither .*--precision fp32, or --backend"):
            OpenVinoBackend(write_small(tmp_path, "int8"))
        assert OpenVinoBackend(write_small(tmp_path, "fp32")).run(noise(1)).shape == (1, 3)


class TestErrors:
    def test_closed_is_closed_and_frees(self, tiny_bundle: Path) -> None:
        with Session.open(tiny_bundle, "openvino") as session:
            session.predict(noise(9))
        backend: Any = session._runner
        assert (backend._small, backend._large, backend._model, backend._core) == (None,) * 4
        with pytest.raises(SessionError, match="backend openvino is closed; open a new session"):
            session.predict(noise(1))
        session.close()

    def test_answers_outlive_the_session(self, tiny_bundle: Path) -> None:
        images = noise(7)
        with Session.open(tiny_bundle, "openvino") as session:
            small, large = session.predict(images[:3]), session.predict(images)
        np.testing.assert_allclose(small, softmax_of_means(images[:3]), atol=1e-6)
        np.testing.assert_allclose(large, softmax_of_means(images), atol=1e-6)

    def test_without_openvino(self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(MissingDependency, match=r"vggedge\[openvino\]"):
            Session.open(tiny_bundle, "openvino")

    def test_a_graph_that_is_no_onnx(self, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        path.write_text("labels")
        with pytest.raises(SessionError, match=r"(?s)model\.onnx: OpenVINO cannot load it.*Export the bundle again"):
            OpenVinoBackend(path)

    def test_a_graph_without_the_input(self, tmp_path: Path) -> None:
        path = write_small(tmp_path, "fp32")
        model = onnx.load(path)
        model.graph.input[0].name = model.graph.node[0].input[0] = "pixels_of_another"
        onnx.save(model, path)
        with pytest.raises(SessionError, match=r"input pixels_of_another, needed is images.*Export"):
            OpenVinoBackend(path)

    @pytest.mark.parametrize("count", [1, 8])
    def test_images_that_do_not_fit(self, count: int, tmp_path: Path) -> None:
        backend = OpenVinoBackend(write_small(tmp_path, "fp32"))
        with pytest.raises(SessionError, match=rf"OpenVINO fails on images of shape \({count}, 9, 6, 3\)"):
            backend.run(np.zeros((count, 9, 6, 3), np.uint8))
        assert backend.run(noise(count)).shape == (count, 3)  # and goes on


def test_importing_the_runtime_does_not_import_openvino() -> None:
    script = "import sys; import vggedge_runtime, vggedge_runtime.backends.ov; print('openvino' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"
