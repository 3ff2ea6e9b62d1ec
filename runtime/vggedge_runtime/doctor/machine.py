"""What this machine is: read from files below a root, and from NVIDIA's own tools where they are."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from vggedge_runtime.doctor.jetson import Jetson, read_jetson
from vggedge_runtime.doctor.system import Run, parse_integer, read_text, run_tool


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the GPU; each is None where nobody says.

    Attributes:
        cuda: newest CUDA that the driver runs, "12.6".
        error: why CUDA cannot use it.
        status: what cuInit answers then.
        visible: CUDA_VISIBLE_DEVICES, which can hide it.
        is_on_the_bus: whether an NVIDIA display controller is in the machine, driver or not.
        in_kernel: whether the driver's kernel module is loaded.
        others: GPUs besides the first.
    """

    name: str | None = None
    capability: str | None = None
    driver: str | None = None
    cuda: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    others: int = 0
    has_libcuda: bool = False
    error: str | None = None
    status: str | None = None
    visible: str | None = None
    smi_error: str | None = None
    is_on_the_bus: bool = False
    in_kernel: bool = False


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about this machine; each is None where nobody says.

    Attributes:
        cpu_features: those flags of the processor that decide what runs, and how fast.
        usable_cores: what affinity and container leave of ``cores``.
        available_bytes: memory that can be had without swapping.
        governor: of the processor's clock.
        toolkit: version of the CUDA toolkit.
        jetson: None on every other machine.
        system_tensorrt: folders where the system's packages, not pip's, have installed TensorRT for Python.
    """

    architecture: str
    python: str
    os: str | None = None
    os_id: str | None = None
    cpu: str | None = None
    cpu_features: tuple[str, ...] | None = None
    cores: int | None = None
    usable_cores: int | None = None
    total_bytes: int | None = None
    available_bytes: int | None = None
    governor: str | None = None
    gpu: Gpu = Gpu()
    toolkit: str | None = None
    jetson: Jetson | None = None
    system_tensorrt: tuple[str, ...] = ()

    @property
    def has_gpu(self) -> bool:
        """Whether CUDA can use a GPU here."""
        return self.gpu.name is not None and self.gpu.has_libcuda and self.gpu.error is None


def read_machine(
    root: Path = Path("/"),
    run: Run = run_tool,
    *,
    driver: Mapping[str, str],
    architecture: str | None = None,
    python: str | None = None,
) -> Machine:
    """Read the machine. What is not there, or not as expected, is None.

    Args:
        root: the folder below which /proc, /sys and /etc are looked for.
        run: runs nvidia-smi and nvpmodel.
        driver: what ``device.describe_gpu`` said, asked in a process of its own.
        architecture: of the processor; this machine's if None.
        python: version; this one if None.
    """
    cpu, features = _read_cpu(root)
    total, available = _read_memory(root)
    release = _read_pairs(root / "etc/os-release", "=")
    jetson = read_jetson(root, run)
    return Machine(
        architecture=architecture or platform.machine(),
        python=python or platform.python_version(),
        os=release.get("PRETTY_NAME"),
        os_id=release.get("ID"),
        cpu=cpu,
        cpu_features=features,
        cores=os.cpu_count(),
        usable_cores=_read_usable_cores(root),
        total_bytes=total,
        available_bytes=available,
        governor=read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        gpu=_read_gpu(root, run, driver),
        toolkit=_read_toolkit(root),
        jetson=jetson,
        system_tensorrt=tuple(
            sorted(str(each.parents[1]) for each in root.glob("usr/lib/python3*/dist-packages/tensorrt/__init__.py"))
        ),
    )


def _read_pairs(path: Path, separator: str) -> dict[str, str]:
    """``key<separator>value`` lines of a file, the first of each key."""
    pairs: dict[str, str] = {}
    for line in read_text(path).splitlines():
        key, found, value = line.partition(separator)
        if found:
            pairs.setdefault(key.strip(), value.strip().strip('"'))
    return pairs


def _read_cpu(root: Path) -> tuple[str | None, tuple[str, ...] | None]:
    pairs = _read_pairs(root / "proc/cpuinfo", ":")
    flags = pairs.get("flags", pairs.get("Features"))
    known = ("avx", "avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
    features = None if flags is None else tuple(name for name in known if name in flags.split())
    return pairs.get("model name") or pairs.get("Model"), features


def _read_memory(root: Path) -> tuple[int | None, int | None]:
    """(total, available) bytes of memory: the machine's, or less where the container has less."""
    pairs = _read_pairs(root / "proc/meminfo", ":")
    total, available = _kibibytes(pairs.get("MemTotal")), _kibibytes(pairs.get("MemAvailable"))
    for limit_file, used_file in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit = parse_integer(read_text(root / limit_file))  # "max" where there is none
        used = parse_integer(read_text(root / used_file))
        if limit is not None and total is not None and limit < total:
            total = limit
            if used is not None and available is not None:
                available = min(available, max(0, limit - used))
    return total, available


def _read_usable_cores(root: Path) -> int | None:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = read_text(root / "sys/fs/cgroup/cpu.max").partition(" ")  # "max" where there is none
    quota, period = parse_integer(limit[0]), parse_integer(limit[2])
    if count is not None and quota is not None and period:
        return max(1, min(count, -(-quota // period)))
    return count


def _read_toolkit(root: Path) -> str | None:
    """Version of the CUDA toolkit, from the file that it puts beside itself."""
    match = re.search(r'"cuda"\s*:\s*{[^}]*"version"\s*:\s*"([^"]+)"', read_text(root / "usr/local/cuda/version.json"))
    if match:
        return match.group(1)
    return "unknown" if (root / "usr/local/cuda/bin/nvcc").exists() else None


def _read_gpu(root: Path, run: Run, driver: Mapping[str, str]) -> Gpu:
    kernel = read_text(root / "proc/driver/nvidia/version")
    match = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", kernel)
    smi = run(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits"]
    )
    lines = [] if smi is None else [line.strip() for line in smi.text.splitlines() if line.strip()]
    rows = [[cell.strip() for cell in line.split(",")] for line in lines] if smi is not None and smi.code == 0 else []
    rows = [row for row in rows if len(row) == 4]
    name, version, total, free = rows[0] if rows else ("", "", "", "")
    failed = smi is not None and not rows
    return Gpu(
        name=driver.get("name") or name or None,
        capability=driver.get("capability"),
        driver=(match.group(1) if match else None) or (version if version[:1].isdigit() else None),
        cuda=driver.get("cuda"),
        total_bytes=_mebibytes(total),
        free_bytes=_mebibytes(free),
        others=max(0, len(rows) - 1),
        has_libcuda=driver.get("libcuda") == "found",
        error=driver.get("error"),
        status=driver.get("status"),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        smi_error=(" ".join(lines)[:200] or "it printed nothing") if failed else None,
        is_on_the_bus=_is_on_the_bus(root),
        in_kernel=bool(kernel),
    )


def _is_on_the_bus(root: Path) -> bool:
    """Whether PCI has a display controller (class 03) of NVIDIA (vendor 10de)."""
    return any(
        read_text(device / "vendor") == "0x10de" and read_text(device / "class").startswith("0x03")
        for device in root.glob("sys/bus/pci/devices/*")
    )


def _kibibytes(text: str | None) -> int | None:
    number = parse_integer((text or "").partition(" ")[0])
    return None if number is None else 1024 * number


def _mebibytes(text: str) -> int | None:
    number = parse_integer(text)  # "[N/A]" on a Jetson, whose GPU has no memory of its own
    return None if number is None else 1024 * 1024 * number
