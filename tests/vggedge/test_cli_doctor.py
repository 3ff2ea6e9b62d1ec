from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from vggedge.cli import doctor
from vggedge_runtime.doctor import Clash, Diagnosis, Finding, Verdict
from vggedge_runtime.doctor.machine import Machine

CommandLine = Callable[..., tuple[object, str, str]]
ROOT = Path(__file__).parents[2]
BASE = ("numpy", "pillow", "msgspec", "typer")
START = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from vggedge.cli import main; main()"


def finding(name: str, status: str, **more: Any) -> Finding:
    return Finding(name=name, group="training", status=status, **more)  # type: ignore[arg-type]


def diagnosis(*findings: Finding, clashes: tuple[Clash, ...] = (), says: str = "yes") -> Diagnosis:
    return Diagnosis(
        quick=False,
        machine=Machine(architecture="x86_64", python="3.12.1"),
        findings=findings,
        clashes=clashes,
        requirements_checked=0,
        verdicts=(Verdict("train", says.startswith("yes"), says),),
    )


def requirement_names(name: str) -> Iterator[str]:
    """The distribution ``name`` and all that it needs here."""
    yield name
    for need in map(Requirement, importlib.metadata.requires(name) or []):
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield from requirement_names(need.name)


@pytest.fixture(scope="module")
def base_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An entry for sys.path that holds the base dependencies of vggedge, and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    for name in {each for base in BASE for each in requirement_names(base)}:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return os.pathsep.join(map(str, (folder, ROOT, ROOT / "runtime", ROOT / "export")))


def run_isolated(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``vggedge ARGUMENTS`` in a Python without site-packages."""
    command = [sys.executable, "-S", "-c", START, path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_with_the_base_dependencies_alone(base_only: str) -> None:
    ended = run_isolated(base_only, "doctor", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    parts = {each["name"]: each for each in found["findings"]}
    assert parts["NumPy"]["status"] == parts["Pillow"]["status"] == "ok"
    for name in ("TensorFlow", "Keras", "tf2onnx", "onnx", "ONNX Runtime", "h5py"):
        assert parts[name]["status"] == "missing", name
        assert parts[name]["add"].startswith("pip install 'vggedge[")
    says = {each["stage"]: each["says"] for each in found["verdicts"]}
    assert (
        says["export"].endswith("TensorFlow, Keras, tf2onnx, onnx, ONNX Runtime missing") or "Python" in says["export"]
    )
    assert says["run here"] == "no: ONNX Runtime missing"


def test_broken_libraries_are_findings_and_the_exit_code_is_0(base_only: str, tmp_path: Path) -> None:
    codes = {
        "onnxruntime": "import os; os._exit(5)",
        "tensorflow": "import ctypes; ctypes.string_at(0)",
        "keras": "raise RuntimeError('[bold]no[/]')",
        "openvino": "import sys; sys.exit('bye')",
        "onnx": "import time; time.sleep(600)",
    }
    for name, code in codes.items():
        (tmp_path / f"{name}.py").write_text(code)
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info/METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    ended = run_isolated(f"{tmp_path}{os.pathsep}{base_only}", "doctor", "--timeout", "2")
    assert ended.returncode == 0
    assert ended.stderr == "trying the libraries ...\n"
    for text in ("exit code 5", "SIGSEGV", "RuntimeError: [bold]no[/]", "SystemExit: bye", "not end within 2 s"):
        assert text in ended.stdout
    assert re.search(r"TensorFlow +broken +1\.0", ended.stdout)
    assert re.search(r"run here +no: ONNX Runtime broken", ended.stdout)


def test_here(command_line: CommandLine) -> None:
    code, out, err = command_line("doctor", "--quick")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert [each for each in ("This machine", "Training", "Export", "Engines", "Running") if each not in out] == []
    assert re.search(r"^run here +yes by the metadata, .*ONNX Runtime", out, re.MULTILINE)


def test_json_has_everything(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    clash = Clash("a 1 and b 2", "they clash.", "pip install c", "its issue 3")
    made = diagnosis(finding("Keras", "missing", without="no training", add="pip install it"), clashes=(clash,))
    monkeypatch.setattr(doctor, "diagnose", lambda **options: made)
    code, out, err = command_line("doctor", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["findings"][0]["add"] == "pip install it"
    assert found["clashes"] == [
        {"found": "a 1 and b 2", "problem": "they clash.", "cure": "pip install c", "source": "its issue 3"}
    ]
    assert found["verdicts"] == [{"stage": "train", "can": True, "says": "yes"}]


def test_options_arrive(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(doctor, "diagnose", lambda **options: given.append(options) or diagnosis())
    assert command_line("doctor", "--quick", "--timeout", "7", "--json")[0] == 0
    assert command_line("doctor", "--json")[0] == 0
    assert [(each["quick"], each["timeout_s"]) for each in given] == [(True, 7.0), (False, 30.0)]


class TestText:
    def show(self, made: Diagnosis, capsys: pytest.CaptureFixture[str]) -> str:
        doctor.print_diagnosis(made)
        return capsys.readouterr().out

    def test_what_is_fine_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.show(diagnosis(finding("Keras", "ok", found="3.15", details={"file": "hidden"})), capsys)
        assert re.search(r"^ +Keras +ok +3\.15 *$", out, re.MULTILINE)
        assert "Needs attention" not in out
        assert "Missing" not in out
        assert "hidden" not in out

    def test_what_is_missing_has_cost_and_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        add = "pip install 'vggedge[train]' --with-a-very-long-option" + "-x" * 60
        out = self.show(diagnosis(finding("Keras", "missing", without="no training", add=add)), capsys)
        assert "Missing\n  Keras: Without it: no training.\n" in out
        assert f"    To do: {add}\n" in out  # on one line, to be copied, however long

    def test_a_command_that_adds_several_parts_stands_there_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        parts = [finding("Keras", "missing", without="a", add="pip install x")]
        parts += [finding("onnx", "missing", without="b", add="pip install y")]
        parts += [finding("h5py", "missing", without="c", add="pip install x")]
        out = self.show(diagnosis(*parts), capsys)
        wanted = (
            "Missing\n  Keras: Without it: a.\n  h5py: Without it: c.\n    To do: pip install x\n"
            "  onnx: Without it: b.\n    To do: pip install y\n"
        )
        assert wanted in out

    def test_what_is_not_needed_says_why_in_its_row_only(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.show(diagnosis(finding("pycuda", "not needed here", reason="no GPU", without="nothing")), capsys)
        assert re.search(r"pycuda +not needed here +no GPU", out)
        assert "Without it" not in out

    def test_clashes_and_broken_parts(self, capsys: pytest.CaptureFixture[str]) -> None:
        broken = finding("onnx", "broken", found="1.2", reason="OSError: [libx] gone", advice="look at libx")
        clash = Clash("a 1 and b 2", "they clash.", "pip install 'c[d]'", "its issue 3")
        out = self.show(diagnosis(broken, clashes=(clash,), says="no: onnx broken"), capsys)
        assert "Needs attention\n  onnx: OSError: [libx] gone. Look at libx.\n" in out
        assert "  a 1 and b 2: They clash. Source: its issue 3\n    To do: pip install 'c[d]'\n" in out
        assert re.search(r"train +no: onnx broken", out)

    def test_it_fits_100_columns(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = "word " * 60
        made = diagnosis(
            finding("Keras", "broken", found=words, reason=words, without=words, details={"providers": words}),
            finding("onnx", "not needed here", reason=words),
            clashes=(Clash("a", words, "c", words),),
            says=f"yes {words}",
        )
        assert max(len(line) for line in self.show(made, capsys).splitlines()) <= 100


def test_ctrl_c_ends_the_imports_too(base_only: str, tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("import subprocess; subprocess.run(['sleep', '601.75'])")
    script = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{START}"
    path = f"{tmp_path}{os.pathsep}{base_only}"
    command = [sys.executable, "-S", "-c", script, path, "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not is_running(b"601.75") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert is_running(b"601.75")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "stopped by Ctrl-C" in err
    assert not is_running(b"601.75")


def is_running(argument: bytes) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"sleep\0" + argument):
                return True
        except OSError:  # it has ended meanwhile
            continue
    return False


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_json_that_cannot_be_written(base_only: str) -> None:
    command = [sys.executable, "-S", "-c", START, base_only, "doctor", "--quick", "--json"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert "No space left" in ended.stderr
