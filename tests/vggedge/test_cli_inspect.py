from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vggedge.cli import output
from vggedge_runtime import inspection
from vggedge_runtime.bundle import Bundle, hash_file
from vggedge_runtime.engine_cache import EngineKey, write_engine
from vggedge_runtime.engine_layers import EngineAudit, EngineLayer
from vggedge_runtime.errors import EngineError
from vggedge_runtime.evidence import LayerRecord
from vggedge_runtime.inspection import Inspection, LayerListing

CommandLine = Callable[..., tuple[object, str, str]]

RUNTIME_TESTS = Path(__file__).parents[1] / "runtime"
WIDTH = 100  # columns


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise EngineError("no NVIDIA driver here")

    monkeypatch.setattr(inspection, "gpu_name", refuse)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A copy of the bundle that has every record and every field."""
    return Path(shutil.copytree(RUNTIME_TESTS / "fixtures/bundle_v1", tmp_path / "stored"))


def engine_of(bundle: Path) -> str:
    return next((bundle / "engines").iterdir()).name


def rows(out: str, title: str) -> list[list[str]]:
    """Cells of the table under ``title``, the head among them; columns are two blanks or more apart."""
    lines = out[out.index(title) :].splitlines()[2:]
    table = lines[: next(index for index, line in enumerate(lines) if index > 1 and not line.strip())]
    return [[cell for cell in line.strip().split("   ") if cell] for line in table if "─" not in line]


class TestTables:
    def test_what_is_in_the_bundle(self, stored: Path, command_line: CommandLine) -> None:
        code, out, err = command_line("inspect", stored)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0] == "tiny: 9 parameters, format version 1, made 2026-01-01T00:00:00+00:00"
        assert "Input: images, uint8 [N, 4, 6, 3], RGB, centre of 4x6 at a shorter side of 8 (bicubic)" in lines
        assert "Output: probabilities, float32 [N, 3]: cat, dog, Ärger ☂" in lines
        assert "Adapted: softmax added." in lines
        assert "Data, selection: selection, 7 images, sha256 00000000" in lines
        assert "Golden: golden/inputs.npy, answers of fp32, fp16, mixed-rtx" in lines
        assert "Tools: vggedge 0" in lines
        assert "fp16: 2 nodes: Conv 2" in lines
        assert any(line.startswith("mixed-rtx: 66.67 % of the multiply-accumulates in INT8") for line in lines)
        assert any(line.startswith("Gate, b: undecided: not enough images to decide") for line in lines)
        assert "Hashes: not checked; --verify does that." in lines

    def test_graphs(self, stored: Path, command_line: CommandLine) -> None:
        sha256 = hash_file(stored / "graphs/model.fp16.onnx")[:8]
        found = rows(command_line("inspect", stored)[1], "Graphs")
        assert [cell.strip() for cell in found[2]] == ["fp16", "graphs/model.fp16.onnx", "0.3 kB", sha256, "tensorrt"]
        assert [row[0].strip() for row in found] == ["graph", "fp32", "fp16", "mixed-rtx"]

    def test_proof(self, stored: Path, command_line: CommandLine) -> None:
        title = "Proof at export, on 40 images: fp32 against keras; fp16, mixed-rtx against fp32"
        found = rows(command_line("inspect", stored)[1], title)
        change = "-22.50 [-40.00, -7.50]"
        cells = [cell.strip() for cell in found[3]]
        assert cells == ["mixed-rtx", "emulated", "9.9e-01", "67.50 %", "65.00 % [49.5, 77.9]", change]

    def test_engines(self, stored: Path, command_line: CommandLine) -> None:
        out = command_line("inspect", stored)[1]
        found = rows(out, "Engines by tensorrt_rtx 1.7.1.116 for 8.6, 12.0")
        cells = [cell.strip() for cell in found[1]]
        assert cells == [engine_of(stored), "mixed-rtx", "1", "1", "0", "1 of 1", "0.0 kB", "unknown"]
        assert "Fits here: not known: no NVIDIA driver here" in out

    @pytest.mark.parametrize(("gpu", "fits"), [("RTX 5090 (12.0)", "yes"), ("GB10 (12.1)", "no")])
    def test_engines_where_a_gpu_is(
        self, gpu: str, fits: str, stored: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inspection, "gpu_name", lambda: gpu)
        monkeypatch.setattr(inspection, "load_tensorrt", lambda product: SimpleNamespace(version="1.7.1.116"))
        out = command_line("inspect", stored)[1]
        assert rows(out, "Engines by")[1][-1].strip() == fits
        assert f"Fits here: on {gpu}, at the best batch." in out
        reason = f"{engine_of(stored)} does not fit: device is 8.6, 12.0, needed is GB10 (12.1).\n"
        assert (reason in out) == (fits == "no")

    def test_no_engines(self, tiny_bundle: Path, command_line: CommandLine) -> None:
        out = command_line("inspect", tiny_bundle)[1]
        assert "Engines: none." in out
        assert "Gate: none; export was given no --max-drop." in out

    def test_an_engine_that_cannot_be_read_is_told_and_no_failure(
        self, stored: Path, command_line: CommandLine
    ) -> None:
        (stored / "engines" / engine_of(stored) / "engine.json").write_text("{")
        code, out, _ = command_line("inspect", stored)
        assert code == 0
        assert f"Engine that cannot be read: {stored}/engines/{engine_of(stored)}/engine.json: damaged" in out
        assert "Engines: none." not in out

    def test_many_labels(self, tmp_path: Path, command_line: CommandLine, tiny: Any) -> None:
        tiny(tmp_path / "many", labels=tuple(f"c{index}" for index in range(1000)))
        assert (
            ": c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 990 more\n" in command_line("inspect", tmp_path / "many")[1]
        )

    def test_a_bundle_from_before_evidence(self, tmp_path: Path, command_line: CommandLine) -> None:
        shutil.copy(RUNTIME_TESTS / "manifest_before_evidence.json", tmp_path / "manifest.json")
        code, out, _ = command_line("inspect", tmp_path)
        assert code == 0
        cells = [cell.strip() for cell in rows(out, "Proof at export, on 2,000 images")[2]]
        assert cells == ["int8", "measured", "5.4e-01", "99.75 %", "98.50 % [97.9, 98.9]"]


class TestWidth:
    """100 columns hold every table at its widest; a pipe shows how wide it would like to be."""

    def widest(self, bundle: Path, *options: str, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setattr(output, "print_line", lambda text="": None)  # text may be folded, tables may not
        code, out, _ = command_line("inspect", bundle, *options)
        assert code == 0
        assert "─" in out
        return max(len(line.rstrip()) for line in out.splitlines())

    def test_all_tables(
        self, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tiny: Any
    ) -> None:
        """As wide as it gets: the longest names, half a gigabyte, changes of two digits, three batches."""
        layers = tuple(
            LayerRecord(
                name="a_nested_model/with/long/names/" + name,
                op="Conv",
                precision="int8",
                macs=10**11,
                int8_magnitude=1.2345e-30,
                largest_output=-1.2345e-30,
                snr_db=-123.4,
            )
            for name in ("a", "b")
        )

        def widen(manifest: Any) -> Any:
            stored = Bundle.open(RUNTIME_TESTS / "fixtures/bundle_v1").manifest
            evidence = stored.graphs["mixed-rtx"].evidence
            assert evidence.change is not None
            change = msgspec.structs.replace(evidence.change, low=-40.25)
            wide = msgspec.structs.replace(
                manifest.graphs["mixed-rtx"],
                made_for=("ort", "tensorrt", "tensorrt_rtx"),
                evidence=msgspec.structs.replace(evidence, change=change, agreement=manifest.keras_accuracy),
                layers=layers,
            )
            return msgspec.structs.replace(manifest, graphs=manifest.graphs | {"mixed-rtx": wide})

        bundle = tiny(tmp_path / "wide", ("fp32", "mixed-rtx"), change=widen)
        source = tmp_path / "wide/manifest.json"
        data = json.loads(source.read_bytes())
        data["files"]["graphs/model.mixed-rtx.onnx"]["size_bytes"] = 553_430_000
        source.write_text(json.dumps(data))
        kernel = EngineLayer(
            name="__myl_CastTranMulAddMulMinMaxRounCastConc_myl0_0",
            kind="runtime_fusion",
            inputs=("UInt8", "Half"),
            weights=("Int8",),
            outputs=("Float",),
            nodes=("a_nested_model/block1_conv1/input_int8",) * 12,
        )
        known = json.loads(msgspec.json.encode(EMPTY_AUDIT)) | {"layers": [msgspec.to_builtins(kernel)] * 100}
        audit = msgspec.convert(known, EngineAudit)
        for number, each in enumerate((audit, None)):
            key = EngineKey(
                product="tensorrt_rtx",
                version="1.7.1.116",
                devices=("8.0", "8.6", "8.9", "12.0", "12.1"),
                graph="mixed-rtx",
                graph_sha256=bundle.manifest.files["graphs/model.mixed-rtx.onnx"].sha256,
                batches=(8, 16, 128),
                options={"number": str(number)},
            )
            folder = write_engine(tmp_path / "wide", key, b"plan", 1.0, each).key.fingerprint
            record = tmp_path / "wide/engines" / folder / "engine.json"
            record.write_text(json.dumps(json.loads(record.read_bytes()) | {"size_bytes": 277_120_000}))
        found = [
            self.widest(tmp_path / "wide", *options, command_line=command_line, monkeypatch=monkeypatch)
            for options in ((), ("--layers", "mixed-rtx"))
        ]
        assert max(found) <= WIDTH
        assert min(found) > 90  # else this is not as wide as it gets

    def test_the_old_one(self, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copy(RUNTIME_TESTS / "manifest_before_evidence.json", tmp_path / "manifest.json")
        assert self.widest(tmp_path, command_line=command_line, monkeypatch=monkeypatch) <= WIDTH


class TestLayers:
    def test_of_a_graph_and_its_engine(self, stored: Path, command_line: CommandLine) -> None:
        code, out, _ = command_line("inspect", stored, "--layers", "mixed-rtx")
        assert code == 0
        found = rows(out, "Layers of mixed-rtx, 10,000,000,012 multiply-accumulates an image")
        assert [cell.strip() for cell in found[1]] == ["conv", "Conv", "int8", "100.0%", "1.5", "7e+04", "-3.2"]
        assert [cell.strip() for cell in found[2]] == ["fc", "Gemm", "fp16", "0.0%", "-", "-", "-"]
        kernels = rows(out, f"Kernels of engine {engine_of(stored)}")
        assert [cell.strip() for cell in kernels[1]] == ["conv_U1", "correlation", "Int8", "Int8", "Half", "conv"]

    def test_of_an_engine(self, stored: Path, command_line: CommandLine) -> None:
        code, out, _ = command_line("inspect", stored, "--layers", engine_of(stored)[:6])
        assert code == 0
        assert "Layers of" not in out
        assert "conv_U1" in out

    def test_json(self, stored: Path, command_line: CommandLine) -> None:
        code, out, err = command_line("inspect", stored, "--layers", "mixed-rtx", "--json")
        assert (code, err) == (0, "")
        found = msgspec.json.decode(out, type=LayerListing)
        assert (found.graph, [layer.name for layer in found.layers]) == ("mixed-rtx", ["conv", "fc"])
        assert [kernel.name for kernel in found.engines[engine_of(stored)]] == ["conv_U1"]

    def test_an_unknown_name_is_wrong_usage(self, stored: Path, command_line: CommandLine) -> None:
        code, out, err = command_line("inspect", stored, "--layers", "int4")
        assert (code, out) == (2, "")
        assert f"which has: fp32, fp16, mixed-rtx, {engine_of(stored)}" in err

    def test_a_graph_that_says_nothing(self, tiny_bundle: Path, command_line: CommandLine) -> None:
        code, out, err = command_line("inspect", tiny_bundle, "--layers", "fp32")
        assert (code, out) == (1, "")
        assert "nothing of the layers of fp32" in err


class TestVerify:
    def test_all_right(self, stored: Path, command_line: CommandLine) -> None:
        code, out, err = command_line("inspect", stored, "--verify")
        assert code == 0
        assert out.endswith("Hashes: all right, of 9 files and 1 plans.\n")
        assert err == "checking hashes ...\n"

    @pytest.mark.parametrize("name", ["graphs/model.fp16.onnx", "plans/mixed-rtx.png", "{engine}/mixed-rtx.engine"])
    def test_a_changed_file_is_an_error_that_names_it(self, name: str, stored: Path, command_line: CommandLine) -> None:
        path = stored / name.format(engine=f"engines/{engine_of(stored)}")
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        assert command_line("inspect", stored)[0] == 0
        code, out, err = command_line("inspect", stored, "--verify")
        assert code == 1
        assert "Graphs" in out
        assert "Hashes" not in out
        assert f"error: {path}: " in err

    def test_json_has_the_damage_and_the_exit_code_tells(self, stored: Path, command_line: CommandLine) -> None:
        (stored / "labels.txt").unlink()
        code, out, err = command_line("inspect", stored, "--verify", "--json")
        assert code == 1
        found = msgspec.json.decode(out, type=Inspection)
        assert found.damaged == (
            f"{stored}/labels.txt: missing, though the manifest names it. Copy the whole bundle again.",
        )
        assert found.damaged[0] in err

    def test_an_engine_record_that_cannot_be_read_is_damage(self, stored: Path, command_line: CommandLine) -> None:
        (stored / "engines" / engine_of(stored) / "engine.json").write_text("{")
        code, _, err = command_line("inspect", stored, "--verify")
        assert code == 1
        assert "engine.json: damaged" in err


def test_json_has_all_of_the_manifest(stored: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("inspect", stored, "--json")
    assert (code, err) == (0, "")
    found = msgspec.json.decode(out, type=Inspection)
    assert found.manifest == Bundle.open(stored).manifest
    assert (found.bundle, found.damaged, list(found.engines)) == (str(stored), None, [engine_of(stored)])


def test_no_bundle(tmp_path: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("inspect", tmp_path)
    assert (code, out) == (1, "")
    assert "no manifest.json in it" in err


def test_needs_nothing_heavy(stored: Path) -> None:
    program = (
        "import sys\n"
        "heavy = sys.argv[2:]\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in heavy:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from vggedge.cli import main\n"
        "sys.argv = ['vggedge', 'inspect', sys.argv[1], '--verify']\n"
        "main()\n"
    )
    heavy = ("onnx", "onnxruntime", "tensorflow", "keras", "tf2onnx", "tensorrt", "tensorrt_rtx")
    command = [sys.executable, "-c", program, str(stored), *heavy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Output: probabilities, float32 [N, 3]" in done.stdout


EMPTY_AUDIT = EngineAudit(
    layers=(),
    convolutions=16,
    dense=0,
    int8=tuple(f"conv{index}" for index in range(16)),
    not_int8=(),
    untold=(),
    extra_kernels=18,
    extra_after={},
    quantizations=0,
    float_pools=0,
    float32_kernels=0,
    unasked_float32=(),
)
