"""How much memory is free here, on the host and on the GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vggedge_runtime.errors import EngineError

_CU_ATTRIBUTE_INTEGRATED = 18  # CUdevice_attribute
_NO_LIMIT = 1 << 60  # a control group of version 1 says 2^63 rounded down to a page where it has no limit


class FreeMemory(NamedTuple):
    """What a program can still have.

    Attributes:
        host_bytes: of the host's memory, without pushing others into swap.
        gpu_bytes: of the first GPU's memory; None without a GPU.
        is_shared: whether both are one memory, as on a Jetson.
        swap_bytes: of swap; none where a control group (a container) limits the memory. A GPU cannot use it, but what
            else is in memory can go there.
    """

    host_bytes: int
    gpu_bytes: int | None
    is_shared: bool
    swap_bytes: int = 0


def read_free_memory(load: Callable[[str], Any] = ctypes.CDLL, root: Path = Path("/")) -> FreeMemory:
    """Ask the kernel and, where there is one, the NVIDIA driver.

    Args:
        load: opens a shared library.
        root: where ``proc`` and ``sys`` are.

    Raises:
        EngineError: the kernel does not say, or the driver finds a GPU and does not say.
    """
    host, swap = _host_bytes(root)
    try:
        cuda = load("libcuda.so.1")
    except OSError:
        return FreeMemory(host, None, False, swap)
    device = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return FreeMemory(host, None, False, swap)
    integrated = ctypes.c_int()
    status = cuda.cuDeviceGetAttribute(ctypes.byref(integrated), _CU_ATTRIBUTE_INTEGRATED, device)
    free = _gpu_bytes(cuda, device)
    if status != 0 or free is None:
        raise EngineError("the NVIDIA driver does not say how much memory is free. Look at it with nvidia-smi.")
    # On a Jetson cuMemGetInfo leaves out what the kernel can take back from its file cache.
    return FreeMemory(host, host if integrated.value else free, bool(integrated.value), swap)


def _gpu_bytes(cuda: Any, device: ctypes.c_int) -> int | None:
    """Free bytes of the GPU; None where the driver refuses. It only tells them to who has a context."""
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != 0:
        return None
    try:
        if cuda.cuCtxPushCurrent_v2(context) != 0:
            return None
        status = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        return free.value if status == 0 else None
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)


def _host_bytes(root: Path) -> tuple[int, int]:
    """(MemAvailable, SwapFree); or what the control group (a container) still allows, if less, and then no swap."""
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    told = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" not in told:
        raise EngineError(f"{root}proc/meminfo has no MemAvailable; Linux has had it since 3.14. Upgrade the kernel.")
    available = told["MemAvailable"]
    groups = (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    )
    for limit, usage in groups:
        allowed, used = _read_number(root / limit), _read_number(root / usage)
        if allowed is not None and used is not None and allowed < _NO_LIMIT and allowed - used < available:
            return max(0, allowed - used), 0
    return available, told.get("SwapFree", 0)


def _read_number(path: Path) -> int | None:
    """Number in a file of the kernel; None if there is no such file or it says ``max``."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
