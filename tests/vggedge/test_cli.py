"""The entry point: exit codes, what goes to which stream, Ctrl-C and closed pipes."""

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
import typer

import vggedge
from vggedge.cli import models
from vggedge_runtime import errors

CommandLine = Callable[..., tuple[object, str, str]]


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``vggedge models`` end in ``error``."""

    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(models, "analyse", fail)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(option: str, command_line: CommandLine) -> None:
    code, out, err = command_line(option)
    assert (code, err) == (0, "")
    for name in ("models", "train", "export", "infer", "bench", "images"):
        assert f" {name} " in out


def test_version(command_line: CommandLine) -> None:
    assert command_line("--version") == (0, f"vggedge {vggedge.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["models", "--nope"], "No such option: --nope"),
        (["infer"], "Missing argument"),
        (["bench", "b", "--batch", "0"], "'--batch'"),
        (["bench", "b", "--seconds", "soon"], "'--seconds'"),
    ],
)
def test_usage_errors_show_the_usage(arguments: list[str], message: str, command_line: CommandLine) -> None:
    code, out, err = command_line(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: vggedge" in err
    assert message in err


def test_without_a_command_it_shows_help(command_line: CommandLine) -> None:
    code, out, err = command_line()
    assert code == 2
    assert "Commands" in out + err


@pytest.mark.parametrize("kind", [each for each in vars(errors).values() if isinstance(each, type)])
def test_own_errors_are_one_line_and_their_exit_code(
    kind: type[errors.VggedgeError], command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(kind("found [this], needed that"), monkeypatch)
    assert command_line("models") == (kind.exit_code, "", "error: found [this], needed that\n")


@pytest.mark.parametrize("code", [0, 1, 7])
def test_exit_codes_of_commands_are_kept(code: int, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(typer.Exit(code), monkeypatch)
    assert command_line("models") == (code, "", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_ctrl_c(error: BaseException, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(error, monkeypatch)
    code, out, err = command_line("models", "--json")
    assert (code, out) == (130, "")
    assert err.strip() == "error: stopped by Ctrl-C; nothing half-written was left behind."


def test_a_full_disk_is_the_systems_answer(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(OSError(28, "No space left on device", "model.onnx"), monkeypatch)
    code, out, err = command_line("models")
    assert (code, out) == (1, "")
    assert "No space left on device: 'model.onnx'" in err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(ZeroDivisionError("defect"), monkeypatch)
    monkeypatch.setattr(sys, "argv", ["vggedge", "models"])
    with pytest.raises(ZeroDivisionError, match="defect"):
        vggedge.cli.main()


def test_a_real_ctrl_c_in_the_middle_of_a_measurement(tiny_bundle: Path) -> None:
    # A parent that ignores SIGINT, such as a shell's background job, would pass that on.
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom vggedge.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "bench", str(tiny_bundle), "--seconds", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "measuring for 60 s" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err == "error: stopped by Ctrl-C; nothing half-written was left behind.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["models"],
        ["models", "--json"],
        ["models", "vgg16", "--layers"],
        ["images", "fingers:1", "-o", "{new}", "--json"],  # fits into a buffer, so it is written at the end
        ["--help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_a_reader_that_has_gone_is_no_error_to_show(arguments: list[str], tmp_path: Path) -> None:
    filled = [each.format(new=tmp_path / "new") for each in arguments]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "vggedge", *filled],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode == 1


def test_the_module_runs_as_the_script_does() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "vggedge", "models", "vgg16", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(ended.stdout)["parameters"] == 138_357_544
    assert ended.stderr == ""
