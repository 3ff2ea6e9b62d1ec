"""What other tools get of a bundle; Triton's configuration is read back with Triton's own schema."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge_export import packing
from vggedge_export.packing import PackConfig, PackResult, build_tool_command, choose_engine, choose_graph, pack
from vggedge_export.packing_notes import describe_engine, describe_image
from vggedge_runtime.bundle import Bundle, hash_file, write_manifest
from vggedge_runtime.engine_cache import EngineKey, EngineRecord, list_engines, write_engine
from vggedge_runtime.errors import BundleError, EngineError, UsageError
from vggedge_runtime.preprocess import ImageSpec, Normalization

PLAN = b"ptrt" * 100
ORIN = ("Orin (8.7)",)
AHEAD = ("8.6", "12.0")


@pytest.fixture
def bundle(tiny: Any, tmp_path: Path) -> Bundle:
    found: Bundle = tiny(tmp_path / "tiny", ("fp32", "fp16", "int8", "int8-rtx"))
    return found


def add_engine(bundle: Bundle, graph: str = "fp16", **fields: Any) -> EngineRecord:
    """An engine whose plan is no plan: nothing here looks into it."""
    key = {
        "product": "tensorrt",
        "version": "10.3.0",
        "devices": ORIN,
        "graph": graph,
        "graph_sha256": bundle.manifest.files[bundle.graph(graph).file].sha256,
        "batches": (1, 1, 1),
        "options": {},
    }
    return write_engine(bundle.path, EngineKey(**(key | fields)), PLAN + graph.encode(), 1.0)


def run(bundle: Bundle, folder: Path, target: str, **choices: Any) -> PackResult:
    return pack(bundle, folder, PackConfig(target=target, **choices))


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- ONNX


def test_onnx_is_the_bundles_own_file_with_labels_and_notes(bundle: Bundle, tmp_path: Path) -> None:
    result = run(bundle, tmp_path / "out", "onnx")
    assert below(tmp_path / "out") == {"model.fp32.onnx", "labels.txt", "README.txt"}
    packed = tmp_path / "out/model.fp32.onnx"
    assert packed.read_bytes() == (bundle.path / "graphs/model.fp32.onnx").read_bytes()
    assert (tmp_path / "out/labels.txt").read_bytes() == (bundle.path / "labels.txt").read_bytes()
    assert (result.graph, result.engine, result.command) == ("fp32", None, None)
    assert {name: (each.sha256, each.size_bytes) for name, each in result.files.items()} == {
        name: (hash_file(tmp_path / "out" / name), (tmp_path / "out" / name).stat().st_size)
        for name in ("README.txt", "labels.txt", "model.fp32.onnx")
    }


def test_notes_say_contract_preparation_and_evidence(tiny: Any, tmp_path: Path) -> None:
    def change(manifest: Any) -> Any:
        normalization = Normalization(mean=(1.5, 2.0, 3.0), std=(4.0, 5.0, 6.0), order="bgr")
        image = ImageSpec(height=4, width=6, resize="crop", scale=8, kernel="bicubic", normalization=normalization)
        evidence = msgspec.structs.replace(
            manifest.graphs["fp32"].evidence, obtained="emulated", max_abs_difference=0.02
        )
        record = msgspec.structs.replace(manifest.graphs["fp32"], evidence=evidence)
        adaptations = ("a softmax,\nbecause it had none",)
        return msgspec.structs.replace(manifest, image=image, graphs={"fp32": record}, adaptations=adaptations)

    bundle = tiny(tmp_path / "tiny", change=change)
    run(bundle, tmp_path / "out", "onnx")
    text = " ".join((tmp_path / "out/README.txt").read_text().split())  # lines are wrapped
    for wanted in (
        "images: uint8 [N, 4, 6, 3], RGB, 0 to 255.",
        "probabilities: float32 [N, 3]",
        "centre of 4x6 at a shorter side of 8, with Pillow's bicubic kernel",
        "(pixel - mean) / std with mean 1.5, 2, 3 and std 4, 5, 6 for R, G, B; then it turns the channels round to BGR",
        "a softmax, because it had none",
        "Accuracy 100.00 % [43.9, 100.0] on 3 images, emulated: a twin",
        "Against keras: same top-1 class on 100.00 % [43.9, 100.0], a probability differs by at most 0.02.",
        "Keras model's accuracy: 100.00 %",
        "Latency: not measured.",
        bundle.manifest.files["graphs/model.fp32.onnx"].sha256,
    ):
        assert wanted in text


def test_image_without_normalization_says_that_none_is_wanted() -> None:
    lines = describe_image(ImageSpec(height=64, width=48))
    assert "stretched to 64x48" in lines[1]
    assert "Nothing is normalised outside." in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("precision", "graph"),
    [(None, "fp32"), ("fp16", "fp16"), ("int8", "int8"), ("int8-rtx", "int8-rtx")],
)
def test_a_graph_is_chosen_by_name_first(bundle: Bundle, precision: str | None, graph: str) -> None:
    assert choose_graph(bundle, precision) == graph


def test_a_graph_is_chosen_by_precision_where_only_one_has_it(tiny: Any, tmp_path: Path) -> None:
    assert choose_graph(tiny(tmp_path / "tiny", ("fp32", "mixed")), "int8") == "mixed"


def test_a_graph_is_not_guessed(tiny: Any, tmp_path: Path) -> None:
    mixed = tiny(tmp_path / "tiny", ("fp32", "mixed", "int8-rtx"))
    with pytest.raises(UsageError, match=r"several graphs are int8: mixed for ort; int8-rtx for ort\. Name one"):
        choose_graph(mixed, "int8")
    with pytest.raises(BundleError, match="no fp16 graph in this bundle; it has: fp32, mixed, int8-rtx"):
        choose_graph(mixed, "fp16")
    with pytest.raises(UsageError, match="precision 'fp8' is unknown"):
        choose_graph(mixed, "fp8")


# --- engines


def test_engine_comes_with_its_record_and_its_command(bundle: Bundle, tmp_path: Path) -> None:
    record = add_engine(bundle)
    result = run(bundle, tmp_path / "out", "engine")
    assert below(tmp_path / "out") == {"fp16.engine", "engine.json", "labels.txt", "README.txt"}
    assert (tmp_path / "out/fp16.engine").read_bytes() == PLAN + b"fp16"
    assert msgspec.json.decode((tmp_path / "out/engine.json").read_bytes(), type=EngineRecord) == record
    assert (result.graph, result.engine) == ("fp16", record.key.fingerprint)
    assert result.command == f"trtexec --loadEngine={tmp_path}/out/fp16.engine"
    notes = (tmp_path / "out/README.txt").read_text()
    assert "\n    trtexec --loadEngine=fp16.engine\n" in notes
    assert "fp16 for tensorrt 10.3.0 on Orin (8.7), batch 1;" in notes
    assert "N is 1: every inference takes exactly as many images." in notes
    assert record.sha256 in notes


@pytest.mark.parametrize(
    ("product", "batches", "command"),
    [
        ("tensorrt", (1, 1, 1), "trtexec '--loadEngine=a b/x.engine'"),
        ("tensorrt", (4, 4, 4), "trtexec '--loadEngine=a b/x.engine'"),
        ("tensorrt", (1, 2, 8), "trtexec '--loadEngine=a b/x.engine' --shapes=images:2x4x6x3"),
        ("tensorrt_rtx", (1, 1, 1), "tensorrt_rtx '--loadEngine=a b/x.engine'"),
        ("tensorrt_rtx", (1, 1, 4), "tensorrt_rtx '--loadEngine=a b/x.engine' --shapes=images:1x4x6x3"),
    ],
)
def test_command_names_the_products_tool_and_shapes_only_where_free(
    bundle: Bundle, product: str, batches: tuple[int, int, int], command: str
) -> None:
    record = add_engine(bundle, product=product, batches=batches)
    assert build_tool_command(record, "a b/x.engine", bundle.manifest.image.shape) == command


def test_an_engine_is_described_by_what_it_fits(bundle: Bundle) -> None:
    record = add_engine(bundle, product="tensorrt_rtx", version="1.7.1", devices=AHEAD, batches=(1, 4, 8))
    text = "fp16 for tensorrt_rtx 1.7.1 on compute capability 8.6, 12.0, batches 1 to 8, best 4"
    assert describe_engine(record) == text
    assert describe_engine(record, fingerprint=True) == f"{text} [{record.key.fingerprint}]"


def test_several_engines_are_told_apart_by_precision_or_fingerprint(bundle: Bundle) -> None:
    small, large = add_engine(bundle), add_engine(bundle, batches=(1, 4, 8))
    int8 = add_engine(bundle, "int8-rtx", product="tensorrt_rtx", devices=AHEAD)
    with pytest.raises(UsageError, match=r"several engines fit\. Choose with --precision") as error:
        choose_engine(bundle, PackConfig(target="engine"))
    assert all(f"[{each.key.fingerprint}]" in str(error.value) for each in (small, large, int8))
    assert choose_engine(bundle, PackConfig(target="engine", precision="int8")) == int8
    assert choose_engine(bundle, PackConfig(target="engine", precision="int8-rtx")) == int8
    with pytest.raises(UsageError, match="Choose with --engine and") as error:
        choose_engine(bundle, PackConfig(target="engine", precision="fp16"))
    assert int8.key.fingerprint not in str(error.value)
    config = PackConfig(target="engine", engine=large.key.fingerprint[:9])
    assert choose_engine(bundle, config) == large
    with pytest.raises(EngineError, match="no engine here is what you ask for; there are:\n  fp16 for"):
        choose_engine(bundle, PackConfig(target="engine", precision="fp32"))
    for choices, message in (
        ({"precision": "bogus"}, "precision 'bogus' is unknown"),
        ({"precision": ""}, "precision '' is unknown"),
        ({"engine": "zz"}, "--engine is 'zz'; needed are the first digits"),
        ({"engine": ""}, "--engine is ''"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_engine(bundle, PackConfig(target="engine", **choices))
    exact = add_engine(bundle, "int8")  # as precision both int8 engines would do
    assert choose_engine(bundle, PackConfig(target="engine", precision="int8")) == exact


def test_a_damaged_record_does_not_hide_the_other_engines(bundle: Bundle) -> None:
    whole, damaged = add_engine(bundle), add_engine(bundle, "int8-rtx", product="tensorrt_rtx", devices=AHEAD)
    (bundle.path / "engines" / damaged.key.fingerprint / "engine.json").write_text("x")
    assert choose_engine(bundle, PackConfig(target="engine")) == whole
    with pytest.raises(EngineError, match=f"{damaged.key.fingerprint}/engine.json: damaged"):
        choose_engine(bundle, PackConfig(target="engine", precision="int8"))


def test_without_an_engine_the_command_that_builds_one(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"no engine in this bundle. Build one with: vggedge build {bundle.path}"):
        run(bundle, tmp_path / "out", "engine")
    assert not (tmp_path / "out").exists()


def test_an_engine_of_another_graph_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    add_engine(bundle, graph_sha256="ab" * 32)
    with pytest.raises(EngineError, match="built from another graph fp16 than the bundle has"):
        run(bundle, tmp_path / "out", "engine")


def test_an_engine_of_an_unknown_product_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    add_engine(bundle, product="tensorrt_next")
    with pytest.raises(EngineError, match="is for the product 'tensorrt_next'"):
        run(bundle, tmp_path / "out", "engine")


def test_an_old_engine_record_is_packed(bundle: Bundle, tmp_path: Path) -> None:
    record = add_engine(bundle)
    path = bundle.path / "engines" / record.key.fingerprint / "engine.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({name: data[name] for name in ("key", "file", "sha256", "size_bytes", "build_seconds")}))
    run(bundle, tmp_path / "out", "engine")
    assert json.loads((tmp_path / "out/engine.json").read_text())["sha256"] == record.sha256


# --- Triton


def read_config(folder: Path) -> Any:
    """The config.pbtxt in ``folder``, by Triton's own schema, as plain data with the names of the schema."""
    pytest.importorskip("tritonclient.grpc", reason="Triton's schema comes with tritonclient[grpc]")
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    parsed = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    return json_format.MessageToDict(parsed, preserving_proto_field_name=True)


def warmup(batch: int) -> dict[str, Any]:
    sample = {"data_type": "TYPE_UINT8", "dims": ["4", "6", "3"], "zero_data": True}
    return {"name": f"batch {batch}", "batch_size": batch, "inputs": {"images": sample}}


COMMON = {
    "name": "tiny",
    "input": [{"name": "images", "data_type": "TYPE_UINT8", "dims": ["4", "6", "3"], "format": "FORMAT_NHWC"}],
    "output": [
        {"name": "probabilities", "data_type": "TYPE_FP32", "dims": ["3"], "label_filename": "labels.txt"},
    ],
    "version_policy": {"latest": {"num_versions": 1}},
}


def test_triton_repository_of_a_graph(bundle: Bundle, tmp_path: Path) -> None:
    result = run(bundle, tmp_path / "out", "triton")
    folder = tmp_path / "out/tiny"
    assert below(tmp_path / "out") == {"tiny", "tiny/config.pbtxt", "tiny/labels.txt", "tiny/1", "tiny/1/model.onnx"}
    assert (folder / "1/model.onnx").read_bytes() == (bundle.path / "graphs/model.fp32.onnx").read_bytes()
    assert (folder / "labels.txt").read_text() == "red\ngreen\nblue\n"
    assert result.command == f"tritonserver --model-repository={tmp_path / 'out'}"
    assert read_config(folder) == COMMON | {
        "backend": "onnxruntime",
        "max_batch_size": 8,
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "dynamic_batching": {"preferred_batch_size": [8], "max_queue_delay_microseconds": "100"},
        "model_warmup": [warmup(1), warmup(8)],
    }


def test_triton_choices(bundle: Bundle, tmp_path: Path) -> None:
    choices = {"precision": "int8-rtx", "model_name": "eyes-2.1", "max_batch": 3, "max_queue_delay_us": 0, "gpu": True}
    run(bundle, tmp_path / "out", "triton", **choices)
    assert (tmp_path / "out/eyes-2.1/1/model.onnx").read_bytes() == (
        bundle.path / "graphs/model.int8-rtx.onnx"
    ).read_bytes()
    found = read_config(tmp_path / "out/eyes-2.1")
    assert found["name"] == "eyes-2.1"
    assert found["max_batch_size"] == 3
    assert found["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    assert found["dynamic_batching"] == {"preferred_batch_size": [3]}  # a delay of 0 is the schema's default
    assert "max_queue_delay_microseconds: 0" in (tmp_path / "out/eyes-2.1/config.pbtxt").read_text()


def test_triton_with_batch_1_waits_for_nothing(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle, tmp_path / "out", "triton", max_batch=1)
    found = read_config(tmp_path / "out/tiny")
    assert "dynamic_batching" not in found
    assert found["model_warmup"] == [warmup(1)]
    with pytest.raises(UsageError, match="max_queue_delay_us is 5, and with a batch of 1 only nothing ever waits"):
        run(bundle, tmp_path / "other", "triton", max_batch=1, max_queue_delay_us=5)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("batches", "preferred", "warm"),
    [
        ((1, 4, 8), [4, 8], [1, 8]),
        ((1, 1, 8), [8], [1, 8]),
        ((1, 8, 8), [8], [1, 8]),
        ((1, 1, 1), None, [1]),
        ((4, 4, 4), None, [4]),
    ],
)
def test_triton_repository_of_an_engine(
    bundle: Bundle, tmp_path: Path, batches: tuple[int, int, int], preferred: list[int] | None, warm: list[int]
) -> None:
    add_engine(bundle, "int8-rtx", product="tensorrt_rtx", devices=AHEAD)  # in nobody's way
    add_engine(bundle, batches=batches)
    run(bundle, tmp_path / "out", "triton", platform="tensorrt")
    folder = tmp_path / "out/tiny"
    assert {path.name for path in (folder / "1").iterdir()} == {"model.plan"}
    assert (folder / "1/model.plan").read_bytes() == PLAN + b"fp16"
    batching = {"preferred_batch_size": preferred, "max_queue_delay_microseconds": "100"}
    assert read_config(folder) == COMMON | {
        "platform": "tensorrt_plan",
        "max_batch_size": batches[2],
        "instance_group": [{"count": 1, "kind": "KIND_GPU"}],
        "model_warmup": [warmup(batch) for batch in warm],
    } | ({} if preferred is None else {"dynamic_batching": batching})
    assert "# It is fp16 for tensorrt 10.3.0 on Orin (8.7)" in (folder / "config.pbtxt").read_text()


def test_triton_warms_up_with_what_the_packed_graph_takes(bundle: Bundle, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run(bundle, tmp_path / "out", "triton", max_batch=2)
    found = read_config(tmp_path / "out/tiny")
    session = onnxruntime.InferenceSession(tmp_path / "out/tiny/1/model.onnx", providers=["CPUExecutionProvider"])
    for sample in found["model_warmup"]:
        ((name, entry),) = sample["inputs"].items()
        shape = (sample["batch_size"], *map(int, entry["dims"]))
        (answer,) = session.run([found["output"][0]["name"]], {name: np.zeros(shape, np.uint8)})
        assert answer.shape == (sample["batch_size"], int(found["output"][0]["dims"][0]))
        assert answer.dtype == np.float32


def test_triton_has_no_backend_for_tensorrt_rtx(bundle: Bundle, tmp_path: Path) -> None:
    record = add_engine(bundle, product="tensorrt_rtx", devices=AHEAD)
    for choices in ({}, {"engine": record.key.fingerprint}, {"precision": "fp16"}):
        if choices:
            add_engine(bundle, "fp32")  # one that Triton runs, and not what is asked for
        with pytest.raises(EngineError, match="has no backend for TensorRT-RTX"):
            run(bundle, tmp_path / "out", "triton", platform="tensorrt", **choices)


def test_triton_forms_batches_from_1_on(bundle: Bundle, tmp_path: Path) -> None:
    add_engine(bundle, batches=(2, 4, 8))
    with pytest.raises(UsageError, match="takes batches from 2 to 8, and Triton forms batches from 1 on"):
        run(bundle, tmp_path / "out", "triton", platform="tensorrt")
    assert below(tmp_path) == {"tiny", *(f"tiny/{name}" for name in below(bundle.path))}


def test_no_text_of_the_manifest_gets_out_of_its_comment(tiny: Any, tmp_path: Path) -> None:
    bundle = tiny(
        tmp_path / "tiny",
        change=lambda manifest: msgspec.structs.replace(
            manifest, adaptations=('odd\nmax_batch_size: 99\r"\u2028x: 1',)
        ),
    )
    run(bundle, tmp_path / "out", "triton")
    assert read_config(tmp_path / "out/tiny")["max_batch_size"] == 8


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "-o", "two words", "", "ä"])
def test_a_name_that_is_no_folders_is_refused(tiny: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is none for Triton"):
        PackConfig(target="triton", model_name=name)
    bundle = tiny(tmp_path / "tiny", change=lambda manifest: msgspec.structs.replace(manifest, name=name))
    with pytest.raises(UsageError, match=r"is none for Triton.* with --name"):
        run(bundle, tmp_path / "out", "triton")
    run(bundle, tmp_path / "out", "triton", model_name="fine")
    assert (tmp_path / "out/fine/config.pbtxt").is_file()


# --- choices


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"target": "tflite"}, "target 'tflite' is unknown; known: triton, onnx, engine"),
        ({"target": "triton", "platform": "openvino"}, "platform 'openvino' is unknown"),
        ({"target": "triton", "max_batch": 0}, "max_batch is 0"),
        ({"target": "triton", "max_batch": 2**31}, "max_batch is 2147483648; needed is 1 to 2147483647"),
        ({"target": "triton", "max_queue_delay_us": 2**64}, "needed is 0 to 18446744073709551615"),
        ({"target": "triton", "max_queue_delay_us": -1}, "max_queue_delay_us is -1"),
        ({"target": "onnx", "engine": "ab"}, "engine: of no use to onnx"),
        ({"target": "triton", "engine": "ab"}, "engine: of no use to triton"),
        ({"target": "onnx", "platform": "tensorrt"}, "platform: of no use to onnx"),
        ({"target": "engine", "model_name": "x"}, "model_name: of no use to engine"),
        ({"target": "engine", "max_queue_delay_us": 0, "gpu": True}, "max_queue_delay_us, gpu: of no use to engine"),
        (
            {"target": "triton", "platform": "tensorrt", "max_batch": 2, "gpu": True},
            "max_batch, gpu: of no use to triton with platform tensorrt",
        ),
    ],
)
def test_a_choice_is_never_left_out_in_silence(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PackConfig(**choices)


# --- the folder


@pytest.fixture
def break_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **more: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "build_notes", stop)


@pytest.mark.parametrize("target", ["onnx", "engine", "triton"])
@pytest.mark.usefixtures("break_notes")
def test_nothing_is_left_when_it_is_stopped(bundle: Bundle, tmp_path: Path, target: str) -> None:
    add_engine(bundle)
    before = below(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, tmp_path / "new/deep/out", target)
    assert below(tmp_path) == before


@pytest.mark.usefixtures("break_notes")
def test_an_empty_folder_and_its_neighbours_stay_when_it_is_stopped(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "neighbour").touch()
    before = below(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, tmp_path / "out", "onnx")
    assert below(tmp_path) == before


@pytest.mark.parametrize("file", ["graphs/model.fp32.onnx", "engines"])
def test_what_was_changed_is_not_packed(bundle: Bundle, tmp_path: Path, file: str) -> None:
    record = add_engine(bundle)
    engine = file == "engines"
    path = bundle.path / (f"engines/{record.key.fingerprint}/fp16.engine" if engine else file)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = below(tmp_path)
    for target in ("engine", "triton") if engine else ("onnx", "triton"):
        platform = {"platform": "tensorrt"} if engine and target == "triton" else {}
        with pytest.raises(EngineError if engine else BundleError, match=r"changed|differs"):
            run(bundle, tmp_path / "out", target, **platform)
    assert below(tmp_path) == before


def test_a_copy_that_went_wrong_is_noticed(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.shutil, "copyfile", lambda source, target: Path(target).write_bytes(b"half"))
    with pytest.raises(BundleError, match="the copy is not what"):
        run(bundle, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_full(path: Path) -> None:
    path.mkdir()
    (path / "mine").touch()


def make_link(path: Path) -> None:
    path.symlink_to(path.parent)


@pytest.mark.parametrize("make", [make_file, make_full, make_link])
def test_what_is_in_use_is_left_alone(bundle: Bundle, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        run(bundle, tmp_path / "out", "onnx")
    assert bundle.path.is_dir()


def test_a_bundle_is_not_packed_into_itself(bundle: Bundle) -> None:
    for folder in (bundle.path / "packed", bundle.path / "graphs/deep"):
        with pytest.raises(UsageError, match="lies in the bundle"):
            run(bundle, folder, "onnx")
    assert not (bundle.path / "packed").exists()


def test_an_empty_folder_is_filled_and_readable_for_others(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mask = os.umask(0o022)
    try:
        run(bundle, tmp_path / "out", "triton")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out/tiny/1/model.onnx").stat().st_mode) == 0o644


def test_the_bundle_is_left_as_it_was(bundle: Bundle, tmp_path: Path) -> None:
    add_engine(bundle)
    before = {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")}
    for target in ("onnx", "engine", "triton"):
        run(bundle, tmp_path / target, target)
    assert {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")} == before
    assert len(list_engines(bundle.path)) == 1


def test_a_label_with_a_line_break_is_refused(tiny: Any, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "tiny", labels=("red", "gr\neen", "blue"))
    with pytest.raises(BundleError, match="a label has a line break"):
        run(bundle, tmp_path / "out", "onnx")


def test_a_bundle_from_before_newer_fields_is_packed(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.path / "manifest.json"
    path.unlink()
    write_manifest(bundle.path, bundle.manifest)
    data = json.loads(path.read_text())
    for record in data["graphs"].values():
        for name in ("layers", "calibration", "plan", "kept_fp32"):
            record.pop(name)
        for name in ("change", "classes", "flips"):
            record["evidence"].pop(name)
    for name in ("gate", "adaptations"):
        data.pop(name)
    path.write_text(json.dumps(data))
    old = Bundle.open(bundle.path)
    run(old, tmp_path / "onnx", "onnx")
    run(old, tmp_path / "triton", "triton")
    notes = (tmp_path / "onnx/README.txt").read_text()
    assert "Accuracy 100.00 %" in notes
    assert "lost" not in notes
