"""CUDA on the device. The only file that imports pycuda."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vggedge_runtime.dependencies import require


@contextmanager
def primary_context() -> Iterator[Any]:
    """Yield pycuda.driver with the first GPU's primary context current on this thread.

    The primary one, because TensorRT and every other library of the process use it; a context of pycuda's own would
    be a second one. It is popped whatever happens: pycuda aborts the process where its stack is not empty at exit.

    Raises:
        MissingDependency: pycuda is not installed, or does not import.
    """
    driver: Any = require("pycuda.driver", "tensorrt")
    driver.init()
    context = driver.Device(0).retain_primary_context()
    context.push()
    try:
        yield driver
    finally:
        driver.Context.pop()
