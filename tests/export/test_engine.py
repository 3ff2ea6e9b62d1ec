from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge_export import engine as engines
from vggedge_export.engine import (
    BuildContext,
    BuiltEngine,
    build_audited_engine,
    build_engine,
    build_into,
    check_buildable,
    graphs_for,
    keep_fastest,
)
from vggedge_export.engine_config import EngineConfig, check_options
from vggedge_export.equalization import equalized_graph
from vggedge_export.float16 import float16_graph
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.quantization import INT8, INT8_RTX, quantized_graph, quantized_layers
from vggedge_runtime import device, memory, tensorrt_api
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
FAKES = Path(__file__).parents[1] / "fakes"
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
    ("choice", "message"),
    [
        ({"targets": ("8.9", "sm_90")}, "'sm_90': no compute capability, which looks like 8.9"),
        ({"targets": ("8.9", "8.9")}, "name one of them twice"),
        ({"workspace_bytes": 0}, "workspace is 0 bytes"),
        ({"optimization_level": 6}, "level is 6; known: 0 to 5"),
        ({"optimization_level": -1}, "level is -1"),
        ({"keep_best": 0}, "best of 0 engines"),
        ({"keep_best": 2, "timing_cache": True}, "nothing to compare. Leave one"),
    ],
)
def test_choices_that_no_product_takes_are_refused_at_once(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineConfig(**choice)


@pytest.mark.parametrize(
    ("choice", "options"),
    [
        ({}, {}),
        ({"batches": (1, 4, 8), "targets": ("8.9",)}, {}),  # the key has fields of their own for these
        ({"keep_best": 3, "timing_cache": None}, {}),  # one of several that are interchangeable
        ({"timing_cache": False}, {}),
        ({"tf32": False}, {"tf32": "off"}),
        ({"optimization_level": 0}, {"optimization_level": "0"}),
        ({"workspace_bytes": 5}, {"workspace_bytes": "5"}),
    ],
)
def test_the_key_holds_what_makes_the_engine_another(choice: dict[str, Any], options: dict[str, str]) -> None:
    assert EngineConfig(**choice).options == options


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


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"targets": ("9.9",)}, r"no target 9\.9; it has: 7\.5, 8\.0, 8\.6"),
        ({"optimization_level": 3}, r"an optimisation level is asked for.*same plan.*--for tensorrt"),
        ({"timing_cache": True}, r"a timing cache is asked for.*--for tensorrt"),
        ({"keep_best": 2}, r"the best of 2 builds is asked for.*--for tensorrt"),
    ],
)
def test_what_rtx_lacks_is_refused_with_the_product_that_has_it(
    choice: dict[str, Any], message: str, rtx: TensorRtApi
) -> None:
    with pytest.raises(UsageError, match=message):
        check_options(rtx, EngineConfig(**choice))
    check_options(rtx, EngineConfig(targets=("8.9", "7.5"), workspace_bytes=10**9, tf32=False, timing_cache=False))


def test_rtx_builds_the_same_plan_at_every_level_which_is_why_it_takes_none(
    rtx: TensorRtApi, rtx_graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = bytes(build_engine(rtx, rtx_graphs["fp16"], (32, 32, 3), EngineConfig()))
    monkeypatch.setattr(engines, "check_options", lambda api, config: None)
    for level in (0, 5):
        plan = build_engine(rtx, rtx_graphs["fp16"], (32, 32, 3), EngineConfig(optimization_level=level))
        assert len(plan) == len(usual)


def test_targets_and_tf32_change_the_plan(rtx: TensorRtApi, rtx_graphs: dict[str, Path]) -> None:
    configs = [EngineConfig(), EngineConfig(targets=("8.9",)), EngineConfig(tf32=False)]
    plans = [bytes(build_engine(rtx, rtx_graphs["fp32"], (32, 32, 3), config)) for config in configs]
    assert len(set(plans)) == 3


def test_progress_rises_from_0_to_1_over_both_builds_and_stops_where_told(
    rtx: TensorRtApi, rtx_graphs: dict[str, Path]
) -> None:
    shares: list[float] = []

    def watch(share: float) -> bool:
        shares.append(share)
        return share < 0.75

    whole = BuildContext(watch=lambda share: bool(shares.append(share)) or True)
    build_audited_engine(rtx, rtx_graphs["fp16"], (32, 32, 3), EngineConfig(), whole)
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.1
    assert shares[-1] == 1
    assert len({int(100 * share) for share in shares}) > 20
    shares.clear()
    with pytest.raises(KeyboardInterrupt):
        build_audited_engine(rtx, rtx_graphs["fp16"], (32, 32, 3), EngineConfig(), BuildContext(watch=watch))
    assert 0.75 <= shares[-1] < 1


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


# --- TensorRT, which builds on a GPU only: a strict fake of two versions (tests/fakes/fake_tensorrt.py)


class Enterprise:
    """TensorRT as load_tensorrt finds it on a Jetson Orin, and what was called."""

    def __init__(self, fake: Any, log: Path) -> None:
        self.api, self.answers, self._log = load_tensorrt("tensorrt"), fake.ANSWERS, log

    @property
    def calls(self) -> list[list[Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []


@pytest.fixture(params=["10_3", "11_4"])
def enterprise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Enterprise:
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.syspath_prepend(FAKES / f"tensorrt_{request.param}")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    for function in (device.gpu_name, memory.read_free_memory):  # the fake brings a driver of its own
        monkeypatch.setattr(function, "__defaults__", function.__defaults__)
    monkeypatch.setattr(tensorrt_api, "_loggers", {})
    fake = importlib.import_module("fake_tensorrt")
    monkeypatch.setitem(fake.ANSWERS, "log", str(tmp_path / "calls"))
    for name in ("errors", "float", "inspector", "loads", "gpu", "latencies_ms"):
        monkeypatch.setitem(fake.ANSWERS, name, fake.ANSWERS[name])
    monkeypatch.setitem(sys.modules, "tensorrt", importlib.import_module("tensorrt"))
    return Enterprise(fake, tmp_path / "calls")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny network in every graph that is made for TensorRT."""
    folder = tmp_path_factory.mktemp("tiny")
    made = {
        "fp32": tiny_graph(),
        "fp16": float16_graph(tiny_graph()),
        "int8": quantized_graph(tiny_graph(), INT8, {"conv": 1.0}),
        "mixed": quantized_graph(float16_graph(tiny_graph()), INT8, {"conv": 1.0}),
    }
    for name, graph in made.items():
        graph.write(folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in made}


def test_both_surfaces_lack_what_their_version_lacks(enterprise: Enterprise) -> None:
    trt: Any = enterprise.api.module
    is_old = enterprise.api.version.startswith("10.")
    assert hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH") == is_old
    assert hasattr(trt.BuilderFlag, "FP16") == hasattr(trt.IBuilderConfig, "int8_calibrator") == is_old
    assert hasattr(trt.ICudaEngine, "create_runtime_config") == (not is_old)
    assert not hasattr(trt, "ComputeCapability")
    settings = trt.Builder(tensorrt_api.shared_logger(enterprise.api)).create_builder_config()
    with pytest.raises(AttributeError):
        settings.max_workspace_size = 1  # gone since 10


def test_the_enterprise_path_builds_for_this_gpu_only(enterprise: Enterprise, bundle: Path) -> None:
    api = enterprise.api
    check_buildable(api)
    assert (api.product, api.builds_without_gpu, api.targets) == ("tensorrt", False, ())
    context = BuildContext(workspace_bytes=2**30)
    record = build_into(bundle, api, "fp32", EngineConfig((1, 4, 8), tf32=False), context=context)
    plan = (bundle / "engines" / record.key.fingerprint / "fp32.engine").read_bytes()
    check_record(bundle, record, plan, (1, 4, 8))
    assert plan.startswith(b"FAKE PLAN")
    assert (record.key.product, record.key.version, record.key.devices) == ("tensorrt", api.version, ("Orin (8.7)",))
    assert record.key.options == {"tf32": "off"}
    settings = {"level": 3, "aux_streams": 0, "verbosity": "DETAILED", "flags": ["DISABLE_TIMING_CACHE"]}
    assert enterprise.calls == [
        ["create_network", 2],  # 1 << STRONGLY_TYPED
        ["parse_from_file", str(bundle / "graphs/model.fp32.onnx")],
        ["set_shape", "images", [1, 8, 8, 3], [4, 8, 8, 3], [8, 8, 8, 3]],
        ["set_memory_pool_limit", "WORKSPACE", 2**30],
        ["clear_flag", "TF32"],
        ["set_flag", "DISABLE_TIMING_CACHE"],
        ["build_serialized_network", settings],
    ]


@pytest.mark.parametrize(
    ("name", "reads", "int8"),
    [("fp32", "Float", ()), ("fp16", "Half", ()), ("int8", "Int8", ("conv",)), ("mixed", "Int8", ("conv",))],
)
def test_the_inspector_tells_what_each_kernel_reads(
    name: str, reads: str, int8: tuple[str, ...], enterprise: Enterprise, graphs: dict[str, Path]
) -> None:
    audit = build_audited_engine(enterprise.api, graphs[name], (8, 8, 3), EngineConfig()).audit
    assert audit is not None
    assert [(layer.kind, layer.nodes[:1]) for layer in audit.layers] == [
        ("Reformat", ("conv/more",)),  # it goes by the name of the convolution, and does not compute it
        ("CaskConvolution", ("conv",)),
        ("gemm", ("fc",)),
    ]
    assert (audit.layers[1].inputs, audit.layers[1].weights) == ((reads,), (reads,))
    assert (audit.convolutions, audit.dense, audit.extra_kernels) == (1, 1, 1)
    assert (audit.int8, audit.not_int8, audit.untold) == (int8, (), ())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int8", "quantises conv, and the engine does not run that in INT8 .conv reads Float with weights of Float"),
        ("fp16", "has conv in FP16, and the engine does not compute that in FP16 .conv reads Float"),
    ],
)
def test_an_engine_without_the_asked_precision_is_refused(
    name: str, message: str, enterprise: Enterprise, graphs: dict[str, Path]
) -> None:
    enterprise.answers["float"] = True
    with pytest.raises(EngineError, match=message):
        build_audited_engine(enterprise.api, graphs[name], (8, 8, 3), EngineConfig())
    build_audited_engine(enterprise.api, graphs["fp32"], (8, 8, 3), EngineConfig())


def test_an_inspector_that_tells_names_only_gives_no_audit(enterprise: Enterprise, graphs: dict[str, Path]) -> None:
    enterprise.answers["inspector"] = "names"
    assert build_audited_engine(enterprise.api, graphs["int8"], (8, 8, 3), EngineConfig()).audit is None


def test_a_plan_that_does_not_load_is_refused(enterprise: Enterprise, graphs: dict[str, Path]) -> None:
    enterprise.answers["loads"] = False
    with pytest.raises(EngineError, match=r"does not load the engine that it has just built: .*magicTag"):
        build_engine(enterprise.api, graphs["fp16"], (8, 8, 3), EngineConfig())


def test_the_level_is_passed_on_and_targets_are_refused(enterprise: Enterprise, graphs: dict[str, Path]) -> None:
    build_engine(enterprise.api, graphs["fp16"], (8, 8, 3), EngineConfig(optimization_level=5))
    assert enterprise.calls[-1][1]["level"] == 5
    with pytest.raises(
        UsageError, match=r"targets are 8\.9, and tensorrt \S+ builds for the GPU at hand only.*--for rtx"
    ):
        build_engine(enterprise.api, graphs["fp16"], (8, 8, 3), EngineConfig(targets=("8.9",)))


def test_what_the_parser_says_is_told(enterprise: Enterprise, tmp_path: Path) -> None:
    graph = tiny_graph()
    graph.nodes[3] = make_node("StringNormalizer", ["conv"], "relu")
    graph.check = lambda: None  # type: ignore[method-assign]
    graph.write(tmp_path / "graph.onnx")
    message = r"does not parse the graph: StringNormalizer 'relu': UNSUPPORTED_NODE, false\.$"
    with pytest.raises(EngineError, match=message):
        build_engine(enterprise.api, tmp_path / "graph.onnx", (8, 8, 3), EngineConfig())


def test_errors_of_this_build_are_told_and_of_no_earlier_one(enterprise: Enterprise, graphs: dict[str, Path]) -> None:
    enterprise.answers["errors"] = ["no tactic", "assertion"]
    for _ in range(2):
        with pytest.raises(EngineError, match=r"does not build the graph: no tactic; assertion\.$"):
            build_engine(enterprise.api, graphs["fp16"], (8, 8, 3), EngineConfig())


def test_batches_that_the_graph_does_not_take_are_refused_by_tensorrt(enterprise: Enterprise, tmp_path: Path) -> None:
    tiny_graph(batch=1).write(tmp_path / "graph.onnx")
    with pytest.raises(EngineError, match=r"static dimensions differ"):
        build_engine(enterprise.api, tmp_path / "graph.onnx", (8, 8, 3), EngineConfig((1, 4, 8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enterprise.api.module.IBuilderConfig, "add_optimization_profile", lambda self, profile: -1)
        with pytest.raises(EngineError, match=r"does not take the batches \(1, 4, 8\)"):
            build_engine(enterprise.api, tmp_path / "graph.onnx", (8, 8, 3), EngineConfig((1, 4, 8)))


def test_a_build_that_is_stopped_ends_in_an_interrupt(enterprise: Enterprise, graphs: dict[str, Path]) -> None:
    context = BuildContext(watch=lambda share: share < 0.5)
    with pytest.raises(KeyboardInterrupt):
        build_audited_engine(enterprise.api, graphs["fp16"], (8, 8, 3), EngineConfig(), context)


def test_without_a_gpu_the_missing_driver_is_told_before_anything_is_built(enterprise: Enterprise) -> None:
    enterprise.answers["gpu"] = None
    with pytest.raises(EngineError, match="no NVIDIA driver here"):
        check_buildable(enterprise.api)
    assert enterprise.calls == []


def test_a_failed_build_leaves_no_engine_in_the_bundle(enterprise: Enterprise, bundle: Path) -> None:
    enterprise.answers["errors"] = ["no"]
    with pytest.raises(EngineError):
        build_into(bundle, enterprise.api, "fp32", EngineConfig())
    assert not (bundle / "engines").exists()


# --- the timing cache


class TestTimingCache:
    def build(self, enterprise: Enterprise, graphs: dict[str, Path], path: Path | None) -> int:
        """Build once; how many timings the build began with."""
        build_audited_engine(enterprise.api, graphs["fp16"], (8, 8, 3), EngineConfig(), BuildContext(timing_cache=path))
        return [call for call in enterprise.calls if call[0] == "set_timing_cache"][-1][1]

    def test_each_build_begins_with_what_those_before_found(
        self, enterprise: Enterprise, graphs: dict[str, Path], tmp_path: Path
    ) -> None:
        path = tmp_path / "new/timings.cache"
        assert [self.build(enterprise, graphs, path) for _ in range(3)] == [0, 1, 2]
        assert sorted(each.name for each in path.parent.iterdir()) == ["timings.cache", "timings.cache.lock"]

    def test_a_damaged_one_is_as_none_and_is_mended(
        self, enterprise: Enterprise, graphs: dict[str, Path], tmp_path: Path
    ) -> None:
        path = tmp_path / "timings.cache"
        path.write_bytes(b"half a cache")
        assert [self.build(enterprise, graphs, path) for _ in range(2)] == [0, 1]

    def test_one_that_cannot_be_written_costs_time_only(
        self, enterprise: Enterprise, graphs: dict[str, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("in the way of the folder")
        assert self.build(enterprise, graphs, tmp_path / "file/timings.cache") == 0

    def test_what_others_wrote_meanwhile_is_kept(
        self, enterprise: Enterprise, graphs: dict[str, Path], tmp_path: Path
    ) -> None:
        path = tmp_path / "timings.cache"

        def watch(share: float) -> bool:
            path.write_bytes(b'TIMINGS ["of another process"]')
            return True

        context = BuildContext(timing_cache=path, watch=watch)
        build_audited_engine(enterprise.api, graphs["fp16"], (8, 8, 3), EngineConfig(), context)
        assert len(json.loads(path.read_bytes()[8:])) == 2


# --- the best of several


@pytest.mark.parametrize(
    ("latencies_ms", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([2.0, 2.0], 0), ([9.0, 8.0, 7.0], 2)]
)
def test_the_fastest_is_kept_and_of_equals_the_first(latencies_ms: list[float], best: int) -> None:
    kept = keep_fastest(
        lambda index: BuiltEngine(memoryview(bytes([index])), None),
        len(latencies_ms),
        lambda plan: latencies_ms[plan[0]],
    )
    assert bytes(kept.plan) == bytes([best])


def test_a_single_one_is_not_timed_and_several_need_a_timer() -> None:
    def build(index: int) -> BuiltEngine:
        return BuiltEngine(memoryview(b"plan"), None)

    def measure(plan: memoryview) -> float:
        raise AssertionError("timed")

    assert bytes(keep_fastest(build, 1, measure).plan) == b"plan"
    with pytest.raises(EngineError, match="2 engines cannot be compared"):
        keep_fastest(build, 2, None)


def test_targets_have_one_key_however_they_are_named() -> None:
    api = SimpleNamespace(builds_without_gpu=True, targets=("8.0", "12.0"))
    named = [engines._devices(api, EngineConfig(targets=targets)) for targets in (("12.1", "8.9"), ("8.9", "12.1"))]
    assert named == [("8.9", "12.1")] * 2
    assert engines._devices(api, EngineConfig()) == ("8.0", "12.0")
