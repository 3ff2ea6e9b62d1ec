"""What is in a bundle: its manifest, its engines, and which of them this machine can run. Loads no graph, no plan."""

from __future__ import annotations

import msgspec

from vggedge_runtime.bundle import Bundle, Manifest
from vggedge_runtime.device import gpu_name
from vggedge_runtime.engine_cache import (
    EngineKey,
    EngineRecord,
    EngineRequirement,
    Mismatch,
    compare_key,
    read_engine,
    scan_engines,
)
from vggedge_runtime.engine_layers import EngineLayer
from vggedge_runtime.errors import BundleError, EngineError, MissingDependency, UsageError
from vggedge_runtime.evidence import LayerRecord
from vggedge_runtime.progress import Advance
from vggedge_runtime.tensorrt_api import load_tensorrt

_SHORTEST_PREFIX = 4  # digits of a fingerprint that name an engine


class Tensor(msgspec.Struct, frozen=True):
    """An input or output of every graph, by the one graph contract; ``N`` is the batch."""

    name: str
    type: str
    shape: tuple[int | str, ...]


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """One engine.

    Attributes:
        record: its engine.json.
        fits: whether this machine can run it, by the rule of find_engine and at its best batch; None where that is
            not known, because no GPU is here.
        mismatches: what keeps it from fitting. Without a GPU that can only be its graph, which is another one now.
    """

    record: EngineRecord
    fits: bool | None
    mismatches: tuple[Mismatch, ...]


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a bundle.

    Attributes:
        bundle: its folder.
        size_bytes: of all files that the manifest covers and all plans, as recorded.
        inputs: of every graph.
        outputs: of every graph.
        manifest: all of it.
        gpu: of this machine; None where there is none,
        no_gpu: and then why.
        engines: by the names of their folders.
        unreadable: one sentence for every engine whose record cannot be read.
        damaged: one sentence for every file and plan that is not what was written; None: not looked for.
    """

    bundle: str
    size_bytes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    manifest: Manifest
    gpu: str | None
    no_gpu: str | None
    engines: dict[str, EngineView]
    unreadable: tuple[str, ...]
    damaged: tuple[str, ...] | None = None


class LayerListing(msgspec.Struct, frozen=True, kw_only=True):
    """Layers of a graph, of engines, or of both.

    Attributes:
        graph: name of the graph; None where an engine was asked for.
        layers: the graph's convolutions and dense layers.
        engines: kernels of each engine, by the name of its folder.
    """

    graph: str | None
    layers: tuple[LayerRecord, ...]
    engines: dict[str, tuple[EngineLayer, ...]]


def inspect_bundle(bundle: Bundle) -> Inspection:
    """Look at the manifest, at every engine.json, and at this machine. No hash is checked: find_damage does that."""
    manifest, scan = bundle.manifest, scan_engines(bundle.path)
    try:
        gpu, no_gpu = gpu_name(), None
    except EngineError as error:
        gpu, no_gpu = None, str(error)
    versions = {} if gpu is None else _installed_versions({each.key.product for each in scan.records.values()})
    engines = {}
    for name, record in scan.records.items():
        mismatches = _compare(record.key, manifest, gpu, versions)
        fits = False if mismatches else None if gpu is None else True
        engines[name] = EngineView(record=record, fits=fits, mismatches=mismatches)
    plans = sum(each.size_bytes for each in scan.records.values())
    return Inspection(
        bundle=str(bundle.path),
        size_bytes=plans + sum(each.size_bytes for each in manifest.files.values()),
        inputs=(Tensor("images", "uint8", ("N", *manifest.image.shape)),),
        outputs=(Tensor("probabilities", "float32", ("N", len(manifest.labels))),),
        manifest=manifest,
        gpu=gpu,
        no_gpu=no_gpu,
        engines=engines,
        unreadable=scan.unreadable,
    )


def find_damage(bundle: Bundle, found: Inspection, progress: Advance) -> tuple[str, ...]:
    """Hash every file that the manifest covers and every plan; a sentence for each that is not what was written."""
    damaged = list(found.unreadable)
    total = len(found.manifest.files) + len(found.engines)
    for done, name in enumerate(found.manifest.files, start=1):
        try:
            bundle.verified_path(name)
        except BundleError as error:
            damaged.append(str(error))
        progress(done, total, "checking hashes")
    for done, engine in enumerate(found.engines.values(), start=len(found.manifest.files) + 1):
        try:
            read_engine(bundle.path, engine.record.key)
        except EngineError as error:
            damaged.append(str(error))
        progress(done, total, "checking hashes")
    return tuple(damaged)


def list_layers(found: Inspection, name: str) -> LayerListing:
    """Layers of the graph ``name`` and of its engines; or of the engine that ``name`` begins the fingerprint of.

    Raises:
        UsageError: there is no such graph and no such engine.
        BundleError: there is, and it says nothing of its layers.
    """
    graph = found.manifest.graphs.get(name)
    prefix = name if len(name) >= _SHORTEST_PREFIX else None
    engines = {
        folder: engine.record
        for folder, engine in found.engines.items()
        if engine.record.key.graph == name or (prefix is not None and folder.startswith(prefix))
    }
    if graph is None and not engines:
        there = [*found.manifest.graphs, *found.engines]
        raise UsageError(
            f"--layers {name!r} is no graph and no engine of {found.bundle}, which has: {', '.join(there)}. Of a "
            f"fingerprint the first {_SHORTEST_PREFIX} digits are needed at the least."
        )
    layers = graph.layers if graph is not None else ()
    kernels = {folder: record.audit.layers for folder, record in engines.items() if record.audit is not None}
    if not layers and not kernels:
        raise BundleError(
            f"{found.bundle}: it says nothing of the layers of {name}: a graph from before export recorded them, or an "
            "engine whose builder did not tell. Export the bundle again for those of its graphs."
        )
    return LayerListing(graph=None if graph is None else name, layers=layers, engines=kernels)


def _installed_versions(products: set[str]) -> dict[str, str]:
    """Versions of those products that can be imported here."""
    versions = {}
    for product in products:
        try:
            versions[product] = load_tensorrt(product).version
        except (MissingDependency, UsageError):  # not installed; or a product that this vggedge does not know
            continue
    return versions


def _compare(key: EngineKey, manifest: Manifest, gpu: str | None, versions: dict[str, str]) -> tuple[Mismatch, ...]:
    """In which fields the engine is not what this machine and this bundle need at the engine's own batch."""
    graph = manifest.graphs.get(key.graph)
    sha256 = "of no graph" if graph is None else manifest.files[graph.file].sha256
    if gpu is None:
        return () if key.graph_sha256 == sha256 else (Mismatch("graph_sha256", key.graph_sha256, sha256),)
    wanted = EngineRequirement(
        product=key.product,
        version=versions.get(key.product, "none, as it is not installed here"),
        device=gpu,
        graph=key.graph,
        graph_sha256=sha256,
        batch=key.batches[1],
    )
    return compare_key(key, wanted)
