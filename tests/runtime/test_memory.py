from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vggedge_runtime.errors import EngineError
from vggedge_runtime.memory import read_free_memory


def make_root(folder: Path, available_kib: int | None = 4_000_000) -> Path:
    (folder / "proc").mkdir()
    line = "" if available_kib is None else f"MemAvailable:    {available_kib} kB\n"
    (folder / "proc/meminfo").write_text(
        f"MemTotal:  8000000 kB\nMemFree:  100000 kB\n{line}SwapFree:  1000 kB\nHugePages_Total:  0\n"
    )
    return folder


def no_driver(name: str) -> Any:
    raise OSError("none")


class Driver:
    """libcuda of a machine with a GPU of 6 GB free; ``fails`` names the call that does not succeed."""

    def __init__(self, integrated: bool = False, fails: str = "") -> None:
        self.calls: list[str] = []
        self._integrated, self._fails = integrated, fails

    def __call__(self, library: str) -> Driver:
        assert library == "libcuda.so.1"
        return self

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self._fails:
                return 1
            if name == "cuDeviceGetAttribute":
                assert arguments[1] == 18
                arguments[0]._obj.value = int(self._integrated)
            if name == "cuMemGetInfo_v2":
                assert self.calls.count("cuCtxPushCurrent_v2") == 1
                arguments[0]._obj.value = 6_000_000_000
            return 0

        return call


def test_without_a_driver_there_is_the_hosts_memory(tmp_path: Path) -> None:
    assert read_free_memory(no_driver, make_root(tmp_path)) == (4_096_000_000, None, False, 1_024_000)


def test_a_driver_without_a_gpu_is_none(tmp_path: Path) -> None:
    assert read_free_memory(Driver(fails="cuInit"), make_root(tmp_path)) == (4_096_000_000, None, False, 1_024_000)


def test_a_card_has_memory_of_its_own_and_the_context_is_given_back(tmp_path: Path) -> None:
    driver = Driver()
    assert read_free_memory(driver, make_root(tmp_path)) == (4_096_000_000, 6_000_000_000, False, 1_024_000)
    assert driver.calls[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]


def test_a_jetson_has_one_memory(tmp_path: Path) -> None:
    assert read_free_memory(Driver(integrated=True), make_root(tmp_path)) == (
        4_096_000_000,
        4_096_000_000,
        True,
        1_024_000,
    )


@pytest.mark.parametrize("fails", ["cuDevicePrimaryCtxRetain", "cuMemGetInfo_v2", "cuDeviceGetAttribute"])
def test_a_gpu_that_does_not_tell_is_an_error(fails: str, tmp_path: Path) -> None:
    driver = Driver(fails=fails)
    with pytest.raises(EngineError, match="does not say how much memory is free"):
        read_free_memory(driver, make_root(tmp_path))
    assert driver.calls.count("cuDevicePrimaryCtxRelease_v2") == (fails != "cuDevicePrimaryCtxRetain")


def write_group(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "3000000000\n", "memory.current": "1000000000\n"}, 2_000_000_000),
        ({"memory.max": "max\n", "memory.current": "1000000000\n"}, 4_096_000_000),
        ({"memory.max": "9000000000\n", "memory.current": "1000000000\n"}, 4_096_000_000),
        ({"memory.max": "1000\n", "memory.current": "2000\n"}, 0),
        ({"memory/memory.limit_in_bytes": "1500000000", "memory/memory.usage_in_bytes": "500000000"}, 1_000_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"}, 4_096_000_000),
    ],
    ids=["container", "no limit", "larger than the machine", "over the limit", "version 1", "version 1, no limit"],
)
def test_a_container_may_have_less(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    root = make_root(tmp_path)
    write_group(root, files)
    found = read_free_memory(no_driver, root)
    assert found.host_bytes == expected
    assert found.swap_bytes == (1_024_000 if expected == 4_096_000_000 else 0)


def test_a_kernel_that_does_not_tell_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no MemAvailable"):
        read_free_memory(no_driver, make_root(tmp_path, None))
