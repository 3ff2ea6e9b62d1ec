"""Timings of kernels, kept between builds: a second build of the same shapes takes seconds instead of minutes.

A timing cache is good for one version of TensorRT on one kind of GPU; both are in the file's name, and TensorRT
looks at its head as well. It is never trusted to be there or whole: without one a build only takes longer.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vggedge_runtime.tensorrt_api import TensorRtApi, shared_logger


def timing_cache_path(api: TensorRtApi, device: str) -> Path:
    """File for one product, version and device, in the user's cache folder (XDG base dirs)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^\w.+-]+", "-", f"{api.product}-{api.version}-{device}").strip("-")
    return Path(base) / "vggedge" / "timing" / f"{name}.cache"


def attach_timing_cache(api: TensorRtApi, settings: Any, path: Path | None) -> None:
    """Let a build read and fill the cache; an empty one where there is none, or none that this TensorRT takes.

    Args:
        api: the product.
        settings: of the build (IBuilderConfig).
        path: the file; None: nothing is kept, not even what TensorRT would within the process.
    """
    if path is None:
        settings.set_flag(api.module.BuilderFlag.DISABLE_TIMING_CACHE)
        return
    logger = shared_logger(api)
    told = len(logger.lines)
    cache = _open_cache(settings, _read(path))
    if cache is None or not settings.set_timing_cache(cache, False):
        settings.set_timing_cache(settings.create_timing_cache(b""), False)
    del logger.lines[told:]  # what TensorRT says of a damaged cache is no reason for a build that fails


def keep_timing_cache(api: TensorRtApi, settings: Any, path: Path | None) -> None:
    """Write what the build has timed, together with what others wrote meanwhile; nothing where that is refused."""
    if path is None:
        return
    cache = settings.get_timing_cache()
    if cache is None:
        return
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    logger = shared_logger(api)
    told = len(logger.lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.lock")):
            others = _open_cache(settings, _read(path))
            if others is not None:
                cache.combine(others, False)  # skips what is of another version or device
            partial.write_bytes(memoryview(cache.serialize()))
            partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
    del logger.lines[told:]


def _open_cache(settings: Any, content: bytes) -> Any:
    """A cache from its bytes; None where TensorRT does not take them, which it says by None or by an error."""
    try:
        return settings.create_timing_cache(content)
    except RuntimeError:
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # ends with the stream, or with the process
        yield
