"""Imports the modules it is told and reports each on a file descriptor: runs in a process of its own.

An import may end Python, crash it, hang or print. A script for itself, so that nothing of ours is imported
before ``sys.path`` is that of the process that asks.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def _targets(module: Any) -> dict[str, str]:
    capabilities = getattr(module, "ComputeCapability", None)
    numbers = sorted(int(name[2:]) for name in dir(capabilities) if name.startswith("SM") and name[2:].isdigit())
    return {"targets": " ".join(f"{number // 10}.{number % 10}" for number in numbers)} if numbers else {}


ASK: dict[str, Callable[[Any], dict[str, str]]] = {
    "tensorflow": lambda module: {"gpus": str(len(module.config.list_physical_devices("GPU")))},
    "keras": lambda module: {"backend": str(module.backend.backend())},
    "onnxruntime": lambda module: {"providers": " ".join(module.get_available_providers())},
    "openvino": lambda module: {"devices": " ".join(module.Core().available_devices)},
    "tensorrt": _targets,
    "tensorrt_rtx": _targets,
    "vggedge_runtime.device": lambda module: dict(module.describe_gpu()),
}
"""Module -> the first thing to ask it: a library that imports and cannot answer this is broken, too."""


def _report(descriptor: int, **facts: object) -> None:
    os.write(descriptor, json.dumps(facts).encode() + b"\n")


def _probe(name: str) -> dict[str, object]:
    module: Any = None
    try:
        module = importlib.import_module(name)
        details = ASK[name](module) if name in ASK else {}
    except BaseException as error:  # SystemExit as well: it is what we are here for
        absent = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        text = f"{type(error).__name__}: {error}".strip().rstrip(":")
        return {"absent": absent, "error": text if module is None else f"it imports, but does not answer: {text}"}
    version = getattr(module, "__version__", None)
    file = getattr(module, "__file__", None)
    return {"version": None if version is None else str(version), "file": str(file), "details": details}


def main(descriptor: int, path: list[str], names: list[str]) -> None:
    """Probe ``names`` in this order with ``path`` as sys.path, one line a start and one a result."""
    sys.path[:] = path
    for name in names:
        _report(descriptor, starts=name)
        _report(descriptor, ends=name, **_probe(name))
    os._exit(0)  # without the libraries' own clean-up, which may crash or hang


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
