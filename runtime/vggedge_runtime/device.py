"""What machine this is: the block that goes with every measured figure, and the GPU's name."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vggedge_runtime.dependencies import version_of
from vggedge_runtime.errors import EngineError

_CU_ATTRIBUTE_MAJOR, _CU_ATTRIBUTE_MINOR = 75, 76  # CUdevice_attribute: compute capability


def describe_environment() -> dict[str, str]:
    """Machine, processor, cores, Python and versions of what computes."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    } | tool_versions("numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx_cu13")


def tool_versions(*distributions: str) -> dict[str, str]:
    """Versions of those of ``distributions`` that are installed."""
    found = {name: version_of(name) for name in distributions}
    return {name: version for name, version in found.items() if version is not None}


def gpu_name(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """Name and compute capability of the first GPU: ``"Orin (8.7)"``. Asks the driver, needs no CUDA toolkit.

    Raises:
        EngineError: no NVIDIA driver or no GPU here, or one that does not answer.
    """
    try:
        cuda = load("libcuda.so.1")
    except OSError as error:
        raise EngineError(f"no NVIDIA driver here ({error}); this step needs an NVIDIA GPU.") from error
    device = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        raise EngineError("the NVIDIA driver is installed but finds no GPU; this step needs one.")
    name = ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    statuses = (
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _CU_ATTRIBUTE_MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CU_ATTRIBUTE_MINOR, device),
    )
    if any(statuses):
        raise EngineError(
            f"the NVIDIA driver does not say what the GPU is (CUDA statuses {statuses}). Look at it with nvidia-smi."
        )
    return f"{name.value.decode()} ({major.value}.{minor.value})"


def describe_gpu(load: Callable[[str], Any] = ctypes.CDLL) -> dict[str, str]:
    """What the driver says of the first GPU; never raises, for a process that looks for what is wrong.

    Returns:
        ``libcuda`` "found" or "missing"; ``cuda``, the newest CUDA that the driver runs, "12.6"; ``name`` and
        ``capability``, "8.7", of the GPU; or ``error``, why they are not there, and ``status``, what cuInit answers.
    """
    try:
        cuda = load("libcuda.so.1")
    except OSError as error:
        return {"libcuda": "missing", "error": str(error)}
    found = {"libcuda": "found"}
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0:
        found["cuda"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    try:
        name, _, capability = gpu_name(load).rpartition(" (")
    except EngineError as error:
        return {**found, "error": str(error).partition(";")[0], "status": str(cuda.cuInit(0))}
    return {**found, "name": name, "capability": capability.rstrip(")")}


def _cpu_name() -> str:
    """Board of a Jetson (its device tree names it), else the processor's model name."""
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8").strip("\0\n ")
    except OSError:
        pass
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
