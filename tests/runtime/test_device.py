from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_runtime import device
from vggedge_runtime.device import describe_environment, describe_gpu, gpu_name, tool_versions
from vggedge_runtime.errors import EngineError


class FakeDriver:
    """The five calls of libcuda that gpu_name makes; the status of each can be set."""

    def __init__(self, gpu: bytes = b"Orin", capability: tuple[int, int] = (8, 7), **status: int) -> None:
        self.gpu, self.capability, self.status = gpu, capability, status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.status.get("init", 0)

    def cuDeviceGet(self, place: Any, ordinal: int) -> int:  # noqa: N802
        assert ordinal == 0
        place._obj.value = 5
        return self.status.get("get", 0)

    def cuDeviceGetName(self, buffer: Any, size: int, handle: Any) -> int:  # noqa: N802
        assert handle.value == 5
        buffer.value = self.gpu[: size - 1]
        return self.status.get("name", 0)

    def cuDeviceGetAttribute(self, place: Any, attribute: int, handle: Any) -> int:  # noqa: N802
        assert handle.value == 5
        place._obj.value = self.capability[{75: 0, 76: 1}[attribute]]
        return self.status.get("attribute", 0)


class TestGpuName:
    @pytest.mark.parametrize(
        ("driver", "name"),
        [
            (FakeDriver(), "Orin (8.7)"),
            (FakeDriver(b"NVIDIA GeForce RTX 5090", (12, 0)), "NVIDIA GeForce RTX 5090 (12.0)"),
        ],
    )
    def test_name_and_compute_capability(self, driver: FakeDriver, name: str) -> None:
        asked = []
        assert gpu_name(lambda library: asked.append(library) or driver) == name
        assert asked == ["libcuda.so.1"]

    def test_no_driver(self) -> None:
        def load(name: str) -> Any:
            raise OSError(f"{name}: cannot open shared object file")

        with pytest.raises(EngineError, match=r"no NVIDIA driver here \(libcuda\.so\.1: cannot open"):
            gpu_name(load)

    def test_a_real_library_that_is_not_there(self) -> None:
        with pytest.raises(EngineError, match="no NVIDIA driver here"):
            gpu_name(lambda name: ctypes.CDLL("libsurely-not-there.so.1"))

    @pytest.mark.parametrize("status", [{"init": 100}, {"init": 999}, {"get": 101}])
    def test_a_driver_without_gpu(self, status: dict[str, int]) -> None:
        with pytest.raises(EngineError, match="finds no GPU"):
            gpu_name(lambda name: FakeDriver(**status))

    @pytest.mark.parametrize("status", [{"name": 1}, {"attribute": 1}])
    def test_a_driver_that_does_not_answer(self, status: dict[str, int]) -> None:
        """An engine is filed under this name, so half a name is worse than none."""
        with pytest.raises(EngineError, match="does not say what the GPU is"):
            gpu_name(lambda name: FakeDriver(**status))


class DriverWithVersion(FakeDriver):
    def cuDriverGetVersion(self, place: Any) -> int:  # noqa: N802
        place._obj.value = 12060
        return self.status.get("version", 0)


class TestDescribeGpu:
    def test_all_of_it(self) -> None:
        found = describe_gpu(lambda library: DriverWithVersion(b"NVIDIA RTX (TM) 4000", (8, 9)))
        assert found == {"libcuda": "found", "cuda": "12.6", "name": "NVIDIA RTX (TM) 4000", "capability": "8.9"}

    def test_no_driver(self) -> None:
        found = describe_gpu(lambda name: ctypes.CDLL("libsurely-not-there.so.1"))
        assert found.pop("libcuda") == "missing"
        assert "libsurely-not-there" in found.pop("error")
        assert found == {}

    def test_a_driver_without_gpu_still_has_a_version(self) -> None:
        found = describe_gpu(lambda name: DriverWithVersion(init=803))
        assert found.pop("error") == "the NVIDIA driver is installed but finds no GPU"
        assert found == {"libcuda": "found", "cuda": "12.6", "status": "803"}

    def test_a_version_that_the_driver_does_not_say(self) -> None:
        assert "cuda" not in describe_gpu(lambda name: DriverWithVersion(version=1))


class TestEnvironment:
    def files(self, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
        """Let the two files about the processor have these texts, or not be there."""

        def read_text(self: Path, *arguments: Any, **options: Any) -> str:
            name = {"/proc/device-tree/model": "board", "/proc/cpuinfo": "cpuinfo"}[str(self)]
            if name not in texts:
                raise FileNotFoundError(str(self))
            return texts[name]

        monkeypatch.setattr(Path, "read_text", read_text)

    def test_a_jetson_is_its_board(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files(monkeypatch, board="NVIDIA Jetson Orin Nano\0", cpuinfo="model name : ARMv8\n")
        assert device._cpu_name() == "NVIDIA Jetson Orin Nano"

    def test_a_pc_is_its_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files(monkeypatch, cpuinfo="processor\t: 0\nmodel name\t: A: B CPU @ 3 GHz\nmodel name\t: second\n")
        assert device._cpu_name() == "A: B CPU @ 3 GHz"

    @pytest.mark.parametrize("texts", [{}, {"cpuinfo": "processor : 0\n"}])
    def test_what_python_knows_is_the_last_resort(self, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.files(monkeypatch, **texts)
        monkeypatch.setattr(platform, "processor", lambda: "")
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
        assert device._cpu_name() == "riscv64"

    def test_here(self) -> None:
        found = describe_environment()
        assert found["numpy"] == np.__version__
        assert found["python"] == platform.python_version()
        assert int(found["cores"]) >= 1
        assert found["cpu"]
        assert all(isinstance(value, str) for value in found.values())

    def test_versions_of_what_is_installed_only(self) -> None:
        assert tool_versions("numpy", "surely-not-installed") == {"numpy": np.__version__}
