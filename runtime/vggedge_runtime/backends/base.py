"""What a backend is: loads one graph, runs batches, closes. The one plug-in axis of the runtime."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from vggedge_runtime.dependencies import is_installed
from vggedge_runtime.errors import SessionError, UsageError
from vggedge_runtime.preprocess import Pixels

Probabilities = NDArray[np.float32]
"""float32, (n, classes)."""


class Backend(ABC):
    """Runs one graph, one call at a time: Session serialises the threads that share it.

    A child sets the class variables and overrides ``_load``, ``_run`` and ``_close``.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    """Import name of the library behind it."""
    precisions: ClassVar[tuple[str, ...]]
    """What it runs at its proper speed, best first; ``auto`` takes the first that the bundle has."""
    computes_fp16_as_fp32: ClassVar[bool] = False
    """Whether FP16 tensors are FP32 while it runs: what it answers then says nothing about FP16."""

    def __init__(self, graph: Path, *, threads: int = 0) -> None:
        """Load ``graph``, an ONNX file whose hash was checked. ``threads`` 0 leaves the number to the library."""
        self._closed = False
        self._load(graph, threads)

    def run(self, images: Pixels) -> Probabilities:
        """(n, h, w, 3) uint8 -> (n, classes) float32; a new array each time.

        Raises:
            SessionError: closed already.
        """
        if self._closed:
            raise SessionError(f"backend {self.name} is closed; open a new session.")
        return self._run(images)

    def close(self) -> None:
        """Free what the library holds; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._close()

    @abstractmethod
    def _load(self, graph: Path, threads: int) -> None: ...

    @abstractmethod
    def _run(self, images: Pixels) -> Probabilities: ...

    @abstractmethod
    def _close(self) -> None: ...


BACKENDS: dict[str, str] = {
    "ort": "vggedge_runtime.backends.ort:OrtBackend",
    "openvino": "vggedge_runtime.backends.ov:OpenVinoBackend",
}
"""Name -> "module:class"; a module is imported when its backend is chosen."""


def backend_choices() -> str:
    """What a user may ask for, in words: ``auto``, then the names."""
    return ", ".join(("auto", *BACKENDS))


def load_backend_class(name: str) -> type[Backend]:
    """Class of the backend ``name``; UsageError lists the known ones."""
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is unknown; known: {backend_choices()}.")
    module, _, attribute = BACKENDS[name].partition(":")
    found: type[Backend] = getattr(importlib.import_module(module), attribute)
    return found


def choose_backend() -> tuple[str, str]:
    """(name, reason) of the backend that ``auto`` takes on this machine."""
    for name in BACKENDS:
        if is_installed(load_backend_class(name).module):
            return name, f"auto: the first installed of {', '.join(BACKENDS)}"
    # The class's own load then names the extra to install.
    return next(iter(BACKENDS)), "no backend's library is installed"
