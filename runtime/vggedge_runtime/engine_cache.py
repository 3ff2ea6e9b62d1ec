"""Where engines lie in a bundle, and what says whether one fits: ``engines/<fingerprint>/``.

The plan stays byte-pure, so that trtexec, Triton and DeepStream read it too; what vggedge knows about it
stands in the engine.json beside it, with the plan's hash. Engines of several products, versions, devices and
batches lie side by side; whoever wants to run one asks find_engine, and what does not fit never reaches TensorRT.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from vggedge_runtime.bundle import Upgrades, lift
from vggedge_runtime.engine_layers import EngineAudit
from vggedge_runtime.errors import EngineError, UsageError
from vggedge_runtime.tensorrt_api import PRODUCTS

ENGINES = "engines"
ENGINE_FORMAT_VERSION = 1
ENGINE_UPGRADES: Upgrades = {}
"""Of engine.json: one for every version below ENGINE_FORMAT_VERSION."""

_RECORD = "engine.json"
_AHEAD = "tensorrt_rtx"  # the product that builds for compute capabilities instead of one device
_DEVICE = re.compile(r".+ \((\d+\.\d+)\)")


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
        return _fingerprint(self)


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The engine.json beside a plan.

    Attributes:
        format_version: of this schema; records without it are of version 1.
        key: what it was built from and for.
        file: name of the plan beside this record.
        sha256: hash of the plan.
        size_bytes: its length.
        build_seconds: wall time of the build, on the machine that built it.
        built: when, ISO 8601 in UTC; empty in records from before this field.
        audit: what its kernels are. None where nothing is known of them: TensorRT-RTX prints a table of its layers
            while it builds, TensorRT proper prints another one or none; and records from before there was an audit.
    """

    format_version: int = ENGINE_FORMAT_VERSION
    key: EngineKey
    file: str
    sha256: str
    size_bytes: int
    build_seconds: float
    built: str = ""
    audit: EngineAudit | None = None


class EngineRequirement(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine needs of an engine before it may run it.

    Attributes:
        product: tensorrt or tensorrt_rtx, whichever is going to run it.
        version: of the product, here.
        device: the GPU, here: "name (compute capability)", as gpu_name() gives it.
        graph: name of the graph.
        graph_sha256: hash of its ONNX file, now.
        batch: images of a call.
    """

    product: str
    version: str
    device: str
    graph: str
    graph_sha256: str
    batch: int

    def __post_init__(self) -> None:
        if _capability(self.device) is None:
            raise UsageError(f"device {self.device!r} is no GPU's name; needed is one such as 'Orin (8.7)'.")
        if self.batch < 1:
            raise UsageError(f"batch is {self.batch}; needed is 1 or more.")


class Mismatch(msgspec.Struct, frozen=True):
    """A field in which an engine is not what is needed; ``found`` is the engine's."""

    field: str
    found: str
    needed: str

    def __str__(self) -> str:
        return f"{self.field} is {self.found}, needed is {self.needed}"


class EngineScan(msgspec.Struct, frozen=True, kw_only=True):
    """All engines of a bundle.

    Attributes:
        records: those whose record can be read, by the names of their folders in ``engines``; ordered by graph,
            product, version, devices and batches.
        unreadable: one sentence for each of the others: which, why, and what to do.
    """

    records: dict[str, EngineRecord]
    unreadable: tuple[str, ...]


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
        built=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        audit=audit,
    )
    _write(folder / record.file, plan)
    _write(folder / _RECORD, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    return record


def scan_engines(bundle: Path) -> EngineScan:
    """All engines of a bundle; a damaged record, or one from a newer vggedge, does not hide the others."""
    found = list(_scan(bundle))
    records = [(folder.name, each) for folder, each in found if isinstance(each, EngineRecord)]
    return EngineScan(
        records=dict(sorted(records, key=lambda pair: _order(pair[1]))),
        unreadable=tuple(str(each) for _, each in found if isinstance(each, EngineError)),
    )


def list_engines(bundle: Path) -> list[EngineRecord]:
    """Records of all engines of a bundle, in the order of scan_engines.

    Raises:
        EngineError: a record cannot be read.
    """
    scan = scan_engines(bundle)
    if scan.unreadable:
        raise EngineError(scan.unreadable[0])
    return list(scan.records.values())


def find_engine(bundle: Path, wanted: EngineRequirement, report: Callable[[str], object] | None = None) -> EngineRecord:
    """Record of the engine that this machine is to run, of those that fit it (compare_key has the rule).

    Of several, those whose profile is best at just this batch come first, then the newest. Build options do not
    matter for fit: they make a plan faster or smaller, not unfit. The plan itself is not touched: read_engine
    gives it out once its hash was checked.

    Args:
        bundle: the bundle's folder.
        wanted: what is needed.
        report: called with a sentence for each engine whose record cannot be read; the error has them anyway.

    Raises:
        EngineError: none fits; for the nearest one every field that differs, and the command that mends it.
    """
    scan = scan_engines(bundle)
    if report is not None:
        for sentence in scan.unreadable:
            report(sentence)
    fitting = [record for record in scan.records.values() if not compare_key(record.key, wanted)]
    if not fitting:
        raise EngineError(_describe_failure(bundle, wanted, scan))
    return max(fitting, key=lambda each: (each.key.batches[1] == wanted.batch, each.built, each.key.fingerprint))


def compare_key(key: EngineKey, wanted: EngineRequirement) -> tuple[Mismatch, ...]:
    """Every field in which an engine is not what is needed; none if it fits.

    An engine fits the device that it was built on: same name and same compute capability. (Without a build flag that
    vggedge does not set, TensorRT's plans run on no other GPU architecture, and on no other version: NVIDIA, TensorRT
    documentation, Engine Compatibility.) One that TensorRT-RTX built ahead of time fits every device whose compute
    capability is among its targets, and only these. NVIDIA says of plans for which no target was named that they run
    on 8.0, 8.6, 8.9, 12.0 "and later" (TensorRT-RTX documentation, CPU-Only AOT); of plans with named targets, as
    vggedge builds them, no source says that they run on more than these. So 12.0 alone does not fit a 12.1, nor 8.0
    a 9.0. Versions of both products must be equal to the last digit.
    """
    smallest, _, largest = key.batches
    fits = {
        "product": key.product == wanted.product,
        "version": key.version == wanted.version,
        "device": _runs_on(key, wanted.device),
        "graph": key.graph == wanted.graph,
        "graph_sha256": key.graph_sha256 == wanted.graph_sha256,
        "batch": smallest <= wanted.batch <= largest,
    }
    found = {
        "device": ", ".join(key.devices),
        "batch": str(smallest) if smallest == largest else f"{smallest} to {largest}",
    }
    return tuple(
        Mismatch(field, found.get(field) or str(getattr(key, field)), str(getattr(wanted, field)))
        for field, fitting in fits.items()
        if not fitting
    )


def build_command(bundle: Path, product: str, graph: str, batch: int, target: str | None = None) -> str:
    """What a user types to get an engine of this graph for this batch, and for a target that is no usual one."""
    words = ["vggedge", "build", str(bundle), "--for", PRODUCTS.get(product, product)]
    words += ["--precision", graph, "--batch", str(batch)]
    return shlex.join([*words, *(("--target", target) if target is not None else ())])


def read_engine(bundle: Path, key: EngineKey) -> bytes:
    """The plan that was built for exactly ``key``, its hash checked.

    Raises:
        EngineError: there is none for this key, its record is damaged, or its bytes are not what was built.
    """
    for folder, found in _scan(bundle):
        if isinstance(found, EngineError):
            if folder.name == key.fingerprint:
                raise found
        elif found.key == key:  # not by the folder's name: an upgrade may have added to the key
            return _read_plan(folder, found)
    raise EngineError(
        f"{bundle}: no engine of graph {key.graph} for {key.product} {key.version} on {', '.join(key.devices)}. "
        f"Build it with: {build_command(bundle, key.product, key.graph, key.batches[1])}"
    )


def _fingerprint(key: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(key, order="sorted")).hexdigest()[:16]


def _order(record: EngineRecord) -> tuple[Any, ...]:
    key = record.key
    return (key.graph, key.product, key.version, key.devices, key.batches, record.built, key.fingerprint)


def _runs_on(key: EngineKey, device: str) -> bool:
    return device in key.devices or (key.product == _AHEAD and _capability(device) in key.devices)


def _capability(device: str) -> str | None:
    found = _DEVICE.fullmatch(device)
    return None if found is None else found[1]


def _describe_failure(bundle: Path, wanted: EngineRequirement, scan: EngineScan) -> str:
    """Why nothing fits: the nearest engine, field by field, the command, and the engines that could not be read."""
    needed = f"graph {wanted.graph}, batch {wanted.batch}, {wanted.product} {wanted.version} on {wanted.device}"
    target = None
    if scan.records:
        name, differing = _nearest(scan.records, wanted)
        said = "; ".join(map(str, differing))
        why = f"of the {len(scan.records)} in the bundle, {ENGINES}/{name} is nearest: {said}"
        if wanted.product == _AHEAD and "device" in {each.field for each in differing}:
            target = _capability(wanted.device)  # maybe none of those that a build takes when none is named
    else:
        why = "the bundle has none that can be read" if scan.unreadable else "the bundle has none"
    there = "" if wanted.product == _AHEAD else " there"
    command = build_command(bundle, wanted.product, wanted.graph, wanted.batch, target)
    line = f"{bundle}: no engine fits {needed}: {why}. Build one{there} with: {command}"
    return "\n".join((line, *scan.unreadable))


def _nearest(records: dict[str, EngineRecord], wanted: EngineRequirement) -> tuple[str, tuple[Mismatch, ...]]:
    """Folder of the engine that needs least to be changed, the same graph and product first; and what differs."""

    def distance(pair: tuple[str, tuple[Mismatch, ...]]) -> tuple[bool, bool, int]:
        fields = {each.field for each in pair[1]}
        return ("graph" in fields, "product" in fields, len(fields))

    newest_first = sorted(records, key=lambda name: (records[name].built, name), reverse=True)
    return min(((name, compare_key(records[name].key, wanted)) for name in newest_first), key=distance)


def _scan(bundle: Path) -> Iterator[tuple[Path, EngineRecord | EngineError]]:
    """Every folder with a record, in the order of their names, and the record or what is wrong with it."""
    for path in sorted((bundle / ENGINES).glob(f"*/{_RECORD}")):
        try:
            yield path.parent, _read_record(path)
        except EngineError as error:
            yield path.parent, error


def _read_record(path: Path) -> EngineRecord:
    folder = path.parent
    again = f"Delete {folder} and build the engine again."
    try:
        # Records of version 1 were written without one at first.
        data = {"format_version": 1} | msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        otherwise = f"delete {folder} and build the engine again"
        fingerprint = _fingerprint(data.get("key"))  # as it stands: an upgrade may add to the key
        newest = lift(data, ENGINE_FORMAT_VERSION, ENGINE_UPGRADES, EngineError, path, otherwise)
        record = msgspec.convert(newest, EngineRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        raise EngineError(f"{path}: damaged ({error}). {again}") from error
    if Path(record.file).name != record.file:
        raise EngineError(f"{path}: names the plan {record.file!r} outside its folder; it is not trusted.")
    if fingerprint != folder.name:
        raise EngineError(
            f"{path}: its key was changed, or it is not in its own folder: the key's fingerprint is {fingerprint}, "
            f"needed is the folder's name. {again}"
        )
    return record


def _read_plan(folder: Path, record: EngineRecord) -> bytes:
    path = folder / record.file
    plan = path.read_bytes() if path.is_file() else None
    if plan is None or hashlib.sha256(plan).hexdigest() != record.sha256:  # the very bytes that are given out
        raise EngineError(f"{path}: missing or changed since it was built. Delete {folder} and build it again.")
    return plan


def _write(path: Path, data: bytes | memoryview) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
