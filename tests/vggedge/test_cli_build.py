from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vggedge.cli import build
from vggedge_runtime.dependencies import is_installed
from vggedge_runtime.engine_cache import list_engines
from vggedge_runtime.errors import UsageError

pytest.importorskip("onnx")
FAKES = Path(__file__).parents[1] / "fakes"
needs_rtx = pytest.mark.skipif(not is_installed("tensorrt_rtx"), reason="TensorRT-RTX is not installed")
CommandLine = Callable[..., tuple[object, str, str]]


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAKES)
        from vgg_bundle import COMPACT, write_vgg_bundle

        return write_vgg_bundle(
            tmp_path_factory.mktemp("compact") / "vgg", ("fp32", "fp16", "int8", "int8-rtx"), **COMPACT
        )


@pytest.fixture
def bundle(compact: Path, tmp_path: Path) -> Path:
    """A copy of it whose graphs are links."""
    copy = tmp_path / "vgg"
    for file in compact.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(compact)).parent.mkdir(parents=True, exist_ok=True)
            os.link(file, copy / file.relative_to(compact))
    return copy


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``fake("10_3")``: the command finds that TensorRT and, in its child, a GPU."""

    def use(version: str, **answers: Any) -> None:
        for folder in (FAKES, FAKES / f"tensorrt_{version}", FAKES / "cuda"):
            monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        monkeypatch.setenv("FAKE_TENSORRT", json.dumps(answers))

    return use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "onnx"], "--for is 'onnx'; known: auto, tensorrt, rtx"),
        (["--batch", "1,8"], "--batch is '1,8'; needed is one number, or smallest,best,largest"),
        (["--batch", "two"], "--batch is 'two'"),
        (["--batch", "8,4,1"], "needed is 1 <= smallest <= best <= largest"),
        (["--batch", "0"], "batches are (0, 0, 0)"),
        (["--workspace", "much"], "--workspace is 'much'; needed is a size such as 512MB"),
        (["--workspace", "0GB"], "the workspace is 0 bytes"),
        (["--target", "ada"], "'ada': no compute capability"),
        (["--target", " , "], "--target is ' , '; needed is at least one name"),
        (["--precision", ""], "--precision is ''; needed is at least one name"),
        (["--batch", "2147483648"], "largest <= 2147483647"),
        (["--batch", "9" * 30], "largest <= 2147483647"),
        (["--workspace", "99999999999999999GB"], "no more than 64-bit numbers count"),
        (["--workspace", "9" * 400 + "GB"], "--workspace is '999"),
        (["--optimization-level", "9"], "level is 9; known: 0 to 5"),
        (["--keep-best", "0"], "best of 0 engines"),
        (["--keep-best", "2", "--timing-cache"], "nothing to compare"),
        (["--precision", "fp8", "--for", "rtx"], "precision 'fp8' is unknown"),
        (["--precision", "int8-rtx", "--for", "tensorrt"], "no int8-rtx graph for tensorrt in it"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    options: list[str], message: str, bundle: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "choose_builder", lambda product: "tensorrt" if product == "auto" else product)
    monkeypatch.setattr(build, "build_engines", lambda *_, **__: pytest.fail("the request was not refused"))
    code, out, err = command_line("build", bundle, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_what_is_no_bundle(tmp_path: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("build", tmp_path)
    assert (code, out) == (1, "")
    assert "no manifest.json in it" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MB", 512_000_000), ("2GB", 2 * 10**9), ("1.5 gb", 1_500_000_000), ("2GiB", 2**31), ("64k", 64_000), ("7", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert build._read_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 TB", "1e9", "2G iB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="such as 512MB"):
        build._read_size(text)


@needs_rtx
def test_ahead_of_time_for_rtx(bundle: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("build", bundle, "--for", "rtx", "--batch", "1,4,8", "--target", "8.9,12.0")
    assert code == 0
    assert "building tensorrt_rtx engines" in err
    assert "for 8.9, 12.0" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(" ") and "MB" in line}
    assert list(rows) == ["fp32", "fp16", "int8-rtx"]
    assert "15 of 15" in rows["int8-rtx"]
    assert "Engines were built, not run" in out
    records = list_engines(bundle)
    assert {record.key.batches for record in records} == {(1, 4, 8)}
    assert {record.key.devices for record in records} == {("8.9", "12.0")}
    code, out, _ = command_line("build", bundle, "--for", "rtx", "--batch", "1,4,8", "--target", "8.9,12.0", "--json")
    assert code == 0
    assert [each["was_there"] for each in json.loads(out)["engines"]] == [True] * 3
    code, out, _ = command_line("build", bundle, "--for", "rtx", "--precision", "fp16")
    assert out.count("there already") == 0  # static, and for every target
    code, out, _ = command_line("build", bundle, "--for", "rtx", "--precision", "fp16")
    assert out.count("there already") == 2  # in the table, and what that means
    assert "--force rebuilds" in out


@needs_rtx
def test_an_option_that_rtx_lacks_is_wrong_usage(bundle: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("build", bundle, "--for", "rtx", "--keep-best", "3")
    assert (code, out) == (2, "")
    assert "TensorRT has it: --for tensorrt, with a GPU" in err


@pytest.mark.parametrize("version", ["10_3", "11_4"])
def test_for_this_machine(version: str, fake: Callable[..., None], bundle: Path, command_line: CommandLine) -> None:
    fake(version, latencies_ms=[2.0, 1.0])
    options = ["--for", "tensorrt", "--workspace", "1GB", "--no-tf32", "--keep-best", "2"]
    code, out, err = command_line("build", bundle, *options)
    assert (code, err) == (0, "building tensorrt engines ...\n")
    assert f"Engines by tensorrt {version.replace('_', '.')}" in out
    assert "for Orin (8.7)" in out
    assert "fp16: the fastest was kept of 2.000, 1.000 ms." in out
    assert "not run" not in out
    for record in list_engines(bundle):
        assert record.key.options == {"tf32": "off", "workspace_bytes": "1000000000"}
    code, out, _ = command_line("build", bundle, "--for", "tensorrt", "--precision", "int8", "--json")
    assert code == 0
    built = json.loads(out)
    assert (built["product"], len(built["engines"])) == ("tensorrt", 1)
    assert built["engines"][0]["record"]["audit"]["convolutions"] == 13


def test_kernels_that_nothing_is_known_of_are_said(
    fake: Callable[..., None], bundle: Path, command_line: CommandLine
) -> None:
    fake("11_4", inspector="names")
    code, out, _ = command_line("build", bundle, "--for", "tensorrt", "--precision", "fp16")
    assert code == 0
    assert "Nothing is known of the kernels of fp16: tensorrt told no layers." in out


def test_a_killed_child_is_exit_code_1(fake: Callable[..., None], bundle: Path, command_line: CommandLine) -> None:
    fake("11_4", end="SIGKILL")
    code, out, err = command_line("build", bundle, "--for", "tensorrt")
    assert (code, out) == (1, "")
    assert "was killed while it built fp32" in err


@needs_rtx
def test_ctrl_c_is_exit_code_130_and_leaves_nothing(bundle: Path) -> None:
    script = """
import sys
from vggedge_export import building
building.BOOTSTRAP = building.BOOTSTRAP.replace("main()", '''
import time
from vggedge_export import engine
made = engine.build_monitor
engine.build_monitor = lambda trt, watch: made(trt, lambda share: (time.sleep(0.05), watch(share))[1])
main()
''')
from vggedge.cli import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, "build", str(bundle), "--for", "rtx"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert "building" in process.stderr.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)  # it is in the middle of the slow build
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout.read() == ""
        assert "stopped by Ctrl-C" in process.stderr.read()
    assert not (bundle / "engines").exists()
