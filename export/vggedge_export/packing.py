"""From a bundle to what other tools want: plain ONNX, an engine with its command line, a Triton model repository.

Graphs and plans go out as the bundle has them, byte for byte; what vggedge knows about them goes into files beside.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec

from vggedge_export.graph import INPUT
from vggedge_export.packing_notes import build_notes, describe_engine
from vggedge_export.triton import CONFIG, LABELS, MAX_BATCH, MAX_QUEUE_DELAY_US, TritonModel, build_config
from vggedge_runtime.bundle import Bundle, FileRecord, hash_file
from vggedge_runtime.engine_cache import ENGINES, EngineRecord, read_engine, scan_engines
from vggedge_runtime.errors import BundleError, EngineError, UsageError
from vggedge_runtime.graphs import GRAPHS, PRECISIONS

NOTES = "README.txt"
_RECORD = "engine.json"

TARGETS = ("triton", "onnx", "engine")
PLATFORMS = ("onnxruntime", "tensorrt")

_TOOLS = {"tensorrt": "trtexec", "tensorrt_rtx": "tensorrt_rtx"}
"""Product -> its own command-line tool, which runs engines."""

_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What is a folder's name, a word in Triton's URLs and nothing that a shell reads."""

_NAME_RULE = "needed are letters, digits and any of _.- with none of .- first"


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Choices of one pack.

    Attributes:
        target: ``onnx``, ``engine`` or ``triton``.
        precision: fp32, fp16, int8, or the exact name of a graph; None is fp32 for a graph, and the only engine.
        engine: how the fingerprint of the engine begins; None leaves the choice to ``precision``.
        platform: what runs it in Triton: ``onnxruntime`` (if None) or ``tensorrt``.
        model_name: of the model in Triton; None is the bundle's.
        max_batch: largest batch of an ONNX graph in Triton; an engine brings its own.
        max_queue_delay_us: how long a request may wait in Triton for others to share its batch.
        gpu: whether ONNX Runtime runs on the GPU in Triton; an engine always does.

    Raises:
        UsageError: an unknown name, or an option that this target has no use for.
    """

    target: str
    precision: str | None = None
    engine: str | None = None
    platform: str | None = None
    model_name: str | None = None
    max_batch: int | None = None
    max_queue_delay_us: int | None = None
    gpu: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"target {self.target!r} is unknown; known: {', '.join(TARGETS)}.")
        if self.platform is not None and self.platform not in PLATFORMS:
            raise UsageError(f"platform {self.platform!r} is unknown; known: {', '.join(PLATFORMS)}.")
        if self.model_name is not None and not _MODEL_NAME.fullmatch(self.model_name):
            raise UsageError(f"model name {self.model_name!r} is none for Triton; {_NAME_RULE}.")
        if self.max_batch is not None and not 1 <= self.max_batch < 2**31:  # an int32 of Triton's schema
            raise UsageError(f"max_batch is {self.max_batch}; needed is 1 to {2**31 - 1}.")
        if self.max_queue_delay_us is not None and not 0 <= self.max_queue_delay_us < 2**64:  # a uint64 of it
            raise UsageError(f"max_queue_delay_us is {self.max_queue_delay_us}; needed is 0 to {2**64 - 1}.")
        self._check_used()

    @property
    def takes_engine(self) -> bool:
        """Whether an engine is packed; else a graph is."""
        return self.target == "engine" or self.platform == "tensorrt"

    def _check_used(self) -> None:
        """Raise UsageError for what would be left out in silence."""
        useless: tuple[str, ...] = ()
        if self.target != "triton":
            useless = ("platform", "model_name", "max_batch", "max_queue_delay_us", "gpu")
        elif self.takes_engine:
            useless = ("max_batch", "gpu")
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        unused = [name for name in useless if name in given]
        if self.engine is not None and not self.takes_engine:
            unused.append("engine")
        if unused:
            what = f"{self.target} with platform tensorrt" if self.platform and self.takes_engine else self.target
            raise UsageError(f"{', '.join(unused)}: of no use to {what}. Leave that out, or choose another target.")


class PackResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was written.

    Attributes:
        bundle: the folder it came from.
        target: as in PackConfig.
        folder: what was written.
        graph: name of the graph, or of the graph that the engine was built from.
        engine: fingerprint of the engine; None where a graph was packed.
        files: path in ``folder`` -> its hash and size.
        command: the line that runs it where the tool is installed; None for a plain ONNX file, which any tool reads.
        made_for: what it was laid out for.
    """

    bundle: str
    target: str
    folder: str
    graph: str
    engine: str | None
    files: dict[str, FileRecord]
    command: str | None
    made_for: str


def pack(bundle: Bundle, folder: Path, config: PackConfig) -> PackResult:
    """Write into ``folder``, which must be new or empty, what ``config`` asks for.

    After an error or Ctrl-C there is nothing.

    Raises:
        UsageError: the folder is in use, or several graphs or engines fit.
        BundleError: no such graph, or one that is missing or was changed.
        EngineError: no such engine, or one that does not belong to this bundle or was changed.
    """
    check_writable(bundle, folder)
    if any("\n" in label or "\r" in label for label in bundle.manifest.labels):
        raise BundleError(f"{bundle.path}: a label has a line break, and {LABELS} has one label a line. Rename it.")
    engine = choose_engine(bundle, config) if config.takes_engine else None
    graph = choose_graph(bundle, config.precision) if engine is None else engine.key.graph
    with _write_folder(folder) as staging:
        if config.target == "triton":
            _write_triton(bundle, staging, graph, engine, config)
        elif engine is not None:
            _write_engine(bundle, staging, engine)
        else:
            _write_onnx(bundle, staging, graph)
        files = {
            path.relative_to(staging).as_posix(): FileRecord(hash_file(path), path.stat().st_size)
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
    return PackResult(
        bundle=str(bundle.path),
        target=config.target,
        folder=str(folder),
        graph=graph,
        engine=None if engine is None else engine.key.fingerprint,
        files=files,
        command=_build_command(bundle, folder, engine, config),
        made_for=", ".join(bundle.graph(graph).made_for) if engine is None else describe_engine(engine),
    )


def check_writable(bundle: Bundle, folder: Path) -> None:
    """Raise UsageError unless ``folder`` is new or empty, and outside of the bundle."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UsageError(f"{folder}: exists and is not an empty folder. Name a new one.")
    if bundle.path.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(f"{folder}: lies in the bundle, which holds nothing but its own files. Name another folder.")


def choose_graph(bundle: Bundle, precision: str | None) -> str:
    """Name of the graph to pack: the one of this name, else the only one of this precision."""
    graphs = bundle.manifest.graphs
    wanted = "fp32" if precision is None else precision
    if wanted in graphs:
        return wanted
    found = [name for name, record in graphs.items() if record.precision == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        each = "; ".join(f"{name} for {', '.join(graphs[name].made_for)}" for name in found)
        raise UsageError(f"{bundle.path}: several graphs are {wanted}: {each}. Name one of them as the precision.")
    if wanted not in (*PRECISIONS, *GRAPHS):
        raise UsageError(
            f"precision {wanted!r} is unknown; known: {', '.join(PRECISIONS)}, and the graphs of this bundle: "
            f"{', '.join(graphs)}."
        )
    raise BundleError(f"{bundle.path}: no {wanted} graph in this bundle; it has: {', '.join(graphs)}. Export it again.")


def choose_engine(bundle: Bundle, config: PackConfig) -> EngineRecord:
    """The engine to pack, whose graph is the bundle's.

    Raises:
        EngineError: there is none, or none that fits.
        UsageError: several fit.
    """
    build = shlex.join(["vggedge", "build", str(bundle.path)])
    found = scan_engines(bundle.path)  # one that cannot be read does not hide the others
    unread = "".join(f"\n  {each}" for each in found.unreadable)
    engines = list(found.records.values())
    if not engines:
        raise EngineError(f"{bundle.path}: no engine in this bundle. Build one with: {build}{unread}")
    _check_engine_words(bundle, engines, config)
    fitting = [engine for engine in engines if _is_wanted(bundle, engine, config)]
    if not fitting:
        raise EngineError(f"{bundle.path}: no engine here is what you ask for; there are:{_list(engines)}{unread}")
    if config.target == "triton":
        wanted, fitting = fitting, [engine for engine in fitting if engine.key.product == "tensorrt"]
        if not fitting:
            raise EngineError(
                f"{bundle.path}: Triton runs engines of TensorRT and has no backend for TensorRT-RTX. What fits is not "
                f"for TensorRT:{_list(wanted)}\nBuild one where tensorrt is installed, with: {build}; or pack the "
                "graph, with --platform onnxruntime."
            )
    named = [engine for engine in fitting if engine.key.graph == config.precision]
    fitting = named or fitting
    if len(fitting) > 1:
        by_graph = "with --precision, or " if len({engine.key.graph for engine in fitting}) > 1 else ""
        raise UsageError(
            f"{bundle.path}: several engines fit. Choose {by_graph}with --engine and the fingerprint in "
            f"brackets:{_list(fitting)}"
        )
    _check_usable(bundle, fitting[0])
    return fitting[0]


def _check_engine_words(bundle: Bundle, engines: list[EngineRecord], config: PackConfig) -> None:
    """Raise UsageError for a precision or fingerprint that can mean nothing here."""
    known = {*PRECISIONS, *bundle.manifest.graphs, *(engine.key.graph for engine in engines)}
    if config.precision is not None and config.precision not in known:
        raise UsageError(f"precision {config.precision!r} is unknown; known: {', '.join(sorted(known))}.")
    wanted = config.engine
    if wanted is not None and not (wanted and any(e.key.fingerprint.startswith(wanted) for e in engines)):
        raise UsageError(
            f"--engine is {wanted!r}; needed are the first digits of a fingerprint in brackets:{_list(engines)}"
        )


def _is_wanted(bundle: Bundle, engine: EngineRecord, config: PackConfig) -> bool:
    record = bundle.manifest.graphs.get(engine.key.graph)
    names = {engine.key.graph} if record is None else {engine.key.graph, record.precision}
    return (config.precision is None or config.precision in names) and (
        config.engine is None or engine.key.fingerprint.startswith(config.engine)
    )


def _list(engines: list[EngineRecord]) -> str:
    """A line for each."""
    return "".join(f"\n  {describe_engine(engine, fingerprint=True)}" for engine in engines)


def _check_usable(bundle: Bundle, engine: EngineRecord) -> None:
    """Raise EngineError if its product is unknown, or the bundle's graph is not the one that it was built from."""
    if engine.key.product not in _TOOLS:
        raise EngineError(
            f"{bundle.path}: engine {engine.key.fingerprint} is for the product {engine.key.product!r}; known: "
            f"{', '.join(_TOOLS)}. Upgrade vggedge."
        )
    record = bundle.manifest.graphs.get(engine.key.graph)
    found = None if record is None else bundle.manifest.files[record.file].sha256
    if found != engine.key.graph_sha256:
        raise EngineError(
            f"{bundle.path}: engine {engine.key.fingerprint} was built from another graph {engine.key.graph} than the "
            f"bundle has. Delete {bundle.path / ENGINES / engine.key.fingerprint} and build it again."
        )


def _write_onnx(bundle: Bundle, folder: Path, graph: str) -> None:
    file = Path(bundle.graph(graph).file).name
    _copy_graph(bundle, graph, folder / file)
    _write_labels(bundle, folder)
    (folder / NOTES).write_text(build_notes(bundle, graph, file), encoding="utf-8")


def _write_engine(bundle: Bundle, folder: Path, engine: EngineRecord) -> None:
    (folder / engine.file).write_bytes(read_engine(bundle.path, engine.key))
    (folder / _RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(engine), indent=2) + b"\n")
    _write_labels(bundle, folder)
    command = build_tool_command(engine, engine.file, bundle.manifest.image.shape)
    notes = build_notes(bundle, engine.key.graph, engine.file, engine=engine, command=command)
    (folder / NOTES).write_text(notes, encoding="utf-8")


def _write_triton(bundle: Bundle, folder: Path, graph: str, engine: EngineRecord | None, config: PackConfig) -> None:
    name = config.model_name or bundle.manifest.name
    if not _MODEL_NAME.fullmatch(name):
        raise UsageError(f"{bundle.path}: its name {name!r} is none for Triton; {_NAME_RULE}. Give it one with --name.")
    largest = config.max_batch or MAX_BATCH
    delay = config.max_queue_delay_us
    model = TritonModel(
        name=name,
        image=bundle.manifest.image.shape,
        classes=len(bundle.manifest.labels),
        plan=engine is not None,
        batches=(1, largest, largest) if engine is None else engine.key.batches,
        max_queue_delay_us=MAX_QUEUE_DELAY_US if delay is None else delay,
        gpu=config.gpu or engine is not None,
        comments=tuple(build_notes(bundle, graph, None, engine=engine).splitlines()),
    )
    if delay is not None and not model.is_dynamic:
        raise UsageError(f"max_queue_delay_us is {delay}, and with a batch of {largest} only nothing ever waits.")
    version = folder / name / "1"
    version.mkdir(parents=True)
    if engine is None:
        _copy_graph(bundle, graph, version / model.file)
    else:
        (version / model.file).write_bytes(read_engine(bundle.path, engine.key))
    _write_labels(bundle, folder / name)
    (folder / name / CONFIG).write_text(build_config(model), encoding="utf-8")


def build_tool_command(engine: EngineRecord, path: str, image: tuple[int, int, int]) -> str:
    """The line that runs ``engine``, lying at ``path``, in its product's own tool; ``image`` is (height, width, 3).

    Shapes are named only where the batch is free, and then the one that the engine was tuned for: a static engine
    needs none.
    """
    smallest, best, largest = engine.key.batches
    words = [_TOOLS[engine.key.product], f"--loadEngine={path}"]
    if smallest < largest:
        words.append(f"--shapes={INPUT}:{'x'.join(map(str, (best, *image)))}")
    return shlex.join(words)


def _build_command(bundle: Bundle, folder: Path, engine: EngineRecord | None, config: PackConfig) -> str | None:
    if config.target == "triton":
        return shlex.join(["tritonserver", f"--model-repository={folder}"])
    if engine is None:
        return None
    return build_tool_command(engine, str(folder / engine.file), bundle.manifest.image.shape)


def _copy_graph(bundle: Bundle, graph: str, target: Path) -> None:
    """Copy the bundle's file, and check what has arrived."""
    name = bundle.graph(graph).file
    shutil.copyfile(bundle.verified_path(name), target)
    if hash_file(target) != bundle.manifest.files[name].sha256:
        raise BundleError(f"{target}: the copy is not what {bundle.path / name} was. Check the disk and try again.")


def _write_labels(bundle: Bundle, folder: Path) -> None:
    (folder / LABELS).write_text("".join(f"{label}\n" for label in bundle.manifest.labels), encoding="utf-8")


@contextmanager
def _write_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder``, which takes its place when the block ends without an error."""
    folder = folder.resolve()  # "." has no sibling
    made = [each for each in folder.parents if not each.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.partial-") as staging:
            content = Path(staging) / "content"  # a folder of its own: the staging folder is not for others to read
            content.mkdir()
            yield content
            content.rename(folder)  # the system refuses to put it over a folder that is no longer empty
    except BaseException:  # Ctrl-C too
        for each in made:
            with suppress(OSError):  # not made yet, or somebody else's by now
                each.rmdir()
        raise
