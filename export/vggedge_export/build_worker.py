"""The process that builds engines: one job in, messages out, and nothing of TensorRT in the process that asked.

A build takes minutes and gigabytes, and TensorRT is a large C++ library: when the system kills it for memory, or it
crashes, the one who asked goes on and says so (building.py).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from vggedge_export.build_memory import MemoryNeed, check_fits, estimate_need
from vggedge_export.engine import BuildContext, build_into, check_buildable, engine_key
from vggedge_export.engine_config import EngineConfig, check_options
from vggedge_export.timing_cache import timing_cache_path
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.engine_cache import EngineKey, EngineRecord, read_engine, scan_engines
from vggedge_runtime.errors import EngineError, VggedgeError
from vggedge_runtime.memory import read_free_memory
from vggedge_runtime.tensorrt_api import TensorRtApi, load_tensorrt

STOPPED = 130  # exit code; as a shell gives it after SIGINT

_UNITS = 100
"""Of progress, a graph."""


class BuildJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to build.

    Attributes:
        product: ``tensorrt`` or ``tensorrt_rtx``.
        bundle: folder; None: only see whether the product can build here.
        graphs: names, all laid out for the product.
        config: choices.
        force: whether to build what is there already.
    """

    product: str
    bundle: str | None = None
    graphs: tuple[str, ...] = ()
    config: EngineConfig = EngineConfig()
    force: bool = False


class EngineOutcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One engine of a job.

    Attributes:
        record: its engine.json.
        was_there: whether it had been built before, from the same graph by the same choices, and was left alone.
        latencies_ms: of all that were built and timed to find it; none where it is the only one.
    """

    record: EngineRecord
    was_there: bool = False
    latencies_ms: tuple[float, ...] = ()


class Told(msgspec.Struct, frozen=True, tag=True):
    """Progress: ``done`` of ``total``."""

    done: int
    total: int


class Begun(msgspec.Struct, frozen=True, tag=True):
    """A build begins, and may take so much."""

    need: MemoryNeed


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The job ends in an error of errors.py, by its class's name."""

    kind: str
    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The job ends in an answer of the system."""

    number: int
    text: str
    file: str | None


Message: TypeAlias = EngineOutcome | Told | Begun | Failed | Refused

Tell: TypeAlias = Callable[[Message], None]


def run_job(job: BuildJob, tell: Tell, is_stopped: Callable[[], bool]) -> None:
    """Do the job in this process.

    Raises:
        VggedgeError: it cannot be done; what was built before that stays.
        KeyboardInterrupt: ``is_stopped`` says so.
    """
    api, config = load_tensorrt(job.product), job.config
    check_options(api, config)
    check_buildable(api)
    if job.bundle is None:
        return
    bundle = Bundle.open(job.bundle)
    measure = _open_timer(api, bundle, config)
    keys = {graph: engine_key(bundle, api, graph, config) for graph in job.graphs}
    there = {} if job.force else {graph: _find(bundle.path, key) for graph, key in keys.items()}
    needs = {graph: _estimate(bundle, api, graph, config) for graph in job.graphs if there.get(graph) is None}
    for need in needs.values():
        check_fits(need)  # all of them now, and not the last one after the others took an hour
    for index, (graph, key) in enumerate(keys.items()):
        if is_stopped():
            raise KeyboardInterrupt
        record = there.get(graph)
        if record is not None:
            tell(EngineOutcome(record=record, was_there=True))
        else:
            tell(Begun(needs[graph]))
            tell(_build(bundle, api, key, config, needs[graph], measure, _watch(tell, is_stopped, index, len(keys))))
        tell(Told((index + 1) * _UNITS, len(keys) * _UNITS))


def _build(
    bundle: Bundle,
    api: TensorRtApi,
    key: EngineKey,
    config: EngineConfig,
    need: MemoryNeed,
    measure: Callable[[memoryview], float] | None,
    watch: Callable[[float], bool],
) -> EngineOutcome:
    latencies_ms: list[float] = []

    def measure_and_note(plan: memoryview) -> float:
        if measure is None:
            raise EngineError("nothing here times engines.")
        latencies_ms.append(measure(plan))
        return latencies_ms[-1]

    # A cache makes builds alike, and those that are compared are to differ.
    is_cached = config.timing_cache is not False and config.keep_best == 1 and api.tunes_while_building
    context = BuildContext(
        workspace_bytes=need.workspace_bytes,
        watch=watch,
        timing_cache=timing_cache_path(api, key.devices[0]) if is_cached else None,
    )
    record = build_into(bundle.path, api, key.graph, config, context=context, measure=measure_and_note)
    return EngineOutcome(record=record, latencies_ms=tuple(latencies_ms))


def _open_timer(api: TensorRtApi, bundle: Bundle, config: EngineConfig) -> Callable[[memoryview], float] | None:
    """What times engines; None where none is to be timed. Whatever it lacks is missed now, and not after a build."""
    if config.keep_best == 1:
        return None
    from vggedge_export.engine_timing import EngineTimer

    return EngineTimer(api, bundle.manifest.image.shape, config.batches[1]).measure


def _find(bundle: Path, key: EngineKey) -> EngineRecord | None:
    """The engine that was built for exactly this key, and is whole; None where there is none."""
    try:
        read_engine(bundle, key)
    except EngineError:
        return None
    return scan_engines(bundle).records.get(key.fingerprint)


def _estimate(bundle: Bundle, api: TensorRtApi, graph: str, config: EngineConfig) -> MemoryNeed:
    size = bundle.manifest.files[bundle.graph(graph).file].size_bytes
    return estimate_need(graph, size, config, read_free_memory(), builds_on_gpu=api.tunes_while_building)


def _watch(tell: Tell, is_stopped: Callable[[], bool], index: int, graphs: int) -> Callable[[float], bool]:
    """Tell how far graph ``index`` is, a hundredth at a time."""
    last = -1

    def watch(share: float) -> bool:
        nonlocal last
        done = int(share * _UNITS)
        if done > last:
            last = done
            try:
                tell(Told(index * _UNITS + done, graphs * _UNITS))
            except OSError:  # nobody listens any more
                return False
        return not is_stopped()

    return watch


def main() -> None:
    """Read a job from stdin, do it, and write a line of JSON a message to the file descriptor that is named last."""
    stopped: list[int] = []
    # TensorRT calls back from C++, which no exception may cross: Ctrl-C is noted, and looked at where it can be.
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildJob)
    with os.fdopen(int(sys.argv[-1]), "wb", buffering=0) as pipe:

        def tell(message: Message) -> None:
            pipe.write(msgspec.json.encode(message) + b"\n")

        sys.exit(_run(job, tell, lambda: bool(stopped)))


def _run(job: BuildJob, tell: Tell, is_stopped: Callable[[], bool]) -> int:
    try:
        run_job(job, tell, is_stopped)
        return 0
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:  # whoever asked has gone
        return 1
    except VggedgeError as error:
        tell(Failed(type(error).__name__, str(error)))
    except OSError as error:
        tell(Refused(error.errno or 0, error.strerror or str(error), _text(error.filename)))
    except MemoryError:
        tell(Failed("EngineError", "the memory that is free does not suffice, as Python found. Close other programs."))
    except Exception:
        tell(Failed("", traceback.format_exc()))
    return 1


def _text(name: Any) -> str | None:
    return None if name is None else os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
