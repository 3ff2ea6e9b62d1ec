"""Where engines lie in a bundle, and what says whether one fits: ``engines/<fingerprint>/``.

The plan stays byte-pure, so that trtexec, Triton and DeepStream read it too; what vggedge knows about it
stands in the engine.json beside it, with the plan's hash.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from vggedge_runtime.engine_layers import EngineAudit
from vggedge_runtime.errors import EngineError

ENGINES = "engines"
_RECORD = "engine.json"


class EngineKey(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine depends on. Two engines with one key are interchangeable; others never are.

    Attributes:
        product: tensorrt or tensorrt_rtx.
        version: of the product.
        devices: one "name (compute capability)", or, ahead of time, the compute capabilities it is for.
        graph: name of the graph.
        graph_sha256: hash of its ONNX file.
        batches: smallest, best and largest batch of its profile.
        options: build options that change the plan.
    """

    product: str
    version: str
    devices: tuple[str, ...]
    graph: str
    graph_sha256: str
    batches: tuple[int, int, int]
    options: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 of the key's canonical JSON; the folder's name."""
        canonical = msgspec.json.encode(self, order="sorted")
        return hashlib.sha256(canonical).hexdigest()[:16]


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The engine.json beside a plan.

    Attributes:
        key: what it was built from and for.
        file: name of the plan beside this record.
        sha256: hash of the plan.
        size_bytes: its length.
        build_seconds: wall time of the build, on the machine that built it.
        audit: what its kernels are. None where nothing is known of them: TensorRT-RTX prints a table of its layers
            while it builds, TensorRT proper prints another one or none; and records from before there was an audit.
    """

    key: EngineKey
    file: str
    sha256: str
    size_bytes: int
    build_seconds: float
    audit: EngineAudit | None = None


def write_engine(
    bundle: Path,
    key: EngineKey,
    plan: bytes | memoryview,
    build_seconds: float,
    audit: EngineAudit | None = None,
) -> EngineRecord:
    """Write a plan and its record into ``bundle/engines/<fingerprint>``; the record last, so it never lies."""
    folder = bundle / ENGINES / key.fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    record = EngineRecord(
        key=key,
        file=f"{key.graph}.engine",
        sha256=hashlib.sha256(plan).hexdigest(),
        size_bytes=len(plan),
        build_seconds=round(build_seconds, 3),
        audit=audit,
    )
    _write(folder / record.file, plan)
    _write(folder / _RECORD, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    return record


def list_engines(bundle: Path) -> list[EngineRecord]:
    """Records of all engines of a bundle, in the order of their graphs' names.

    Raises:
        EngineError: a record cannot be read.
    """
    records = [_read_record(path) for path in (bundle / ENGINES).glob(f"*/{_RECORD}")]
    return sorted(records, key=lambda record: record.key.graph)


def read_engine(bundle: Path, key: EngineKey) -> bytes:
    """The plan that was built for exactly ``key``, its hash checked.

    Raises:
        EngineError: there is none for this key, its record is of another, or its bytes are not what was built.
    """
    folder = bundle / ENGINES / key.fingerprint
    if not (folder / _RECORD).is_file():
        raise EngineError(
            f"{bundle}: no engine of graph {key.graph} for {key.product} {key.version} on {', '.join(key.devices)}."
        )
    record = _read_record(folder / _RECORD)
    for field in key.__struct_fields__:
        found, needed = getattr(record.key, field), getattr(key, field)
        if found != needed:
            raise EngineError(
                f"{folder}: its engine is for {field} {found}, needed is {needed}. Delete it and build it again."
            )
    path = folder / record.file
    plan = path.read_bytes() if path.is_file() else None
    if plan is None or hashlib.sha256(plan).hexdigest() != record.sha256:  # the very bytes that are given out
        raise EngineError(f"{path}: missing or changed since it was built. Delete {folder} and build it again.")
    return plan


def _read_record(path: Path) -> EngineRecord:
    try:
        record = msgspec.json.decode(path.read_bytes(), type=EngineRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: damaged ({error}). Delete {path.parent} and build the engine again.") from error
    if Path(record.file).name != record.file:
        raise EngineError(f"{path}: names the plan {record.file!r} outside its folder; it is not trusted.")
    return record


def _write(path: Path, data: bytes | memoryview) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
