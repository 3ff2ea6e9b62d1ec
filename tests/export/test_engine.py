from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge_export import engine as engines
from vggedge_export.engine import (
    BuiltEngine,
    EngineConfig,
    build_audited_engine,
    build_engine,
    build_into,
    check_buildable,
    graphs_for,
)
from vggedge_export.equalization import equalized_graph
from vggedge_export.float16 import float16_graph
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.quantization import INT8_RTX, quantized_graph, quantized_layers
from vggedge_runtime import device, tensorrt_api
from vggedge_runtime.bundle import (
    FORMAT_VERSION,
    Bundle,
    Comparison,
    GoldenRecord,
    GraphRecord,
    Manifest,
    hash_file,
    write_bundle,
    write_manifest,
)
from vggedge_runtime.engine_cache import EngineRecord, list_engines, read_engine
from vggedge_runtime.errors import EngineError, MissingDependency, UsageError
from vggedge_runtime.graphs import GRAPHS
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.statistics import build_proportion
from vggedge_runtime.tensorrt_api import TensorRtApi, load_tensorrt

pytest.importorskip("onnx")
BATCHES = [(1, 1, 1), (1, 4, 8)]


# --- choices


@pytest.mark.parametrize("batches", [(1, 1, 1), (1, 4, 8), (2, 2, 64)])
def test_batches_in_order_are_taken(batches: tuple) -> None:
    assert EngineConfig(batches).batches == batches


@pytest.mark.parametrize("batches", [(0, 1, 1), (-1, 1, 1), (2, 1, 4), (1, 8, 4), (4, 4, 1)])
def test_batches_out_of_order_are_refused(batches: tuple) -> None:
    with pytest.raises(UsageError, match="needed is 1 <= smallest <= best <= largest"):
        EngineConfig(batches)


@pytest.mark.parametrize(
    ("product", "wanted"),
    [
        ("tensorrt", ["fp32", "fp16", "int8", "mixed"]),
        ("tensorrt_rtx", ["fp32", "fp16", "int8-rtx", "mixed-rtx"]),
        ("openvino", []),
    ],
)
def test_each_product_gets_the_graphs_made_for_it(product: str, wanted: list[str]) -> None:
    assert graphs_for(product, list(GRAPHS)) == wanted
    assert graphs_for(product, ["int8-rtx", "fp32"]) == [name for name in ("int8-rtx", "fp32") if name in wanted]


def test_an_unknown_product_is_refused() -> None:
    with pytest.raises(UsageError, match="'tensorflow' is unknown; known: auto, tensorrt, tensorrt_rtx"):
        load_tensorrt("tensorflow")


def test_with_nothing_installed_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "installed_products", lambda: ())
    with pytest.raises(MissingDependency, match=r"(?s)pip install 'vggedge\[rtx\]'.*JetPack.*--no-engine"):
        load_tensorrt("auto")


# --- a bundle of one graph


def tiny_graph(batch: int | str = "N") -> Graph:
    nodes = [
        make_node("Cast", ["images"], "pixels", to=1),
        make_node("Transpose", ["pixels"], "t", perm=[0, 3, 1, 2]),
        make_node("Conv", ["t", "k"], "conv"),
        make_node("Relu", ["conv"], "relu"),
        make_node("Flatten", ["relu"], "flat"),
        make_node("Gemm", ["flat", "w"], "fc", transB=1),
        make_node("Softmax", ["fc"], "probabilities"),
    ]
    rng = np.random.default_rng(0)
    weights = {"k": rng.random((4, 3, 3, 3), np.float32), "w": rng.random((3, 4 * 6 * 6), np.float32)}
    return Graph(
        nodes,
        weights,
        [value_info("images", np.uint8, [batch, 8, 8, 3])],
        [value_info("probabilities", np.float32, [batch, 3])],
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    share = build_proportion(1, 1)
    with write_bundle(path) as staging:
        (staging / "graphs").mkdir()
        (staging / "golden").mkdir()
        np.save(staging / "golden/inputs.npy", np.zeros((1, 8, 8, 3), np.uint8))
        np.save(staging / "golden/outputs.fp32.npy", np.full((1, 3), 1 / 3, np.float32))
        tiny_graph().write(staging / "graphs/model.fp32.onnx")
        evidence = Comparison(
            against="keras", obtained="measured", images=1, max_abs_difference=0.0, agreement=share, accuracy=share
        )
        record = GraphRecord(
            file="graphs/model.fp32.onnx",
            precision="fp32",
            made_for=GRAPHS["fp32"].made_for,
            op_counts={},
            evidence=evidence,
        )
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name="tiny",
            created="2026-01-01T00:00:00+00:00",
            parameters=1,
            image=ImageSpec(height=8, width=8),
            labels=("a", "b", "c"),
            graphs={"fp32": record},
            golden=GoldenRecord(inputs="golden/inputs.npy", outputs={"fp32": "golden/outputs.fp32.npy"}),
            passes=(),
            keras_accuracy=build_proportion(1, 1),
            data={},
            tools={},
            files={},
        )
        write_manifest(staging, manifest)
    return path


def check_record(bundle: Path, record: EngineRecord, plan: bytes, batches: tuple) -> None:
    """The engine.json says what was built, and the plan beside it is what was built."""
    folder = bundle / "engines" / record.key.fingerprint
    assert sorted(path.name for path in folder.iterdir()) == ["engine.json", "fp32.engine"]
    assert (folder / "fp32.engine").read_bytes() == plan
    assert record.sha256 == hashlib.sha256(plan).hexdigest()
    assert (record.size_bytes, record.file) == (len(plan), "fp32.engine")
    assert record.build_seconds >= 0
    assert (record.key.graph, record.key.batches) == ("fp32", batches)
    assert record.key.graph_sha256 == hash_file(bundle / "graphs/model.fp32.onnx")
    assert msgspec.json.decode((folder / "engine.json").read_bytes(), type=EngineRecord) == record
    assert read_engine(bundle, record.key) == plan


# --- TensorRT-RTX, where it is installed


@pytest.fixture(scope="module")
def rtx() -> TensorRtApi:
    pytest.importorskip("tensorrt_rtx")
    return load_tensorrt("tensorrt_rtx")


@pytest.fixture(scope="module")
def rtx_graphs(convert_vgg: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A real VGG with a BatchNorm behind a relu in every graph that is made for TensorRT-RTX."""
    clean = convert_vgg("vgg9-compact").clean
    scales = {layer.name: 4 / 127 for layer in quantized_layers(clean, INT8_RTX)}
    even = float16_graph(equalized_graph(clean))
    made = {
        "fp32": clean,
        "fp16": float16_graph(clean),
        "int8-rtx": quantized_graph(even, INT8_RTX, scales),
        "mixed-rtx": quantized_graph(even, INT8_RTX, dict(list(scales.items())[2:])),
    }
    folder = tmp_path_factory.mktemp("graphs")
    for name, graph in made.items():
        graph.write(folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in made}


def test_the_module_fixture_has_every_graph_for_rtx(rtx_graphs: dict[str, Path]) -> None:
    assert list(rtx_graphs) == graphs_for("tensorrt_rtx", list(GRAPHS))


@pytest.mark.parametrize("batches", BATCHES, ids=["static", "dynamic"])
@pytest.mark.parametrize("name", graphs_for("tensorrt_rtx", list(GRAPHS)))
def test_rtx_builds_every_graph_made_for_it_without_a_gpu(
    name: str, batches: tuple, rtx: TensorRtApi, rtx_graphs: dict[str, Path]
) -> None:
    check_buildable(rtx)
    built = build_audited_engine(rtx, rtx_graphs[name], (32, 32, 3), EngineConfig(batches))
    assert built.plan.nbytes > 10_000
    assert any(bytes(built.plan[:4096]))
    assert built.audit is not None
    kernels = list(built.audit.extra_after)
    assert (kernels[0], kernels[-1], len(kernels)) == ("block1_conv1", "predictions", 9)
    # All but the last, which makes the logits; mixed-rtx leaves the first two in FP16.
    int8 = {"int8-rtx": kernels[:-1], "mixed-rtx": kernels[2:-1]}
    assert list(built.audit.int8) == int8.get(name, [])


def test_an_engine_is_stored_with_a_record_that_fits_it(bundle: Path, rtx: TensorRtApi) -> None:
    built = []

    def build(*arguments: Any) -> BuiltEngine:
        built.append(build_audited_engine(*arguments))
        return built[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "build_audited_engine", build)
        record = build_into(bundle, rtx, "fp32", EngineConfig((1, 2, 4)))
    check_record(bundle, record, bytes(built[0].plan), (1, 2, 4))
    assert record.audit is not None
    assert (record.audit.convolutions, record.audit.dense, list(record.audit.extra_after)) == (1, 1, ["conv", "fc"])
    assert record.audit == built[0].audit
    assert (record.key.product, record.key.version) == ("tensorrt_rtx", rtx.version)
    assert record.key.devices == rtx.targets
    assert "8.6" in rtx.targets
    assert "7.5" not in rtx.targets
    assert list_engines(bundle) == [record]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no protobuf at all" * 10, "does not parse the graph: MODEL_DESERIALIZE_FAILED, .*Failed to parse the ONNX"),
        (b"", "does not build the graph: .*must have at least one output"),
    ],
    ids=["garbage", "empty"],
)
def test_a_file_that_is_no_onnx_is_refused(content: bytes, message: str, rtx: TensorRtApi, tmp_path: Path) -> None:
    source = tmp_path / "graph.onnx"
    source.write_bytes(content)
    with pytest.raises(EngineError, match=rf"tensorrt_rtx \S+ {message}"):
        build_engine(rtx, source, (8, 8, 3), EngineConfig())


def test_an_op_that_tensorrt_does_not_know_is_named_in_its_own_words(rtx: TensorRtApi, tmp_path: Path) -> None:
    graph = tiny_graph()
    graph.nodes[3] = make_node("StringNormalizer", ["conv"], "relu")
    graph.check = lambda: None  # type: ignore[method-assign]
    graph.write(tmp_path / "graph.onnx")
    with pytest.raises(EngineError, match=r"parse the graph: StringNormalizer 'relu': UNSUPPORTED_NODE"):
        build_engine(rtx, tmp_path / "graph.onnx", (8, 8, 3), EngineConfig())


def test_batches_that_the_graph_does_not_take_are_refused(rtx: TensorRtApi, tmp_path: Path) -> None:
    tiny_graph(batch=1).write(tmp_path / "graph.onnx")
    with pytest.raises(EngineError, match=r"tensorrt_rtx \S+ does not"):
        build_engine(rtx, tmp_path / "graph.onnx", (8, 8, 3), EngineConfig((1, 4, 8)))


def test_a_target_that_the_product_does_not_have_is_refused(rtx: TensorRtApi, rtx_graphs: dict[str, Path]) -> None:
    other = TensorRtApi("tensorrt_rtx", rtx.version, rtx.module, True, ("8.6", "1.2"))
    with pytest.raises(EngineError, match=r"has no target '1.2'; it has: 8.6"):
        build_engine(other, rtx_graphs["fp32"], (32, 32, 3), EngineConfig())


# --- TensorRT proper, which builds on a GPU only: a module that has what this project uses and nothing else


class FakeTensorRt:
    """The part of TensorRT 10 that a build uses. Anything else is an AttributeError, as with slots."""

    __version__ = "10.3.0"

    def __init__(self, **answers: Any) -> None:  # noqa: C901 - one namespace, as the module is
        answers = {"errors": (), "profile": 0, "plan": b"plan bytes", "says": ()} | answers
        calls: list[tuple] = []
        self.calls = calls

        class ILogger:
            def __init__(self) -> None:
                pass

        class Config:
            __slots__ = ("max_aux_streams",)

            def add_optimization_profile(self, profile: Any) -> int:
                calls.append(("add_optimization_profile",))
                return answers["profile"]

        class Profile:
            __slots__ = ()

            def set_shape(self, name: str, *shapes: tuple) -> None:
                calls.append(("set_shape", name, *shapes))

        class Builder:
            __slots__ = ("logger",)

            def __init__(self, logger: Any) -> None:
                assert isinstance(logger, ILogger)
                self.logger = logger

            def create_network(self, flags: int) -> str:
                calls.append(("create_network", flags))
                return "network"

            def create_builder_config(self) -> Config:
                return Config()

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: str, config: Config) -> bytes | None:
                calls.append(("build", network, config.max_aux_streams))
                for severity, text in answers["says"]:
                    self.logger.log(SimpleNamespace(name=severity), text)
                return answers["plan"]

        class OnnxParser:
            __slots__ = ()

            def __init__(self, network: str, logger: Any) -> None:
                assert network == "network"

            def parse_from_file(self, source: str) -> bool:
                assert type(source) is str
                calls.append(("parse", source))
                return not answers["errors"]

            @property
            def num_errors(self) -> int:
                return len(answers["errors"])

            def get_error(self, index: int) -> Any:
                said = dict(zip(("node_operator", "node_name", "desc"), answers["errors"][index], strict=True))
                return SimpleNamespace(
                    code=lambda: SimpleNamespace(name="CODE"),
                    **{name: functools.partial(str, text) for name, text in said.items()},
                )

        self.ILogger, self.Builder, self.OnnxParser = ILogger, Builder, OnnxParser
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)


class FakeDriver:
    """libcuda on a Jetson Orin."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 7}[arguments[1]]
            return 0

        return call


@pytest.fixture
def enterprise(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TensorRtApi]:
    """``enterprise(plan=...)``: TensorRT proper as load_tensorrt finds it, on a machine with an Orin."""
    monkeypatch.setattr(tensorrt_api, "_loggers", {})
    monkeypatch.setattr(engines, "gpu_name", lambda: device.gpu_name(lambda library: FakeDriver()))

    def make(**answers: Any) -> TensorRtApi:
        module = FakeTensorRt(**answers)
        tensorrt_api._loggers.clear()
        monkeypatch.setattr(tensorrt_api, "installed_products", lambda: ("tensorrt", "tensorrt_rtx"))
        monkeypatch.setattr(
            tensorrt_api, "require", lambda name, extra: {("tensorrt", "tensorrt"): module}[name, extra]
        )
        return load_tensorrt("auto")

    return make


def test_tensorrt_proper_is_preferred_and_builds_for_this_gpu_only(
    enterprise: Callable[..., TensorRtApi], bundle: Path
) -> None:
    api = enterprise()
    assert (api.product, api.version, api.builds_without_gpu, api.targets) == ("tensorrt", "10.3.0", False, ())
    check_buildable(api)
    record = build_into(bundle, api, "fp32", EngineConfig((1, 4, 8)))
    check_record(bundle, record, b"plan bytes", (1, 4, 8))
    assert (record.key.product, record.key.version, record.key.devices) == ("tensorrt", "10.3.0", ("Orin (8.7)",))
    assert record.audit is None
    assert api.module.calls == [
        ("create_network", 2),  # 1 << STRONGLY_TYPED
        ("parse", str(bundle / "graphs/model.fp32.onnx")),
        ("set_shape", "images", (1, 8, 8, 3), (4, 8, 8, 3), (8, 8, 8, 3)),
        ("add_optimization_profile",),
        ("build", "network", 0),
    ]


def test_tensorrt_11_which_has_no_flag_for_strong_types_gets_none(
    enterprise: Callable[..., TensorRtApi], tmp_path: Path
) -> None:
    api = enterprise()
    del api.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert bytes(build_engine(api, tmp_path / "x.onnx", (8, 8, 3), EngineConfig())) == b"plan bytes"
    assert api.module.calls[0] == ("create_network", 0)


def test_what_the_parser_says_is_told_in_full(enterprise: Callable[..., TensorRtApi], tmp_path: Path) -> None:
    api = enterprise(errors=[("LRN", "block1_lrn1", "no importer"), ("", "", "the file is bad")])
    message = (
        r"^tensorrt 10.3.0 does not parse the graph: LRN 'block1_lrn1': CODE, no importer; CODE, the file is bad\.$"
    )
    with pytest.raises(EngineError, match=message):
        build_engine(api, tmp_path / "x.onnx", (8, 8, 3), EngineConfig())


def test_a_build_that_fails_tells_errors_but_no_warnings(
    enterprise: Callable[..., TensorRtApi], tmp_path: Path
) -> None:
    says = [("WARNING", "slow"), ("ERROR", "no tactic"), ("INTERNAL_ERROR", "assertion")]
    api = enterprise(plan=None, says=says)
    with pytest.raises(EngineError, match=r"does not build the graph: no tactic; assertion\.$"):
        build_engine(api, tmp_path / "x.onnx", (8, 8, 3), EngineConfig())
    silent = enterprise(plan=None)
    with pytest.raises(EngineError, match=r"does not build the graph: it gave no reason\.$"):
        build_engine(silent, tmp_path / "x.onnx", (8, 8, 3), EngineConfig())


def test_errors_of_an_earlier_build_are_not_told_again(enterprise: Callable[..., TensorRtApi], tmp_path: Path) -> None:
    api = enterprise(plan=None, says=[("ERROR", "the only one")])
    for _ in range(2):
        with pytest.raises(EngineError, match=r"graph: the only one\.$"):
            build_engine(api, tmp_path / "x.onnx", (8, 8, 3), EngineConfig())


def test_a_profile_that_is_refused_is_an_error(enterprise: Callable[..., TensorRtApi], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"does not take the batches \(1, 4, 8\)"):
        build_engine(enterprise(profile=-1), tmp_path / "x.onnx", (8, 8, 3), EngineConfig((1, 4, 8)))


def test_without_a_gpu_the_missing_driver_is_told_before_anything_is_built(
    enterprise: Callable[..., TensorRtApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver(library: str) -> Any:
        raise OSError(f"{library}: cannot open shared object file")

    api = enterprise()
    monkeypatch.setattr(engines, "gpu_name", lambda: device.gpu_name(no_driver))
    with pytest.raises(EngineError, match="no NVIDIA driver here"):
        check_buildable(api)
    assert api.module.calls == []


def test_an_engine_that_does_not_run_a_quantised_convolution_in_int8_is_not_stored(
    bundle: Path, rtx: TensorRtApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX for compute capability 7.5 turns INT8 into FP16."""
    graph = float16_graph(tiny_graph())
    quantized_graph(graph, INT8_RTX, {"conv": 1.0}).write(bundle / "graphs/model.fp32.onnx")
    monkeypatch.setattr(Bundle, "verified_path", lambda self, file: bundle / file)
    turing = TensorRtApi(rtx.product, rtx.version, rtx.module, True, ("7.5", "8.6"))
    with pytest.raises(EngineError, match=r"quantises conv, and the engine does not run that in INT8"):
        build_into(bundle, turing, "fp32", EngineConfig())
    assert list_engines(bundle) == []
    assert build_into(bundle, rtx, "fp32", EngineConfig()).audit.int8 == ("conv",)  # type: ignore[union-attr]


def test_a_failed_build_leaves_no_engine_in_the_bundle(enterprise: Callable[..., TensorRtApi], bundle: Path) -> None:
    with pytest.raises(EngineError):
        build_into(bundle, enterprise(plan=None), "fp32", EngineConfig())
    assert list_engines(bundle) == []
    assert not (bundle / "engines").exists()
