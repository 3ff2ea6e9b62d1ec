from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from vggedge_runtime.doctor import Diagnosis, Finding, diagnose
from vggedge_runtime.doctor.clashes import RULES, Facts, Rule, find_clashes
from vggedge_runtime.doctor.findings import parse_version
from vggedge_runtime.doctor.jetson import Jetson, jetpack_of
from vggedge_runtime.doctor.libraries import LIBRARIES, PROBE_GROUPS, explain_error
from vggedge_runtime.doctor.machine import Gpu, Machine, read_machine
from vggedge_runtime.doctor.probing import probe_modules
from vggedge_runtime.doctor.requirements import Requirements, check_requirements, read_distributions
from vggedge_runtime.doctor.system import Output, run_tool

ROOT = Path(__file__).parents[2]
STDLIB = [entry for entry in sys.path if entry.startswith(sys.base_prefix) and "site-packages" not in entry]
NO_DRIVER = {"libcuda": "missing", "error": "libcuda.so.1: cannot open shared object file"}


def write_tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def install(folder: Path, name: str, version: str, *requires: str, code: str | None = None) -> None:
    """A distribution in ``folder``, as pip leaves it; with a module of that name where ``code`` is given."""
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {e}" for e in requires),
    ]
    write_tree(folder, {f"{name}-{version}.dist-info/METADATA": "\n".join(lines) + "\n"})
    if code is not None:
        write_tree(folder, {f"{name.replace('-', '_')}/__init__.py": code})


def tools(**outputs: tuple[int, str]) -> Callable[[Sequence[str]], Output | None]:
    """A machine whose tools print this: nvidia_smi, nvpmodel."""

    def run(command: Sequence[str]) -> Output | None:
        name = command[0].replace("-", "_")
        return Output(*outputs[name]) if name in outputs else None

    return run


def probe(tmp_path: Path, *groups: Sequence[str], timeout_s: float = 20.0) -> dict[str, str | None]:
    found = probe_modules(groups, path=[str(tmp_path), *STDLIB], timeout_s=timeout_s)
    return {name: each.error for name, each in found.items()}


class TestProbing:
    def test_a_module_that_works(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"good.py": "print('noise' * 9999)\n__version__ = '1.2'"})
        found = probe_modules([["good"]], path=[str(tmp_path), *STDLIB])["good"]
        assert (found.version, found.file, found.error) == ("1.2", str(tmp_path / "good.py"), None)
        assert found.tried
        assert not found.absent

    def test_missing_is_not_broken(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"half.py": "import surely_not_there"})
        found = probe_modules([["surely_not_there_either", "half"]], path=[str(tmp_path), *STDLIB])
        assert found["surely_not_there_either"].absent
        assert not found["half"].absent
        assert found["half"].error == "ModuleNotFoundError: No module named 'surely_not_there'"

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("raise ImportError('libnvinfer.so.10: cannot open')", "ImportError: libnvinfer.so.10: cannot open"),
            ("raise KeyboardInterrupt", "KeyboardInterrupt"),
            ("import sys; sys.exit(3)", "SystemExit: 3"),
            ("import os; os._exit(7)", "its import ends Python (exit code 7)."),
            ("import ctypes; ctypes.string_at(0)", "its import crashes Python (SIGSEGV)."),
            (
                "import os, sys; print('free(): invalid pointer', file=sys.stderr, flush=True); os.abort()",
                "its import crashes Python (SIGABRT). Its last words: free(): invalid pointer",
            ),
            (
                "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
                "its import crashes Python (SIGILL, an instruction that this processor does not have: built for "
                "another one).",
            ),
            ("import os; os.closerange(1, 3); raise ValueError('without streams')", "ValueError: without streams"),
            ("x = 1 +", "SyntaxError: invalid syntax (bad.py, line 1)"),
        ],
    )
    def test_what_an_import_can_do(self, code: str, reason: str, tmp_path: Path) -> None:
        write_tree(tmp_path, {"bad.py": code, "good.py": "", "last.py": ""})
        found = probe(tmp_path, ["good", "bad", "last"])
        assert found == {"good": None, "bad": reason, "last": None}

    def test_a_hanging_import_is_ended_with_what_it_started(self, tmp_path: Path) -> None:
        code = "import subprocess, sys, time\nsubprocess.Popen(['sleep', '600.25'])\ntime.sleep(600)"
        write_tree(tmp_path, {"bad.py": code, "good.py": ""})
        started = time.monotonic()
        assert probe(tmp_path, ["bad", "good"], ["good"], timeout_s=1.0) == {
            "bad": "its import did not end within 1 s",
            "good": None,
        }
        assert time.monotonic() - started < 10
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert b"sleep\0600.25\0" not in commands

    def test_a_long_reason_is_cut(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"bad.py": "raise ValueError('many\\nlines ' * 500)"})
        reason = probe(tmp_path, ["bad"])["bad"] or ""
        assert reason.startswith("ValueError: many lines many lines")
        assert len(reason) == 400

    def test_a_library_that_imports_but_does_not_answer(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"onnxruntime.py": "__version__ = '1'"})
        assert str(probe(tmp_path, ["onnxruntime"])["onnxruntime"]).startswith(
            "it imports, but does not answer: AttributeError:"
        )

    def test_without_a_python_to_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        found = probe_modules([["json", "os"]])
        assert not found["os"].tried
        assert "Python did not start" in str(found["json"].error)

    def test_progress_ends_at_the_total(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        write_tree(tmp_path, {"good.py": ""})
        path = [str(tmp_path), *STDLIB]
        probe_modules([["good"], ["json"]], path=path, progress=lambda done, total, what: seen.append((done, total)))
        assert seen[-1] == (2, 2)

    def test_every_library_is_tried(self) -> None:
        assert sorted(name for group in PROBE_GROUPS for name in group) == sorted(each.module for each in LIBRARIES)


ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nFeatures\t: fp asimd asimddp\n",
    "proc/meminfo": "MemTotal:        7802000 kB\nMemFree: 1 kB\nMemAvailable:    5452000 kB\n",
    "etc/os-release": 'ID=ubuntu\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=25W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n",
    "var/lib/dpkg/status": "Package: bash\nStatus: install ok installed\nVersion: 5.1\n\n"
    "Package: nvidia-jetpack\nStatus: install ok installed\nArchitecture: arm64\nVersion: 6.2+b77\n\n",
    "usr/local/cuda/version.json": '{\n "cuda" : {\n  "name" : "CUDA SDK",\n  "version" : "12.6.11"\n }\n}',
    "usr/lib/python3.10/dist-packages/tensorrt/__init__.py": "",
}
ORIN_DRIVER = {"libcuda": "found", "cuda": "12.6", "name": "Orin", "capability": "8.7"}
ORIN_TOOLS = tools(nvidia_smi=(0, "Orin (nvgpu), 540.4.0, [N/A], [N/A]\n"), nvpmodel=(0, "NV Power Mode: 25W\n1\n"))
DESKTOP = {
    "proc/cpuinfo": "processor : 0\nmodel name : AMD Ryzen 9 7950X\nflags : fpu avx avx2 avx512_vnni\n",
    "proc/meminfo": "MemTotal: 65536000 kB\nMemAvailable: 32768000 kB\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    "GCC version:  gcc version 13.3.0\n",
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
    "etc/os-release": "ID=ubuntu\nPRETTY_NAME=Ubuntu 24.04\n",
}
DESKTOP_DRIVER = {"libcuda": "found", "cuda": "12.8", "name": "NVIDIA GeForce RTX 4090", "capability": "8.9"}
DESKTOP_TOOLS = tools(nvidia_smi=(0, "NVIDIA GeForce RTX 4090, 570.86.15, 24564, 23120\nNVIDIA T4, 570.86.15, 9, 9\n"))


def by_name(found: Diagnosis) -> dict[str, Finding]:
    return {each.name: each for each in found.findings}


def look_at(
    tmp_path: Path,
    files: Mapping[str, str | bytes],
    run: Callable[[Sequence[str]], Output | None],
    driver: dict[str, str],
    architecture: str = "x86_64",
    python: str = "3.12.3",
) -> Diagnosis:
    """Diagnosis of a recorded machine whose libraries are those in ``tmp_path/libraries``, read as --quick does."""
    return diagnose(
        quick=True,
        root=write_tree(tmp_path / "root", files),
        run=run,
        driver=driver,
        path=[str(tmp_path / "libraries")],
        architecture=architecture,
        python=python,
    )


class TestMachines:
    def test_orin_with_jetpack_6(self, tmp_path: Path) -> None:
        found = look_at(tmp_path, ORIN, ORIN_TOOLS, ORIN_DRIVER, "aarch64", "3.10.12")
        machine, parts = found.machine, by_name(found)
        assert machine.jetson == Jetson(
            board="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            l4t="36.4.3",
            jetpack="6.2",
            power_mode="25W",
            best_mode=(2, "MAXN_SUPER"),
        )
        assert machine.available_bytes == 5452000 * 1024
        assert parts["GPU"].found == "Orin, compute capability 8.7"
        assert parts["GPU"].status == "ok"
        assert parts["NVIDIA driver"].found == "540.4.0"
        assert parts["CUDA"].found == "12.6 is the newest that the driver runs, toolkit 12.6.11"
        assert parts["power mode"].add == "sudo nvpmodel -m 2 && sudo jetson_clocks"
        assert parts["TensorFlow"].status == "not needed here"
        assert parts["TensorRT-RTX"].reason == "NVIDIA publishes it for x86-64 only"
        assert found.clashes == ()

    def test_jetpacks_tensorrt_out_of_sight(self, tmp_path: Path) -> None:
        part = by_name(look_at(tmp_path, ORIN, ORIN_TOOLS, ORIN_DRIVER, "aarch64", "3.10.12"))["TensorRT"]
        assert part.status == "missing"
        assert "usr/lib/python3.10/dist-packages, where this Python does not look" in str(part.reason)
        assert part.add == "python3.10 -m venv --system-site-packages NEW"

    def test_pycuda_on_a_jetson_does_not_bring_a_second_tensorrt(self) -> None:
        (pycuda,) = [each for each in LIBRARIES if each.name == "pycuda"]
        assert pycuda.add(machine(l4t="36.4.3")) == "pip install pycuda"
        assert pycuda.add(machine()) == "pip install 'vggedge[tensorrt]'"

    def test_orin_that_can_build(self, tmp_path: Path) -> None:
        install(tmp_path / "libraries", "tensorrt", "10.3.0")
        install(tmp_path / "libraries", "onnxruntime", "1.23.2")
        found = look_at(tmp_path, ORIN, ORIN_TOOLS, ORIN_DRIVER, "aarch64", "3.10.12")
        says = {each.stage: each.says for each in found.verdicts}
        assert says["build engines"].startswith("yes by the metadata, for this machine's Orin (TensorRT 10.3.0)")
        assert says["train"] == "no: Python 3.10.12; needed is 3.11 to 3.13"
        assert re.match("yes by the metadata, .*ONNX Runtime", says["run here"])
        assert {each.can for each in found.verdicts} == {None, False}  # read from metadata, so never a plain yes

    def test_thor_with_jetpack_7(self, tmp_path: Path) -> None:
        files = {
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
        }
        run = tools(nvidia_smi=(0, "NVIDIA Thor, 580.00, [N/A], [N/A]\n"), nvpmodel=(0, "NV Power Mode: MAXN\n0\n"))
        driver = {"libcuda": "found", "cuda": "13.0", "name": "NVIDIA Thor", "capability": "11.0"}
        found = look_at(tmp_path, files, run, driver, "aarch64")
        assert found.machine.jetson == Jetson(
            board="NVIDIA Jetson AGX Thor Developer Kit", l4t="38.2.0", jetpack="7.0", power_mode="MAXN"
        )
        parts = by_name(found)
        assert parts["GPU"].found == "NVIDIA Thor, compute capability 11.0"
        assert parts["power mode"].reason is None
        assert parts["TensorRT"].add == "sudo apt install nvidia-jetpack"

    def test_a_jetson_whose_nvpmodel_may_not_be_asked(self, tmp_path: Path) -> None:
        files = ORIN | {"var/lib/nvpmodel/status": "pmode:0002\n"}
        found = look_at(tmp_path, files, tools(nvpmodel=(1, "permission denied")), ORIN_DRIVER, "aarch64")
        assert found.machine.jetson is not None
        assert found.machine.jetson.power_mode == "MAXN_SUPER"
        assert found.machine.jetson.best_mode is None

    def test_a_container_on_a_jetson_without_the_nvidia_runtime(self, tmp_path: Path) -> None:
        files = {"proc/device-tree/model": ORIN["proc/device-tree/model"]}
        found = look_at(tmp_path, files, tools(), NO_DRIVER, "aarch64")
        gpu = by_name(found)["GPU"]
        assert gpu.status == "broken"
        assert "--runtime nvidia" in str(gpu.advice)
        assert by_name(found)["JetPack"].status == "unknown"

    def test_desktop(self, tmp_path: Path) -> None:
        install(tmp_path / "libraries", "tensorrt_rtx_cu13", "1.7.1.116")
        found = look_at(tmp_path, DESKTOP, DESKTOP_TOOLS, DESKTOP_DRIVER)
        parts = by_name(found)
        assert found.machine.jetson is None
        assert "Jetson" not in parts
        assert parts["GPU"].found == (
            "NVIDIA GeForce RTX 4090, compute capability 8.9, 22.6 GiB free of 24.0 GiB, and 1 more"
        )
        assert parts["NVIDIA driver"].found == "570.86.15"
        assert parts["CUDA"].found == "12.8 is the newest that the driver runs"
        assert str(parts["CPU"].found).startswith("AMD Ryzen 9 7950X, ")
        assert parts["TensorRT"].add == "pip install 'vggedge[tensorrt]'"
        assert [each.found for each in found.clashes] == ["tensorrt-rtx-cu13 1.7.1.116, and a driver for CUDA 12.8"]

    def test_no_gpu(self, tmp_path: Path) -> None:
        found = look_at(tmp_path, {"proc/meminfo": DESKTOP["proc/meminfo"]}, tools(), NO_DRIVER)
        parts = by_name(found)
        assert (parts["GPU"].status, parts["GPU"].reason) == ("missing", "no NVIDIA GPU")
        assert parts["NVIDIA driver"].status == parts["CUDA"].status == parts["TensorRT"].status == "not needed here"
        assert parts["TensorRT-RTX"].add == "pip install 'vggedge[rtx]'"
        assert found.machine.total_bytes == 65536000 * 1024
        assert all(each.can is False for each in found.verdicts)

    @pytest.mark.parametrize(
        ("files", "run", "driver", "status", "said"),
        [
            # NVIDIA's own words after an update without a reboot
            (
                DESKTOP,
                tools(nvidia_smi=(18, "Failed to initialize NVML: Driver/library version mismatch\nNVML 570.9\n")),
                {"libcuda": "found", "error": "finds no GPU"},
                "broken",
                "sudo reboot",
            ),
            (DESKTOP, DESKTOP_TOOLS, NO_DRIVER, "broken", "NVIDIA_DRIVER_CAPABILITIES"),
            (DESKTOP, tools(), NO_DRIVER, "broken", "--gpus all"),
            (DESKTOP, tools(), {"libcuda": "found", "error": "finds no GPU"}, "broken", "finds no GPU"),
            (DESKTOP, DESKTOP_TOOLS, {"libcuda": "found", "error": "no GPU"}, "broken", "unset CUDA_VISIBLE_DEVICES"),
            (
                DESKTOP,
                tools(),
                {"libcuda": "found", "error": "finds no GPU", "status": "802"},
                "broken",
                "(CUDA status 802) its fabric is not ready sudo systemctl start nvidia-fabricmanager",
            ),
            (DESKTOP, tools(nvidia_smi=(124, "did not answer within 8 s")), DESKTOP_DRIVER, "ok", ""),
            (
                {name: text for name, text in DESKTOP.items() if not name.startswith("proc/driver")},
                tools(),
                NO_DRIVER,
                "missing",
                "sudo ubuntu-drivers install",
            ),
        ],
    )
    def test_half_a_gpu(
        self,
        files: Mapping[str, str],
        run: Callable[[Sequence[str]], Output | None],
        driver: dict[str, str],
        status: str,
        said: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        gpu = by_name(look_at(tmp_path, files, run, driver))["GPU"]
        assert gpu.status == status
        assert said in f"{gpu.reason} {gpu.advice} {gpu.add}"

    def test_a_container_without_any_file(self, tmp_path: Path) -> None:
        found = look_at(tmp_path, {}, tools(), NO_DRIVER)
        parts = by_name(found)
        assert parts["memory"].status == parts["operating system"].status == "unknown"
        assert str(parts["CPU"].found).startswith("x86_64")

    @pytest.mark.parametrize(
        "junk",
        [
            b"",
            b"\xff\xfe\0\n",
            b":::\n= = =\n< POWER_MODEL ID= NAME= >",
            b"9" * 5000,  # more digits than Python makes a number of
            b"R9 REVISION: 9\npmode:9\n< POWER_MODEL ID=9 NAME=M >\nMemTotal: 9 kB\n".replace(b"9", b"9" * 5000),
        ],
        ids=["empty", "no UTF-8", "empty values", "digits", "huge numbers"],
    )
    def test_junk_in_every_file_and_tool(self, junk: bytes, tmp_path: Path) -> None:
        names = {*ORIN, *DESKTOP, "sys/fs/cgroup/memory.max", "sys/fs/cgroup/cpu.max", "var/lib/nvpmodel/status"}
        text = junk.decode("utf-8", "replace")
        run = tools(nvidia_smi=(0, text), nvpmodel=(0, text))
        assert look_at(tmp_path, dict.fromkeys(names, junk), run, {"libcuda": "found"}).verdicts

    def test_what_a_container_may_use(self, tmp_path: Path) -> None:
        limits = {
            "sys/fs/cgroup/memory.max": "2147483648\n",
            "sys/fs/cgroup/memory.current": "1073741824\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        }
        found = look_at(tmp_path, DESKTOP | limits, tools(), NO_DRIVER)
        assert (found.machine.total_bytes, found.machine.available_bytes) == (2**31, 2**30)
        assert found.machine.usable_cores == 1
        assert "vgg16" in str(by_name(found)["memory"].reason)

    def test_no_limit_is_no_limit(self, tmp_path: Path) -> None:
        limits = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}
        machine = read_machine(write_tree(tmp_path, DESKTOP | limits), tools(), driver=NO_DRIVER)
        assert machine.total_bytes == 65536000 * 1024
        assert (machine.usable_cores or 0) >= 1

    @pytest.mark.parametrize(
        ("l4t", "jetpack"),
        [
            ("36.4.0", "6.1"),
            ("36.4.3", "6.2"),
            ("36.4.4", "6.2.1"),
            ("36.4.99", "6.1"),
            ("38.2.1", "7.0"),
            ("38.4.0", "7.1"),
            ("39.2.0", "7.2"),
            ("32.7.1", "4.6"),
            ("28.2", None),
            ("", None),
        ],
    )
    def test_jetpack_of(self, l4t: str, jetpack: str | None) -> None:
        assert jetpack_of(l4t) == jetpack


class TestTools:
    def test_output_of_both_streams_and_code(self) -> None:
        assert run_tool(["sh", "-c", "echo out; echo err >&2; exit 9"]) == Output(9, "out\nerr\n")

    def test_no_such_tool(self) -> None:
        assert run_tool(["surely-no-such-tool"]) is None

    def test_a_tool_that_hangs(self) -> None:
        started = time.monotonic()
        command = ["sh", "-c", "sleep 60 & echo started; wait"]  # its child keeps what it prints to open
        assert run_tool(command, timeout_s=0.2) == Output(124, "sh did not answer within 0.2 s")
        assert time.monotonic() - started < 5


class TestLibraries:
    def examine(self, tmp_path: Path, *, quick: bool = False) -> Diagnosis:
        path = [str(tmp_path), *STDLIB]
        return diagnose(quick=quick, path=path, root=tmp_path / "root", run=tools(), driver=NO_DRIVER, timeout_s=3)

    def test_all_kinds_at_once(self, tmp_path: Path) -> None:
        install(tmp_path, "tensorflow", "2.21.0", code="import ctypes; ctypes.string_at(0)")
        install(tmp_path, "keras", "3.15", code="class backend:\n    def backend(): return 'tensorflow'")
        install(tmp_path, "h5py", "3.14", code="raise SystemExit('bye')")
        install(tmp_path, "onnx", "1.23.2", code="import time; time.sleep(600)")
        install(
            tmp_path, "onnxruntime", "1.32.0", code="def get_available_providers(): return ['CPUExecutionProvider']"
        )
        install(tmp_path, "tf2onnx", "1.17.0")
        install(tmp_path, "tensorrt_rtx_cu13", "1.7.1")
        code = "__version__ = '1.7.1'\nclass ComputeCapability: NONE, SM86, SM120 = 0, 86, 120"
        write_tree(tmp_path, {"tensorrt_rtx/__init__.py": code})
        found = self.examine(tmp_path)
        parts = by_name(found)
        wanted = {
            "TensorFlow": ("broken", "2.21.0", "pip install --force-reinstall --no-deps tensorflow"),
            "Keras": ("ok", "3.15", None),
            "h5py": ("broken", "3.14", "pip install --force-reinstall --no-deps h5py"),
            "onnx": ("broken", "1.23.2", "pip install --force-reinstall --no-deps onnx"),
            "tf2onnx": ("broken", "1.17.0", "pip install --force-reinstall --no-deps tf2onnx"),
            "ONNX Runtime": ("ok", "1.32.0", None),
            "TensorRT-RTX": ("ok", "1.7.1", None),
            "safetensors": ("missing", None, "pip install 'vggedge[train]'"),
        }
        assert {name: (parts[name].status, parts[name].found, parts[name].add) for name in wanted} == wanted
        assert "SIGSEGV" in str(parts["TensorFlow"].reason)
        assert "did not end within 3 s" in str(parts["onnx"].reason)
        assert "its files are gone" in str(parts["tf2onnx"].reason)
        says = {each.stage: each.says for each in found.verdicts}
        assert says["train"] == "no: TensorFlow broken"
        assert says["export"] == "no: TensorFlow, tf2onnx, onnx broken"
        assert "8.6, 12.0 (TensorRT-RTX)" in says["build engines"]
        assert says["run here"] == "yes, ONNX Runtime on the CPU"

    def test_one_defect_has_one_cure(self, tmp_path: Path) -> None:
        install(tmp_path, "tensorflow", "2.21.0", code="raise OSError('libtensorflow is damaged')")
        install(tmp_path, "keras", "3.15", code="import tensorflow")
        install(tmp_path, "tf2onnx", "1.17", code="raise ValueError('another reason')")
        parts = by_name(self.examine(tmp_path))
        assert parts["TensorFlow"].add == "pip install --force-reinstall --no-deps tensorflow"
        assert (parts["Keras"].status, parts["Keras"].add) == ("broken", None)
        assert parts["Keras"].reason == "TensorFlow, which it imports, is broken"
        assert parts["tf2onnx"].reason == "ValueError: another reason"

    def test_nothing_installed(self, tmp_path: Path) -> None:
        found = self.examine(tmp_path)
        assert {each.status for each in found.findings if each.group == "training"} == {"missing"}
        for each in found.findings:
            if each.status == "missing" and each.group != "machine":
                assert str(each.add).startswith("pip install ")
                assert each.without
        assert [each.can for each in found.verdicts] == [False] * 4
        assert found.verdicts[0].says == "no: TensorFlow, Keras missing"

    def test_quick_does_not_import(self, tmp_path: Path) -> None:
        for name in ("onnxruntime", "tensorflow", "keras"):
            install(tmp_path, name, "3.0", code=f"open({str(tmp_path / 'imported')!r}, 'w')")
        found = self.examine(tmp_path, quick=True)
        assert found.quick
        assert by_name(found)["TensorFlow"].status == "installed"
        assert found.verdicts[0].says == "yes by the metadata"
        assert found.verdicts[0].can is None
        assert not (tmp_path / "imported").exists()
        self.examine(tmp_path)
        assert (tmp_path / "imported").exists()

    def test_keras_on_another_backend(self, tmp_path: Path) -> None:
        install(
            tmp_path, "tensorflow", "2.21", code="class config:\n    def list_physical_devices(kind): return [kind]"
        )
        install(tmp_path, "keras", "3.15", code="class backend:\n    def backend(): return 'jax'")
        found = self.examine(tmp_path)
        assert found.verdicts[0].says == "no: Keras runs on jax; export KERAS_BACKEND=tensorflow"
        assert found.clashes[0].cure == "export KERAS_BACKEND=tensorflow"
        install(tmp_path, "keras", "3.15", code="class backend:\n    def backend(): return 'tensorflow'")
        assert self.examine(tmp_path).verdicts[0].says == "yes, on the GPU"

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            ("ImportError: libnvdla_compiler.so: cannot open shared object file", "libnvdla_compiler.so into the cont"),
            ("ImportError: libcuda.so.1: cannot open shared object file", "--runtime nvidia"),
            ("AttributeError: _ARRAY_API not found", "pip install 'numpy<2'"),
            ("TypeError: Descriptors cannot be created directly.", "pip install -U protobuf"),
            ("its import crashes Python (SIGILL, an", "AVX"),
            ("ImportError: libc.so.6: version `GLIBC_2.38' not found", "libc"),
            ("ModuleNotFoundError: No module named 'jax'", "export KERAS_BACKEND=tensorflow"),
        ],
    )
    def test_known_errors(self, error: str, said: str) -> None:
        assert said in " ".join(filter(None, explain_error(error)))

    def test_an_unknown_error(self) -> None:
        assert explain_error("ValueError: 42") == (None, None)

    def test_every_extra_that_is_advised_exists(self) -> None:
        tomllib = pytest.importorskip("tomllib")  # Python 3.11
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        commands = [str(each.add(Machine(architecture="x86_64", python="3.12"))) for each in LIBRARIES]
        for library, command in zip(LIBRARIES, commands, strict=True):
            if "[" not in command:
                continue
            extra = command.partition("[")[2].partition("]")[0]
            brought = " ".join(extras[extra])
            assert library.distributions[0].partition("-cu")[0] in brought, f"{command} does not bring {library.name}"


class TestRequirements:
    def check(self, folder: Path, *names: str) -> Requirements:
        return check_requirements(read_distributions([str(folder)]), names)

    def test_met_and_unmet(self, tmp_path: Path) -> None:
        install(tmp_path, "onnx", "1.23.2", "numpy>=1.23", "protobuf>=6.31.1", "absent; python_version < '3'")
        install(tmp_path, "numpy", "2.4.6")
        install(tmp_path, "protobuf", "5.29.0")
        found = self.check(tmp_path, "onnx")
        assert found.checked == 2
        assert [(each.by, each.needs, each.found) for each in found.unmet] == [
            ("onnx 1.23.2", "protobuf>=6.31.1", "5.29.0")
        ]

    def test_what_is_needed_by_what_is_needed(self, tmp_path: Path) -> None:
        install(tmp_path, "tensorflow", "2.21.0", "Keras_Thing>=1")
        install(tmp_path, "keras.thing", "1.0", "gone")
        (unmet,) = self.check(tmp_path, "tensorflow").unmet
        assert (unmet.by, unmet.needs, unmet.found) == ("keras-thing 1.0", "gone", None)

    def test_an_optional_library_may_be_missing_but_not_too_old(self, tmp_path: Path) -> None:
        install(
            tmp_path,
            "vggedge",
            "0.1",
            "onnx>=1; extra == 'a'",
            "tf2onnx>=1.17; extra == 'a'",
            "tf2onnx>=1.17; extra == 'b'",
        )
        install(tmp_path, "tf2onnx", "1.16.1", "surely-absent; extra == 'test'")
        assert [each.needs for each in self.check(tmp_path).unmet] == ["tf2onnx>=1.17"]

    def test_a_pre_release_counts(self, tmp_path: Path) -> None:
        install(tmp_path, "keras", "3.15", "numpy>=2")
        install(tmp_path, "numpy", "2.5.0rc1")
        assert self.check(tmp_path, "keras").unmet == ()

    def test_half_deleted_packages(self, tmp_path: Path) -> None:
        install(tmp_path, "keras", "3.15", "numpy", "not ! a requirement", "odd")
        install(tmp_path, "odd", "no version at all")
        write_tree(tmp_path, {"broken-1.dist-info/METADATA": "", "numpy-2.0.dist-info/RECORD": ""})
        assert [each.needs for each in self.check(tmp_path, "keras").unmet] == ["numpy"]

    def test_without_packaging(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "packaging.requirements", None)
        assert "packaging" in str(self.check(tmp_path, "keras").reason)

    def test_they_are_clashes(self, tmp_path: Path) -> None:
        install(tmp_path, "onnx", "1.23.2", "protobuf>=6.31.1")
        install(tmp_path, "protobuf", "5.29.0")
        facts = Facts(Machine(architecture="x86_64", python="3.12"))
        (clash,) = find_clashes(facts, self.check(tmp_path, "onnx"))
        assert (clash.found, clash.problem) == ("onnx 1.23.2", "it needs protobuf>=6.31.1; 5.29.0 is installed.")
        assert clash.cure == "pip install 'protobuf>=6.31.1'"


def machine(
    *,
    python: str = "3.12.1",
    cpu_features: tuple[str, ...] | None = ("avx",),
    l4t: str = "",
    board: str = "",
    **gpu: str,
) -> Machine:
    jetson = Jetson(board=board or None, l4t=l4t or None) if l4t or board else None
    return Machine(
        architecture="x86_64",
        python=python,
        cpu="Celeron",
        cpu_features=cpu_features,
        jetson=jetson,
        gpu=Gpu(has_libcuda=bool(gpu), name="GPU" if gpu else None, **gpu),  # type: ignore[arg-type]
    )


def answering(library: str, **details: str) -> dict[str, Finding]:
    return {library: Finding(name=library, group="engines", status="ok", details=details)}


RTX = answering("TensorRT-RTX", targets="7.5 8.6 8.9")
CASES: list[tuple[str, list[Facts], list[Facts]]] = [
    (
        "tested with Python 3.10 to 3.13",
        [Facts(machine(python="3.14.0")), Facts(machine(python="3.9.18"))],
        [Facts(machine(python="3.10.1")), Facts(machine(python="3.13.9"))],
    ),
    (
        "training and export need",
        [Facts(machine(python="3.10.12"))],
        [Facts(machine(python="3.11.0")), Facts(machine(python="3.10.12", l4t="36.4.3")), Facts(machine(python="3.9"))],
    ),
    (
        "does not know Keras 3",
        [Facts(machine(), {"tf2onnx": "1.16.1", "keras": "3.0.0"})],
        [
            Facts(machine(), {"tf2onnx": "1.17.0", "keras": "3.0.0"}),
            Facts(machine(), {"tf2onnx": "1.16.1", "keras": "2.15.0"}),
            Facts(machine(), {"keras": "3.0.0"}),
        ],
    ),
    (
        "compiled for NumPy 1",
        [Facts(machine(), {"onnxruntime": "1.18.1", "numpy": "2.0.0"})],
        [
            Facts(machine(), {"onnxruntime": "1.19.0", "numpy": "2.0.0"}),
            Facts(machine(), {"onnxruntime": "1.18.1", "numpy": "1.26.4"}),
        ],
    ),
    (
        "both install the same folder",
        [Facts(machine(), {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"})],
        [Facts(machine(), {"onnxruntime-gpu": "1.32.0"})],
    ),
    (
        "tensorflow backend",
        [Facts(machine(), {}, answering("Keras", backend="torch"))],
        [Facts(machine(), {}, answering("Keras", backend="tensorflow")), Facts(machine())],
    ),
    (
        "need AVX",
        [Facts(machine(cpu_features=("ssse3",)), {"tensorflow": "2.21.0"})],
        [
            Facts(machine(), {"tensorflow": "2.21.0"}),
            Facts(machine(cpu_features=()), {}),
            Facts(machine(cpu_features=None), {"tensorflow": "2.21.0"}),
        ],
    ),
    (
        "strongly typed engines",
        [Facts(machine(), {"tensorrt": "8.6.1"})],
        [Facts(machine(), {"tensorrt": "10.0.1"}), Facts(machine())],
    ),
    ("JetPack before 6", [Facts(machine(l4t="35.6.0"))], [Facts(machine(l4t="36.3.0")), Facts(machine())]),
    (
        "TensorRT 11 supports",
        [
            Facts(machine(l4t="36.4.3"), {"tensorrt": "11.4.1"}),
            Facts(machine(l4t="39.2.0"), {"tensorrt": "11.3.0"}),
        ],
        [
            Facts(machine(l4t="39.2.0"), {"tensorrt": "11.4.1"}),
            Facts(machine(l4t="36.4.3"), {"tensorrt": "10.3.0"}),
            Facts(machine(), {"tensorrt": "11.0.0"}),
        ],
    ),
    (
        "SBSA build",
        [
            Facts(machine(board="NVIDIA Jetson AGX Orin", l4t="39.2.0"), {"tensorrt": "10.13.3"}),
            Facts(machine(capability="8.7"), {"tensorrt": "10.13.3.9"}),
        ],
        [
            Facts(machine(board="NVIDIA Jetson AGX Thor", l4t="38.2.0"), {"tensorrt": "10.13.3"}),
            Facts(machine(capability="8.7"), {"tensorrt": "10.16.2"}),
        ],
    ),
    (
        "CUDA 13 needs driver 580",
        [Facts(machine(cuda="12.8"), {"tensorrt-rtx-cu13": "1.7.1"})],
        [
            Facts(machine(cuda="13.0"), {"tensorrt-rtx-cu13": "1.7.1"}),
            Facts(machine(), {"tensorrt-rtx-cu13": "1.7.1"}),
            Facts(machine(cuda="12.8"), {"tensorrt-cu12": "10.3"}),
        ],
    ),
    (
        "no target for that compute capability",
        [Facts(machine(capability="9.0"), {}, RTX)],
        [Facts(machine(capability="8.9"), {}, RTX), Facts(machine(), {}, RTX), Facts(machine(capability="9.0"))],
    ),
    (
        "INT8 graphs in FP16",
        [Facts(machine(capability="7.5"), {"tensorrt-rtx-cu13": "1.7.1"}, RTX)],
        [Facts(machine(capability="8.6"), {"tensorrt-rtx-cu13": "1.7.1"}, RTX), Facts(machine(capability="7.5"))],
    ),
]


class TestRules:
    def rule(self, problem: str) -> Rule:
        (found,) = [rule for rule in RULES if problem in rule.problem]
        return found

    @pytest.mark.parametrize(("problem", "clashing", "fine"), CASES, ids=[case[0] for case in CASES])
    def test_rule(self, problem: str, clashing: list[Facts], fine: list[Facts]) -> None:
        rule = self.rule(problem)
        assert [bool(rule.look(facts)) for facts in clashing] == [True] * len(clashing)
        assert [rule.look(facts) for facts in fine] == [None] * len(fine)
        found = [each for each in find_clashes(clashing[0], Requirements(0)) if each.problem == rule.problem]
        assert [(each.cure, each.source) for each in found] == [(rule.cure, rule.source)]

    def test_every_rule_has_a_case(self) -> None:
        assert [self.rule(problem) for problem, _, _ in CASES] == list(RULES)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("10.3.0", (10, 3)),
        ("1.7.1.116", (1, 7, 1, 116)),
        ("2.5.0rc1", (2, 5)),
        ("v4.0", (4,)),
        ("", ()),
        (None, ()),
        ("x", ()),
    ],
)
def test_parse_version(text: str | None, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers


def test_what_is_installed_here_works() -> None:
    """The real libraries: each answers the question of child.ASK, and none of their versions clash."""
    found = diagnose(timeout_s=120)
    installed = [each for each in found.findings if each.group != "machine" and each.found]
    assert {"NumPy", "Pillow", "requirements"} <= {each.name for each in installed}
    assert {each.name: each.reason for each in installed if each.status not in ("ok", "not needed here")} == {}
    assert found.requirements_checked > 5
