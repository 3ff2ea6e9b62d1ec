"""The bundle: what export writes, what a device opens, and the hashes that tie both.

Layout (docs/bundle.md has the long form)::

    NAME/  manifest.json  labels.txt
      graphs/model.<graph>.onnx
      golden/inputs.npy  outputs.<graph>.npy
      plans/<graph>.png
      engines/<fingerprint>/<graph>.engine  engine.json

The manifest covers everything but ``engines``: an engine is added later, on the device, and each engine.json
hashes its own plan (engine_cache.py).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import msgspec

from vggedge_runtime.errors import BundleError, UsageError, VggedgeError
from vggedge_runtime.evidence import CalibrationRecord, Comparison, GateRecord, LayerRecord, PrecisionPlan
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.statistics import Proportion

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_ENTRIES = frozenset({MANIFEST, "labels.txt", "report.html", "graphs", "golden", "plans", "engines", "cache"})
"""Everything that vggedge writes into a bundle's top folder."""

Upgrades: TypeAlias = dict[int, Callable[[dict[str, Any]], dict[str, Any]]]
"""From a format version to the function that lifts JSON of it to the next one; ``format_version`` is set for it."""

UPGRADES: Upgrades = {}
"""Of manifests: one for every version below FORMAT_VERSION."""


class FileRecord(msgspec.Struct, frozen=True):
    """One file of the bundle.

    Attributes:
        sha256: hex digest of its content.
        size_bytes: its length.
    """

    sha256: str
    size_bytes: int


class GraphRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One ONNX graph of the bundle.

    Attributes:
        file: path in the bundle.
        precision: what the user asked for: fp32, fp16 or int8.
        made_for: the products it was laid out for.
        op_counts: nodes of every op type.
        evidence: the comparison with the step before.
        layers: its convolutions and dense layers, in order; none in bundles from before this field.
        calibration: where its INT8 ranges come from; None where it has none.
        plan: which layers are INT8 and why, where a budget was set.
        kept_fp32: layers of a graph with FP16 that stay FP32, with the largest magnitude that one of their weights or
            tensors has: FP16 ends at 65504.
        fp32_scales: INT8 layers of such a graph whose scales are FP32, with the magnitude of the input or weights
            whose scale would be below FP16's normal numbers.
    """

    file: str
    precision: str
    made_for: tuple[str, ...]
    op_counts: dict[str, int]
    evidence: Comparison
    layers: tuple[LayerRecord, ...] = ()
    calibration: CalibrationRecord | None = None
    plan: PrecisionPlan | None = None
    kept_fp32: dict[str, float] = {}
    fp32_scales: dict[str, float] = {}


class GoldenRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs that a session runs when it opens, and what it has to answer.

    Attributes:
        inputs: .npy file, uint8 (n, height, width, 3).
        outputs: graph name -> .npy file, float32 (n, classes).
    """

    inputs: str
    outputs: dict[str, str]


class DataRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The images of one purpose, so that evidence can be repeated on the very same.

    Attributes:
        name: as the user named them.
        images: how many.
        sha256: of their decoded and resized pixels, in order.
        seen: of evaluation images, how many had a part in making the graphs, as calibration or selection images of the
            very same pixels. A proof is worth the more, the fewer.
    """

    name: str
    images: int
    sha256: str
    seen: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.images} images"


class PassRecord(msgspec.Struct, frozen=True):
    """One pass: its name, the places it changed, nodes before and after."""

    name: str
    changes: int
    nodes_before: int
    nodes_after: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a bundle says about itself.

    Attributes:
        format_version: of this schema.
        name: the model's name.
        created: ISO 8601 time in UTC.
        parameters: weights of the Keras model.
        image: how an image becomes the input.
        labels: class names, in the order of the output.
        graphs: by name.
        golden: inputs and answers for the check at opening.
        passes: what was done to the converted graph.
        keras_accuracy: of the Keras model on the evaluation images.
        data: the images used: ``calibration`` sets INT8 ranges, ``selection`` chooses among calibrators and plans,
            ``evaluation`` proves.
        tools: versions of what made the bundle.
        files: hash and size of every file that the manifest covers.
        adaptations: what export added to the model to meet the graph contract, in words; bundles from before
            this field have none.
        gate: the accuracy that export had to keep, and the verdicts; None where no limit was set.
    """

    format_version: int
    name: str
    created: str
    parameters: int
    image: ImageSpec
    labels: tuple[str, ...]
    graphs: dict[str, GraphRecord]
    golden: GoldenRecord
    passes: tuple[PassRecord, ...]
    keras_accuracy: Proportion
    data: dict[str, DataRecord]
    tools: dict[str, str]
    files: dict[str, FileRecord]
    adaptations: tuple[str, ...] = ()
    gate: GateRecord | None = None


class Bundle:
    """An opened bundle: its manifest, and its files once their hashes were checked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest; files are checked when they are asked for.

        Raises:
            BundleError: no bundle there, a damaged manifest, or one from a newer vggedge.
        """
        folder = Path(path)
        source = folder / MANIFEST
        if not source.is_file():
            raise BundleError(
                f"{folder}: no {MANIFEST} in it, so this is no bundle. Write one with: "
                "vggedge export MODEL.keras --calibration DATA -o BUNDLE"
            )
        return cls(folder, _parse_manifest(source))

    def verified_path(self, name: str) -> Path:
        """Path of the file ``name``, after its size and sha256 were found to be the manifest's.

        Raises:
            BundleError: the file is missing, was changed, or is not one that the manifest covers.
        """
        record = self.manifest.files.get(name)
        if record is None:
            raise BundleError(f"{self.path}: the manifest covers no file {name!r}. Export the bundle again.")
        path = self.path / name
        if not path.is_file():
            raise BundleError(f"{path}: missing, though the manifest names it. Copy the whole bundle again.")
        if path.stat().st_size != record.size_bytes or hash_file(path) != record.sha256:
            raise BundleError(
                f"{path}: its content is not what export wrote (sha256 differs from the manifest's). "
                "It was changed or damaged on the way; copy or export the bundle again."
            )
        return path

    def graph(self, name: str) -> GraphRecord:
        """Record of the graph ``name``; BundleError lists the graphs there are."""
        try:
            return self.manifest.graphs[name]
        except KeyError:
            there = ", ".join(self.manifest.graphs)
            raise BundleError(f"{self.path}: no graph {name!r} in this bundle; it has: {there}.") from None


@contextmanager
def write_bundle(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; when the block ends without an error it becomes the bundle.

    An older bundle is replaced; anything else that is in the way is not. After an error or Ctrl-C a whole bundle
    is at ``path``, the old one in all but the last instant, or what else was there before. A kill that no program
    can handle (SIGKILL, power cut) leaves the staging folder ``.NAME.partial-PID-*`` behind. If it falls between
    the two renames of the swap, nothing is at ``path`` and the old bundle is ``.NAME.old-PID-*`` beside it. The
    next write to the same ``path`` brings it back and removes such leftovers, once no process has that PID.

    Raises:
        BundleError: ``path`` exists and is no bundle, or nothing can be written there.
    """
    check_replaceable(path)
    path = path.resolve()  # "." has no sibling, and a link would be replaced instead of what it points to
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-{os.getpid()}-", dir=path.parent))
    try:
        staging.chmod(0o755)  # mkdtemp gives 0700; a bundle is copied and served by other users
        yield staging
        _swap(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(path: Path) -> None:
    """Raise BundleError unless a bundle can be written at ``path``: there is a bundle, an empty folder or nothing.

    A damaged bundle or one of another version counts, a folder that holds anything else does not: the whole
    folder is deleted when the new bundle is complete.
    """
    if path.exists():
        _check_ours(path)
    above = next(folder for folder in path.resolve().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BundleError(f"{path}: cannot be written, {above} is no folder that you may write to. Name another place.")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest`` with the records of all files in ``folder`` outside ``engines`` as its ``files``."""
    files = {
        path.relative_to(folder).as_posix(): FileRecord(hash_file(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "engines"
    }
    whole = msgspec.structs.replace(manifest, files=files)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n")


def lift(
    data: dict[str, Any], newest: int, upgrades: Upgrades, kind: type[VggedgeError], source: Path, otherwise: str
) -> dict[str, Any]:
    """JSON of any format version so far as JSON of version ``newest``, lifted one version after the other.

    Args:
        data: as it was read.
        newest: the version that this vggedge writes.
        upgrades: one for every version below ``newest``.
        kind: of the error for what comes from a newer vggedge,
        source: the file that it names,
        otherwise: and what can be done instead of upgrading vggedge.

    Raises:
        VggedgeError: of this kind; the version is above ``newest``.
        msgspec.ValidationError: damaged; no version, one that never was, or a part missing that an upgrade needs.
    """
    version = data.get("format_version")
    if type(version) is not int:  # JSON's true is an int, too
        raise msgspec.ValidationError("format_version is missing or no whole number")
    if version > newest:
        raise kind(
            f"{source}: format version {version}; this vggedge reads up to {newest}. Upgrade vggedge here, or "
            f"{otherwise}."
        )
    if version < 1:
        raise msgspec.ValidationError(f"format_version is {version}; the first one was 1")
    for older in range(version, newest):
        upgrade = upgrades[older]
        try:
            data = upgrade(data) | {"format_version": older + 1}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise msgspec.ValidationError(f"not what format version {older} had: {error!r}") from error
    return data


def hash_file(path: Path) -> str:
    """Sha256 of a file's content, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _parse_manifest(source: Path) -> Manifest:
    try:
        data = msgspec.json.decode(source.read_bytes(), type=dict[str, Any])
        newest = lift(data, FORMAT_VERSION, UPGRADES, BundleError, source, "export the bundle with an older one")
        manifest = msgspec.convert(newest, Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, UsageError) as error:  # UsageError: by ImageSpec
        raise BundleError(f"{source}: damaged manifest ({error}). Copy or export the bundle again.") from error
    _check_files(manifest, source)
    return manifest


def _check_files(manifest: Manifest, source: Path) -> None:
    """Raise BundleError unless all covered files lie in the bundle, and all that a session loads are covered."""
    for name in manifest.files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise BundleError(f"{source}: names the file {name!r} outside the bundle; it is not trusted.")
    graphs, golden = manifest.graphs.values(), manifest.golden
    for name in (*(graph.file for graph in graphs), golden.inputs, *golden.outputs.values()):
        if name not in manifest.files:
            raise BundleError(f"{source}: names the file {name!r} and has no hash of it. Export the bundle again.")


def _check_ours(path: Path) -> None:
    """Raise BundleError unless ``path`` is an empty folder or a bundle with nothing beside what vggedge writes."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else None
    if names is None or (names and not _has_our_manifest(path)):
        raise BundleError(f"{path}: exists and is no bundle, so it is not replaced. Remove it or name another folder.")
    if foreign := sorted(names - _ENTRIES):
        raise BundleError(
            f"{path}: a bundle that also holds {', '.join(foreign)}, which vggedge did not write, so it is not "
            "replaced. Move that elsewhere or name another folder."
        )


def _has_our_manifest(folder: Path) -> bool:
    """Whether the manifest has what those of all versions have; web apps and browser extensions have one too."""
    try:
        data = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return isinstance(data.get("format_version"), int) and "graphs" in data and "golden" in data


def _swap(staging: Path, path: Path) -> None:
    """Put ``staging`` in the place of ``path``; after an error or Ctrl-C one of both is there."""
    if not path.exists():
        staging.rename(path)
        return
    _check_ours(path)  # again: an export takes minutes, and users put files into folders meanwhile
    old = path.with_name(f".{path.name}.old-{staging.name.rpartition('.partial-')[2]}")
    try:
        path.rename(old)
        staging.rename(path)
    except BaseException:  # Ctrl-C too
        if not path.exists():
            old.rename(path)
        raise
    finally:
        if not staging.exists():  # it has become the bundle
            shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(path: Path) -> None:
    """Remove what killed writes left beside ``path``; an old bundle goes back where ``path`` is missing."""
    # The whole of our naming, mkdtemp's eight characters included: a user's own copy is not called so.
    ours = re.compile(re.escape(f".{path.name}.") + r"(partial|old)-(\d+)-[a-z0-9_]{8}")
    for leftover in sorted(path.parent.iterdir()):
        found = ours.fullmatch(leftover.name)
        if found is None or _is_running(int(found[2])):
            continue
        if found[1] == "old" and not path.exists() and _has_our_manifest(leftover):
            leftover.rename(path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
