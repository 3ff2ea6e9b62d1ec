"""Builds a bundle's engines in a process of their own, and stays alive whatever becomes of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from vggedge_export.build_memory import WHAT_TO_DO, MemoryNeed
from vggedge_export.build_worker import STOPPED, Begun, BuildJob, EngineOutcome, Failed, Message, Refused, Told
from vggedge_export.engine import graphs_for
from vggedge_export.engine_config import EngineConfig
from vggedge_runtime import errors
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.dependencies import is_installed
from vggedge_runtime.device import gpu_name
from vggedge_runtime.engine_cache import ENGINES
from vggedge_runtime.errors import BundleError, EngineError, MissingDependency, UsageError, VggedgeError
from vggedge_runtime.graphs import GRAPHS, PRECISIONS, graphs_of
from vggedge_runtime.progress import Advance, ignore_progress
from vggedge_runtime.tensorrt_api import PRODUCTS, choose_product

# The child has the parent's import path, whatever the parent did to it; nothing is imported before it is set, so that
# no file of the working directory can be taken for a module. Until it listens to Ctrl-C that just ends it.
BOOTSTRAP = """
import sys
sys.path[:] = sys.argv[1].split("\\n")
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
from vggedge_export.build_worker import main
main()
"""

_GRACE_SECONDS = 20.0
"""How long a child may take to stop by itself: TensorRT asks between two steps, and a step times many kernels."""

_ABANDONED_SECONDS = 3600.0
"""Age at which a folder of an engine without a record is no build that is still going on."""


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a build made.

    Attributes:
        bundle: folder.
        product: that built.
        engines: in the order of the graphs.
    """

    bundle: str
    product: str
    engines: tuple[EngineOutcome, ...]


def choose_builder(product: str = "auto") -> str:
    """The product that is to build here: the one named, or the one that can.

    ``auto`` takes TensorRT where it is installed and finds a GPU (a Jetson, a desktop with TensorRT), and else
    TensorRT-RTX, which builds without one.

    Raises:
        UsageError: no such product.
        MissingDependency: it is not installed; or ``auto``, and none is.
    """
    chosen = choose_product(product, has_gpu=_has_gpu())
    if not is_installed(chosen):
        raise MissingDependency(
            f"{chosen} is not installed, and this step needs it. Install it with: pip install "
            f"'vggedge[{PRODUCTS[chosen]}]'"
        )
    return chosen


def check_builder(product: str) -> None:
    """Load the product and look for the GPU that it may need, in a child process: before work that ends in a build.

    Raises:
        MissingDependency: it does not import.
        EngineError: it needs a GPU to build, and there is none; or loading it ends the child.
    """
    with _start(BuildJob(product=product)) as (process, messages):
        for message in messages:
            if isinstance(message, (Failed, Refused)):
                _raise(message)
        _check_ended(process.wait(), product, None)


def choose_graphs(bundle: Bundle, product: str, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Graphs of ``bundle`` to build for ``product``, in the manifest's order.

    Args:
        bundle: opened.
        product: that builds.
        wanted: precisions (fp16, int8) or names of graphs (int8-rtx); None: all that were made for the product.

    Raises:
        UsageError: an unknown precision or graph, or one that was made for another product.
        BundleError: the bundle has none.
    """
    there = list(bundle.manifest.graphs)
    fitting = graphs_for(product, [name for name in there if name in GRAPHS])
    chosen: set[str] = set(fitting) if wanted is None else set()
    for name in wanted or ():
        if name not in PRECISIONS and name not in there:
            raise UsageError(
                f"precision {name!r} is unknown; known: {', '.join(PRECISIONS)}, and the graphs of this bundle: "
                f"{', '.join(there)}."
            )
        found = [each for each in (graphs_of(name) if name in PRECISIONS else (name,)) if each in fitting]
        if not found:
            raise UsageError(
                f"{bundle.path}: no {name} graph for {product} in it; it has for {product}: {', '.join(fitting)}. "
                f"Export the bundle with --precision {name}, or build for another product."
            )
        chosen.update(found)
    if not chosen:
        raise BundleError(f"{bundle.path}: no graph in it was made for {product}; it has: {', '.join(there)}.")
    return tuple(name for name in there if name in chosen)


def build_engines(
    bundle: Path,
    product: str,
    graphs: Sequence[str],
    config: EngineConfig,
    *,
    force: bool = False,
    progress: Advance = ignore_progress,
) -> BuildResult:
    """Build the engines of ``graphs`` and store them in the bundle; TensorRT is loaded by a child process only.

    An engine that was built from the same graph for the same device by the same choices, and is whole, is not built
    again. Each is written to a temporary file and renamed; those that were finished before an error or Ctrl-C stay.

    Args:
        bundle: folder.
        product: ``tensorrt`` or ``tensorrt_rtx`` (choose_builder).
        graphs: names of graphs made for it (choose_graphs).
        config: choices.
        force: build what is there already, too.
        progress: told how far the build is.

    Raises:
        VggedgeError: of the kinds of engine.build_audited_engine; EngineError too if the child was killed.
        KeyboardInterrupt: once the child has ended.
    """
    if not os.access(bundle, os.W_OK | os.X_OK):
        raise BundleError(
            f"{bundle}: you may not write there, and engines go into the bundle. Copy it and build there."
        )
    _clear_leftovers(bundle)
    what, total = f"building {product} engines", 100 * len(graphs)
    progress(0, total, what)
    job = BuildJob(bundle=os.fspath(bundle), product=product, graphs=tuple(graphs), config=config, force=force)
    outcomes: list[EngineOutcome] = []
    need: MemoryNeed | None = None
    with _start(job) as (process, messages):
        for message in messages:
            if isinstance(message, Told):
                progress(message.done, message.total, what)
            elif isinstance(message, EngineOutcome):
                outcomes.append(message)
                need = None
            elif isinstance(message, Begun):
                need = message.need
            else:
                _raise(message)
        _check_ended(process.wait(), product, need)
    return BuildResult(bundle=os.fspath(bundle), product=product, engines=tuple(outcomes))


@contextmanager
def _start(job: BuildJob) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[Message]]]:
    """Start the child; when the block ends, however, it has ended, and nothing half-written is left."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP, "\n".join(sys.path), str(writing)],
            stdin=subprocess.PIPE,
            stdout=2,  # what a library prints is no result
            pass_fds=(writing,),
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)  # else the end of the child would not be the end of the pipe
    try:
        with os.fdopen(reading, "rb") as pipe:
            if process.stdin is not None:
                with suppress(BrokenPipeError), process.stdin:
                    process.stdin.write(msgspec.json.encode(job))
            yield process, (msgspec.json.decode(line, type=Message) for line in pipe if line.endswith(b"\n"))
    finally:
        _end(process)
        if job.bundle is not None:
            _clear_leftovers(Path(job.bundle))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the child stop by itself, and kill it if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_GRACE_SECONDS)
        except BaseException as error:  # it hangs, or a second Ctrl-C came
            process.kill()
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise


def _raise(message: Failed | Refused) -> None:
    if isinstance(message, Refused):
        raise OSError(message.number, message.text, message.file)
    kind = getattr(errors, message.kind, None)
    if isinstance(kind, type) and issubclass(kind, VggedgeError):
        raise kind(message.text)
    raise RuntimeError(f"the process that builds engines failed, which is a defect of vggedge:\n{message.text}")


def _check_ended(code: int, product: str, need: MemoryNeed | None) -> None:
    """Raise for every end of the child but the good one; it has not said why."""
    if code == 0:
        return
    if code in (STOPPED, -signal.SIGINT):
        raise KeyboardInterrupt
    doing = f"while it built {need.graph}" if need else f"while it loaded {product}"
    figures = f" As estimated before: {need}." if need else ""
    if code == -signal.SIGKILL:
        raise EngineError(
            f"the process that builds engines was killed {doing}, and that is how the system ends what takes too much "
            f"memory (SIGKILL; `dmesg` tells).{figures} {WHAT_TO_DO}"
        )
    end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise EngineError(
        f"the process that builds engines crashed {doing} ({end}); what {product} printed before that is above."
        f"{figures} Try it with --optimization-level 2 or a smaller --workspace where the product has them, and check "
        "the installation: python -c 'import " + product + "'."
    )


def _clear_leftovers(bundle: Path) -> None:
    """Remove what killed builds left: files that nobody is writing any more, and folders that got no record."""
    for folder in (bundle / ENGINES).glob("*/"):
        if not (folder / "engine.json").exists() and time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        for file in folder.glob(".*.partial-*"):
            found = re.fullmatch(r"\..+\.partial-(\d+)", file.name)
            if found and not Path(f"/proc/{found[1]}").exists():
                file.unlink(missing_ok=True)
                _remove_empty(folder)
    _remove_empty(bundle / ENGINES)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # there is none, or it holds something
        folder.rmdir()


def _has_gpu() -> bool:
    try:
        gpu_name()
    except EngineError:
        return False
    return True
