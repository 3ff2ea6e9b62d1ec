from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vggedge_runtime import inspection
from vggedge_runtime.bundle import Bundle, hash_file
from vggedge_runtime.engine_cache import EngineKey, EngineRequirement, compare_key, find_engine, write_engine
from vggedge_runtime.engine_layers import EngineAudit, EngineLayer
from vggedge_runtime.errors import BundleError, EngineError, MissingDependency, UsageError
from vggedge_runtime.evidence import LayerRecord
from vggedge_runtime.inspection import Tensor, find_damage, inspect_bundle, list_layers

GPU = "RTX 3090 (8.6)"
LAYERS = (
    LayerRecord(name="conv", op="Conv", precision="int8", macs=30, int8_magnitude=0.99, largest_output=2.0, snr_db=40),
    LayerRecord(name="fc", op="Gemm", precision="fp16", macs=10),
)
KERNEL = EngineLayer(
    name="conv_U1", kind="correlation", inputs=("Int8",), weights=("Int8",), outputs=("Half",), nodes=("conv", "relu")
)
AUDIT = EngineAudit(
    layers=(KERNEL,),
    convolutions=1,
    dense=0,
    int8=("conv",),
    not_int8=(),
    untold=(),
    extra_kernels=0,
    extra_after={"conv": 0},
    quantizations=0,
    float_pools=0,
    float32_kernels=0,
    unasked_float32=(),
)


@pytest.fixture
def bundle(tmp_path: Path, tiny: Callable[..., Bundle]) -> Bundle:
    """Graphs fp32 and int8-rtx; of the second the layers are known."""

    def add_layers(manifest: Any) -> Any:
        known = msgspec.structs.replace(manifest.graphs["int8-rtx"], layers=LAYERS)
        return msgspec.structs.replace(manifest, graphs=manifest.graphs | {"int8-rtx": known})

    return tiny(tmp_path / "tiny", ("fp32", "int8-rtx"), change=add_layers)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with a GPU, and the versions of the products there, which a test may change."""
    versions = {"tensorrt_rtx": "1.7.1", "tensorrt": "10.3.0"}

    def load(product: str) -> Any:
        if product not in versions:
            raise MissingDependency(f"{product} is not installed")
        return SimpleNamespace(version=versions[product])

    monkeypatch.setattr(inspection, "gpu_name", lambda: GPU)
    monkeypatch.setattr(inspection, "load_tensorrt", load)
    return versions


def add_engine(bundle: Bundle, audit: EngineAudit | None = AUDIT, **changes: Any) -> EngineKey:
    graph = changes.get("graph", "int8-rtx")
    key = EngineKey(
        product="tensorrt_rtx",
        version="1.7.1",
        devices=("8.6", "8.9"),
        graph=graph,
        graph_sha256=hash_file(bundle.path / f"graphs/model.{graph}.onnx"),
        batches=(1, 4, 8),
        options={},
    )
    key = msgspec.structs.replace(key, **changes)
    write_engine(bundle.path, key, key.fingerprint.encode(), 1.0, audit)
    return key


def no_gpu() -> str:
    raise EngineError("no NVIDIA driver here")


class TestInspect:
    def test_what_every_graph_takes_and_gives(self, bundle: Bundle) -> None:
        found = inspect_bundle(bundle)
        assert found.inputs == (Tensor("images", "uint8", ("N", 4, 6, 3)),)
        assert found.outputs == (Tensor("probabilities", "float32", ("N", 3)),)

    def test_the_contract_is_what_the_graphs_have(self, bundle: Bundle) -> None:
        onnx = pytest.importorskip("onnx")
        graph = onnx.load(bundle.path / "graphs/model.fp32.onnx").graph
        found = inspect_bundle(bundle)
        for tensors, values in ((found.inputs, graph.input), (found.outputs, graph.output)):
            for tensor, value in zip(tensors, values, strict=True):
                of = value.type.tensor_type
                shape = tuple(dim.dim_param or dim.dim_value for dim in of.shape.dim)
                kind = onnx.helper.tensor_dtype_to_np_dtype(of.elem_type).name
                assert tensor == Tensor(value.name, kind, shape)

    def test_size_is_of_files_and_plans(self, bundle: Bundle) -> None:
        add_engine(bundle)
        files = [path for path in bundle.path.rglob("*") if path.is_file() and path.suffix != ".json"]
        assert inspect_bundle(bundle).size_bytes == sum(path.stat().st_size for path in files)

    def test_it_is_json(self, bundle: Bundle, machine: dict[str, str]) -> None:
        add_engine(bundle)
        found = inspect_bundle(bundle)
        assert msgspec.json.decode(msgspec.json.encode(found), type=inspection.Inspection) == found

    def test_no_file_is_opened_but_the_records(self, bundle: Bundle) -> None:
        add_engine(bundle)
        for path in bundle.path.rglob("*"):
            if path.is_file() and path.suffix != ".json":
                path.unlink()
        assert len(inspect_bundle(bundle).engines) == 1

    def test_an_engine_that_cannot_be_read_does_not_hide_the_others(self, bundle: Bundle) -> None:
        good, bad = add_engine(bundle), add_engine(bundle, graph="fp32")
        (bundle.path / "engines" / bad.fingerprint / "engine.json").write_text("{")
        found = inspect_bundle(bundle)
        assert list(found.engines) == [good.fingerprint]
        assert len(found.unreadable) == 1
        assert bad.fingerprint in found.unreadable[0]


class TestFits:
    @pytest.mark.parametrize(
        ("changes", "fields"),
        [
            ({}, []),
            ({"product": "tensorrt", "version": "10.3.0", "devices": (GPU,)}, []),
            ({"product": "tensorrt", "version": "10.3.0"}, ["device"]),
            ({"devices": ("8.9", "12.0")}, ["device"]),
            ({"version": "1.7.0", "graph_sha256": "0"}, ["version", "graph_sha256"]),
            ({"product": "tensorrt_next"}, ["version", "device"]),
        ],
    )
    def test_on_this_machine(
        self, changes: dict[str, Any], fields: list[str], bundle: Bundle, machine: dict[str, str]
    ) -> None:
        key = add_engine(bundle, **changes)
        found = inspect_bundle(bundle)
        engine = found.engines[key.fingerprint]
        assert (found.gpu, found.no_gpu) == (GPU, None)
        assert (engine.fits, [each.field for each in engine.mismatches]) == (not fields, fields)

    def test_says_what_find_engine_says(self, bundle: Bundle, machine: dict[str, str]) -> None:
        for devices in (("8.6",), ("8.9",), (GPU,), ("RTX 4090 (8.9)",)):
            add_engine(bundle, devices=devices)
        engines = inspect_bundle(bundle).engines.values()
        assert sorted(engine.fits for engine in engines if engine.fits is not None) == [False, False, True, True]
        for engine in engines:
            wanted = EngineRequirement(
                product="tensorrt_rtx",
                version="1.7.1",
                device=GPU,
                graph="int8-rtx",
                graph_sha256=engine.record.key.graph_sha256,
                batch=4,
            )
            assert engine.mismatches == compare_key(engine.record.key, wanted)
        assert find_engine(bundle.path, wanted) in [engine.record for engine in engines if engine.fits]

    def test_a_product_that_is_not_installed(self, bundle: Bundle, machine: dict[str, str]) -> None:
        del machine["tensorrt_rtx"]
        key = add_engine(bundle)
        (mismatch,) = inspect_bundle(bundle).engines[key.fingerprint].mismatches
        assert str(mismatch) == "version is 1.7.1, needed is none, as it is not installed here"

    def test_without_a_gpu_it_is_not_known(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inspection, "gpu_name", no_gpu)
        monkeypatch.setattr(inspection, "load_tensorrt", lambda product: pytest.fail("not asked for"))
        key = add_engine(bundle)
        found = inspect_bundle(bundle)
        assert (found.gpu, found.no_gpu) == (None, "no NVIDIA driver here")
        assert found.engines[key.fingerprint].fits is None

    @pytest.mark.parametrize("graph", ["int8-rtx", "mixed"])
    def test_an_engine_of_another_graph_fits_nowhere(
        self, graph: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inspection, "gpu_name", no_gpu)
        key = add_engine(bundle, graph_sha256="0" * 64)
        if graph == "mixed":  # a graph that the bundle does not have
            key = msgspec.structs.replace(key, graph=graph)
            write_engine(bundle.path, key, b"plan", 1.0)
        engine = inspect_bundle(bundle).engines[key.fingerprint]
        assert engine.fits is False
        assert [each.field for each in engine.mismatches] == ["graph_sha256"]


class TestDamage:
    def check(self, bundle: Bundle) -> tuple[str, ...]:
        steps: list[tuple[int, int]] = []
        found = inspect_bundle(bundle)
        damaged = find_damage(bundle, found, lambda done, total, what: steps.append((done, total)))
        total = len(found.manifest.files) + len(found.engines)
        assert steps == [(done, total) for done in range(1, total + 1)]
        return damaged

    def test_none(self, bundle: Bundle) -> None:
        add_engine(bundle)
        add_engine(bundle, graph="fp32")
        assert self.check(bundle) == ()

    @pytest.mark.parametrize("index", range(6))
    def test_every_file_is_looked_at(self, index: int, bundle: Bundle) -> None:
        name = sorted(bundle.manifest.files)[index]
        assert len(bundle.manifest.files) == 6
        data = bytearray((bundle.path / name).read_bytes())
        data[-1] ^= 1
        (bundle.path / name).write_bytes(data)
        (sentence,) = self.check(bundle)
        assert sentence.startswith(f"{bundle.path / name}: its content is not what export wrote")

    def test_all_of_it_is_told(self, bundle: Bundle) -> None:
        plan, record = add_engine(bundle), add_engine(bundle, graph="fp32")
        (bundle.path / "labels.txt").unlink()
        (bundle.path / "engines" / plan.fingerprint / "int8-rtx.engine").write_bytes(b"?")
        (bundle.path / "engines" / record.fingerprint / "engine.json").write_text("{")
        damaged = self.check(bundle)
        assert [sentence.split(": ")[0].rsplit("/", 1)[1] for sentence in damaged] == [
            "engine.json",
            "labels.txt",
            "int8-rtx.engine",
        ]


class TestLayers:
    def test_of_a_graph_and_its_engines(self, bundle: Bundle) -> None:
        first, second = add_engine(bundle), add_engine(bundle, version="1.8")
        add_engine(bundle, graph="fp32")
        found = list_layers(inspect_bundle(bundle), "int8-rtx")
        assert (found.graph, found.layers) == ("int8-rtx", LAYERS)
        assert found.engines == {first.fingerprint: (KERNEL,), second.fingerprint: (KERNEL,)}

    def test_of_one_engine(self, bundle: Bundle) -> None:
        key = add_engine(bundle)
        add_engine(bundle, graph="fp32")
        for name in (key.fingerprint, key.fingerprint[:4]):
            found = list_layers(inspect_bundle(bundle), name)
            assert (found.graph, found.layers, found.engines) == (None, (), {key.fingerprint: (KERNEL,)})

    def test_a_graph_without_layers_has_those_of_its_engine(self, bundle: Bundle) -> None:
        key = add_engine(bundle, graph="fp32")
        found = list_layers(inspect_bundle(bundle), "fp32")
        assert (found.layers, list(found.engines)) == ((), [key.fingerprint])

    def test_nothing_is_known(self, bundle: Bundle) -> None:
        key = add_engine(bundle, audit=None, graph="fp32")
        for name in ("fp32", key.fingerprint):
            with pytest.raises(BundleError, match=f"nothing of the layers of {name}"):
                list_layers(inspect_bundle(bundle), name)

    def test_no_such_name(self, bundle: Bundle) -> None:
        key = add_engine(bundle)
        for name in ("int4", "", key.fingerprint[:3], key.fingerprint[1:]):
            with pytest.raises(UsageError, match=rf"which has: fp32, int8-rtx, {key.fingerprint}"):
                list_layers(inspect_bundle(bundle), name)


OLD_RECORD = {"key", "file", "sha256", "size_bytes", "build_seconds"}
"""Fields of an engine.json from before there were audits, times and versions."""


def test_a_bundle_from_before_evidence_and_engines_versions(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("manifest_before_evidence.json"), tmp_path / "manifest.json")
    bundle = Bundle.open(tmp_path)
    key = EngineKey(
        product="tensorrt_rtx",
        version="1.7.1",
        devices=("8.6",),
        graph="int8",
        graph_sha256=bundle.manifest.files["graphs/model.int8.onnx"].sha256,
        batches=(1, 1, 1),
        options={},
    )
    write_engine(tmp_path, key, b"plan", 1.0)
    record = tmp_path / "engines" / key.fingerprint / "engine.json"
    old = {name: value for name, value in json.loads(record.read_bytes()).items() if name in OLD_RECORD}
    record.write_text(json.dumps(old))
    found = inspect_bundle(bundle)
    assert list(found.manifest.graphs) == ["fp32", "int8"]
    assert found.engines[key.fingerprint].record.audit is None
    assert found.unreadable == ()
