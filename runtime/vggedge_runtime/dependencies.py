"""Optional libraries: imported where they are used, through one helper that names the cure."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

from vggedge_runtime.errors import MissingDependency


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise an error that says how to install it.

    Args:
        module: absolute import name, for example ``"onnxruntime"``.
        extra: the extra of this distribution that brings it, for example ``"ort"``.

    Raises:
        MissingDependency: it is not installed, or its own import fails (both happen in the field: a
            wheel for another CUDA, a missing system library).
    """
    try:
        return importlib.import_module(module)
    # A broken install raises anything: ctypes OSError, NumPy's ABI AttributeError, protobuf TypeError.
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        found = "is not installed" if missing else f"is installed but does not import ({error})"
        raise MissingDependency(
            f"{module} {found}, and this step needs it. Install it with: pip install 'vggedge[{extra}]'"
        ) from error


def is_installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing it (TensorFlow alone takes seconds)."""
    return importlib.util.find_spec(module) is not None


def version_of(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed, else None."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
