from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from vggedge_export.reproof import Reproof
from vggedge_runtime.bundle import write_manifest
from vggedge_runtime.statistics import build_proportion

CommandLine = Callable[..., tuple[object, str, str]]
LABELS = ("a-red", "b-green", "c-blue")
COLOURS = ((250, 0, 0), (150, 250, 0), (0, 0, 250))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four 60x40 pictures a colour; of the green ones a graph that sees half the green is wrong."""
    for label, colour in zip(LABELS, COLOURS, strict=True):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(4):
            shade = tuple(max(0, part - number) for part in colour)  # no two are equal
            Image.new("RGB", (60, 40), shade).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def make_bundle(tiny: Any, tmp_path: Path) -> Callable[..., Path]:
    """``make_bundle("int8", emulated="fp16")``: fp32 sees all colours, the graphs named see half the green.

    Their manifest is as before fields on change, layers and gate came.
    """

    def make(*names: str, emulated: str = "", **fields: Any) -> Path:
        folder = tmp_path / "bundle"
        good = tiny(folder, ("fp32", *names), labels=LABELS)
        half = np.diag([1.0, 0.5, 1.0]) * 0.05
        other = tiny(tmp_path / "other", weights=half, labels=LABELS).path
        golden = np.load(folder / "golden/inputs.npy").astype(np.float64).mean(axis=(1, 2)) @ half
        powers = np.exp(golden - golden.max(axis=1, keepdims=True))
        records = dict(good.manifest.graphs)
        for name in names:
            (folder / f"graphs/model.{name}.onnx").write_bytes((other / "graphs/model.fp32.onnx").read_bytes())
            np.save(
                folder / f"golden/outputs.{name}.npy", (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
            )
            obtained = "emulated" if name == emulated else "measured"
            evidence = msgspec.structs.replace(records[name].evidence, obtained=obtained)
            records[name] = msgspec.structs.replace(records[name], evidence=evidence)
        (folder / "manifest.json").unlink()
        write_manifest(folder, msgspec.structs.replace(good.manifest, graphs=records))
        manifest = json.loads((folder / "manifest.json").read_text())
        for record in manifest["graphs"].values():
            for name in ("layers", "calibration", "plan", "kept_fp32"):
                record.pop(name)
            for name in ("change", "classes", "flips"):
                record["evidence"].pop(name)
        manifest.pop("gate")
        (folder / "manifest.json").write_text(json.dumps(manifest | fields))
        return folder

    return make


def decode(out: str) -> Reproof:
    return msgspec.json.decode(out, type=Reproof)


def test_json(make_bundle: Any, photos: Path, command_line: CommandLine) -> None:
    bundle = make_bundle("int8")
    code, out, err = command_line("verify", bundle, photos, "--json")
    assert (code, err) == (0, "")
    result = decode(out)
    assert (result.bundle, result.data.name, result.data.images) == (str(bundle), str(photos), 12)
    assert (result.limit, result.used_for) == (None, None)
    fp32, int8 = result.graphs
    assert (fp32.name, fp32.accuracy) == ("fp32", build_proportion(12, 12))
    assert int8.accuracy == build_proportion(8, 12)
    assert int8.comparison is not None
    assert int8.comparison.change is not None
    assert (int8.comparison.change.lost, int8.comparison.change.gained, int8.comparison.change.n) == (4, 0, 12)
    assert {flip.image for flip in int8.flips} == {str(photos / "b-green" / f"{number}.png") for number in range(4)}
    assert {(flip.true, flip.reference, flip.candidate) for flip in int8.flips} == {("b-green", "b-green", "a-red")}


def test_tables(make_bundle: Any, photos: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("verify", make_bundle("int8"), photos)
    assert code == 0
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "fp32 measured on ort 100.00 % [75.8, 100.0] 100.00 %" in rows
    assert any(row.startswith("int8 measured on ort 66.67 % 66.67 % [39.1, 86.2] -33.33 [") for row in rows)
    assert "int8: images answered otherwise than by fp32: 4, of which 4 lost and 0 gained" in out
    assert "int8: fewer right answers than fp32 in the classes b-green (4 to 0 of 4)." in rows
    assert "Manifest: proved on another set, some of whose images may be among these; its intervals and " in out
    assert any(row.endswith(f"{photos / 'b-green' / '0.png'}") and "a-red" in row for row in rows)
    assert "Nothing was judged" in out
    assert "Emulated" not in out
    for step in ("checking files", "reading images", "proving fp32", "proving int8"):
        assert step in err


def test_at_most_five_flips_a_graph_in_the_table(make_bundle: Any, photos: Path, command_line: CommandLine) -> None:
    for number in range(4, 7):
        Image.new("RGB", (60, 40), (150, 250 - number, 0)).save(photos / "b-green" / f"{number}.png")
    bundle = make_bundle("int8")
    assert command_line("verify", bundle, photos)[1].count(".png") == 5
    assert len(decode(command_line("verify", bundle, photos, "--json")[1]).graphs[1].flips) == 7


def test_files_are_right_where_images_were_taken(make_bundle: Any, photos: Path, command_line: CommandLine) -> None:
    bundle = make_bundle("int8")
    found = set()
    for seed in range(4):
        out = command_line("verify", bundle, photos, "--images", 6, "--seed", seed, "--json")[1]
        result = decode(out)
        assert result.data.images == 6
        files = {Path(flip.image) for flip in result.graphs[1].flips}
        assert len(files) == 2  # of every class two
        assert {file.parent for file in files} == {photos / "b-green"}
        found |= files
    assert len(found) > 2


class TestGate:
    def test_not_met_is_exit_code_3_after_the_tables(
        self, make_bundle: Any, photos: Path, command_line: CommandLine
    ) -> None:
        bundle = make_bundle("int8")
        code, out, err = command_line("verify", bundle, photos, "--max-drop", 1)
        assert code == 3
        assert "Limit: at most 1 points lost against fp32 (--max-drop)." in out
        assert "Gate, int8: fails: loses 33.33 points, at least " in out
        assert "error: needed is that every graph loses at most 1 points against fp32: int8 loses more." in err
        code, out, _ = command_line("verify", bundle, photos, "--max-drop", 1, "--json")
        assert code == 3
        verdict = decode(out).graphs[1].verdict
        assert verdict is not None
        assert (verdict.decision, verdict.max_drop) == ("fail", 1)

    def test_met(self, make_bundle: Any, photos: Path, command_line: CommandLine) -> None:
        code, out, _ = command_line("verify", make_bundle("int8"), photos, "--max-drop", 90)
        assert (code, "Gate, int8: passes: " in out) == (0, True)

    def test_undecided(self, make_bundle: Any, photos: Path, command_line: CommandLine) -> None:
        bundle = make_bundle("int8")
        code, out, err = command_line("verify", bundle, photos, "--max-drop", 30)
        assert (code, "Gate, int8: undecided: not enough images" in out) == (3, True)
        assert "too few to tell" in err
        code, out, err = command_line("verify", bundle, photos, "--max-drop", 30, "--accept-undecided")
        assert (code, "Gate, int8: let through undecided: not enough images" in out) == (0, True)
        assert "error" not in err

    def test_that_of_the_export(self, make_bundle: Any, photos: Path, command_line: CommandLine) -> None:
        bundle = make_bundle("int8", gate={"max_drop": 0.5, "accept_undecided": False, "verdicts": {}})
        code, out, _ = command_line("verify", bundle, photos)
        assert code == 3
        assert "Limit: at most 0.5 points lost against fp32 (of the export, as the manifest says)." in out


def run_without(blocked: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``vggedge ARGUMENTS...`` in a new Python in which the libraries ``blocked`` cannot be imported."""
    script = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

blocked = sys.argv.pop(1).split(",")
sys.meta_path.insert(0, Blocker())
from vggedge.cli import main
main()
"""
    command = [sys.executable, "-c", script, blocked, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("limit", "code"), [((), 0), (("--max-drop", 100), 3)])
def test_with_nothing_but_onnxruntime(limit: tuple[object, ...], code: int, make_bundle: Any, photos: Path) -> None:
    bundle = make_bundle("fp16", "int8", emulated="fp16")
    blocked = "tensorflow,keras,onnx,tf2onnx,tensorrt,tensorrt_rtx,pycuda,matplotlib,sklearn"
    ended = run_without(blocked, "verify", bundle, photos, "--json", *limit)
    assert ended.returncode == code, ended.stderr
    fp32, fp16, int8 = decode(ended.stdout).graphs
    assert fp32.accuracy == build_proportion(12, 12)
    assert int8.accuracy == build_proportion(8, 12)
    assert (fp16.accuracy, fp16.verdict) == (None, None)
    assert fp16.not_proved is not None
    assert "Install it with: pip install 'vggedge[export]'" in fp16.not_proved
    assert ("fp16 could not be proved here" in ended.stderr) == (code == 3)


def test_a_graph_that_is_not_proved_is_shown(
    make_bundle: Any, photos: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle("fp16", emulated="fp16")
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, out, _ = command_line("verify", bundle, photos, "--max-drop", 100)
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 3
    assert "fp16 not proved 100.00 %" in rows
    assert any(row.startswith("fp16: not proved: backend ort computes its FP16 tensors in FP32") for row in rows)
    assert "Gate, fp16: not met: it could not be proved here." in rows


@pytest.mark.parametrize("use", ["evaluation", "calibration"])
def test_images_that_the_export_used(use: str, make_bundle: Any, photos: Path, command_line: CommandLine) -> None:
    bundle = make_bundle("int8")
    data = decode(command_line("verify", bundle, photos, "--json")[1]).data
    bundle = make_bundle("int8", data={use: msgspec.to_builtins(data)})
    out = command_line("verify", bundle, photos)[1]
    # the tiny bundle's manifest has 3 right answers of 3
    very = "Manifest: proved on these very images; right answers here against there: fp32 +9, int8 +5." in out
    tuned = "These very images set the INT8 ranges at export" in out
    assert (very, tuned) == (use == "evaluation", use == "calibration")


@pytest.mark.parametrize("name", ["labels.txt", "graphs/model.int8.onnx", "golden/inputs.npy"])
def test_a_damaged_file_is_named(name: str, make_bundle: Any, photos: Path, command_line: CommandLine) -> None:
    bundle = make_bundle("int8")
    path = bundle / name
    path.write_bytes(path.read_bytes() + b" ")
    code, out, err = command_line("verify", bundle, photos, "--precision", "fp32")  # of a graph not asked for, too
    assert (code, out) == (1, "")
    assert f"{path}: its content is not what export wrote" in err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--precision", "fp8"), 2, "precision 'fp8' is unknown"),
        (("--precision", ","), 2, "no precision is named"),
        (("--precision", "fp16"), 1, "no fp16 graph in this bundle"),
        (("--backend", "abacus"), 2, "backend 'abacus' is unknown"),
        (("--images", "0"), 2, "--images"),
        (("--max-drop", "101"), 2, "needed are above 0 to 100 points"),
        (("--accept-undecided",), 2, "sets a limit to decide on"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...], code: int, message: str, make_bundle: Any, photos: Path, command_line: CommandLine
) -> None:
    found, out, err = command_line("verify", make_bundle("int8"), photos, *options)
    assert (found, out) == (code, "")
    assert message in err


def test_other_classes(tiny_bundle: Path, photos: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("verify", tiny_bundle, photos)
    assert (code, out) == (2, "")
    assert "was trained on the classes red, green, blue, the data has a-red, b-green, c-blue" in err


def test_no_bundle(photos: Path, command_line: CommandLine) -> None:
    code, _, err = command_line("verify", photos, photos)
    assert (code, "this is no bundle" in err) == (1, True)
