"""What timing uses of pycuda.driver, on a GPU that takes as long as the fake TensorRT says. Refuses wrong orders."""

from __future__ import annotations

import fake_tensorrt
import numpy as np

_stack: list[Context] = []
_is_initialised = False
alive: set[DeviceAllocation] = set()


def init() -> None:
    global _is_initialised
    _is_initialised = True


def _check_current() -> None:
    if not _stack:
        raise RuntimeError("explicit_context_dependent failed: invalid device context - no currently active context?")


class Context:
    __slots__ = ()

    def push(self) -> None:
        _stack.append(self)

    @staticmethod
    def pop() -> None:
        _check_current()
        if alive:
            raise RuntimeError("device memory is left behind")
        _stack.pop()


class Device:
    __slots__ = ()

    def __init__(self, number: int) -> None:
        if not _is_initialised or number != 0:
            raise RuntimeError("cuDeviceGet failed: initialization error")

    def retain_primary_context(self) -> Context:
        return Context()


class Stream:
    __slots__ = ("flags",)

    def __init__(self, flags: int = 0) -> None:
        _check_current()
        self.flags = flags

    handle = 7

    def synchronize(self) -> None:
        _check_current()


class DeviceAllocation:
    __slots__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        _check_current()
        self.nbytes = nbytes
        alive.add(self)

    def __int__(self) -> int:
        return id(self)

    def free(self) -> None:
        alive.remove(self)


mem_alloc = DeviceAllocation


def pagelocked_zeros(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    _check_current()
    return np.zeros(shape, dtype)


def memcpy_htod_async(device: DeviceAllocation, source: np.ndarray, stream: Stream) -> None:
    if device.nbytes < source.nbytes or device not in alive:
        raise RuntimeError("cuMemcpyHtoDAsync failed: invalid argument")


class Event:
    __slots__ = ("ran",)

    def record(self, stream: Stream) -> None:
        self.ran = fake_tensorrt.ran_ms

    def synchronize(self) -> None:
        _check_current()

    def time_since(self, other: Event) -> float:
        return self.ran - other.ran
