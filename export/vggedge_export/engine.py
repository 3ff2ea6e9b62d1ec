"""ONNX to engine bytes, for TensorRT or TensorRT-RTX. Precision is in the graph; nothing is chosen here.

What can take minutes and half the machine's memory runs in a process of its own: see building.py. The functions here
do the work itself, in whatever process they are called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vggedge_export.audit import LayerTableRow, audit_layers, build_audit, network_facts
from vggedge_export.build_monitor import build_monitor
from vggedge_export.engine_config import EngineConfig, check_options
from vggedge_export.engine_inspector import check_precision, inspect_plan
from vggedge_export.graph import INPUT
from vggedge_export.timing_cache import attach_timing_cache, keep_timing_cache
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.device import gpu_name
from vggedge_runtime.engine_cache import EngineKey, EngineRecord, write_engine
from vggedge_runtime.engine_layers import EngineAudit
from vggedge_runtime.errors import EngineError
from vggedge_runtime.graphs import GRAPHS
from vggedge_runtime.tensorrt_api import TensorRtApi, shared_logger, target_member

__all__ = [
    "BuildContext",
    "BuiltEngine",
    "EngineConfig",
    "Watch",
    "build_audited_engine",
    "build_engine",
    "build_into",
    "check_buildable",
    "engine_key",
    "graphs_for",
    "keep_fastest",
]

Watch: TypeAlias = Callable[[float], bool]
"""``watch(share)``: this share of a build, 0 to 1, is done; the answer says whether to go on."""


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in memory.

    Attributes:
        plan: its bytes, owned by TensorRT.
        audit: what its kernels are; None where the product tells it neither while building nor afterwards.
    """

    plan: memoryview
    audit: EngineAudit | None


@dataclass(frozen=True)
class BuildContext:
    """What goes with a build and does not make the engine another one.

    Attributes:
        workspace_bytes: limit for the memory that kernels may use beside weights and activations; None leaves the
            product's own, which is all of the device's memory.
        watch: told how far the build is; stops it.
        timing_cache: file that keeps timings of kernels; None keeps none.
    """

    workspace_bytes: int | None = None
    watch: Watch = lambda share: True
    timing_cache: Path | None = None


def graphs_for(product: str, graphs: list[str]) -> list[str]:
    """Those of ``graphs`` that are laid out for ``product``."""
    return [name for name in graphs if product in GRAPHS[name].made_for]


def check_buildable(api: TensorRtApi) -> None:
    """Raise EngineError now, not after minutes, where the product needs a GPU to build and there is none."""
    _devices(api, EngineConfig())


def build_engine(api: TensorRtApi, source: Path, image: tuple[int, int, int], config: EngineConfig) -> memoryview:
    """Build one strongly typed engine.

    Args:
        api: the product that builds it.
        source: ONNX file of the one graph contract (``images`` uint8 (N, h, w, 3)).
        image: (height, width, 3).
        config: choices.

    Returns:
        The plan's bytes, owned by TensorRT.

    Raises:
        EngineError: as build_audited_engine.
    """
    return build_audited_engine(api, source, image, config).plan


def build_audited_engine(
    api: TensorRtApi,
    source: Path,
    image: tuple[int, int, int],
    config: EngineConfig,
    context: BuildContext | None = None,
) -> BuiltEngine:
    """Build one strongly typed engine, as build_engine does, and look at what its kernels are.

    Raises:
        UsageError: an option that this product lacks.
        EngineError: the graph does not parse or does not build, with what TensorRT said; or the engine does not
            run a convolution in the precision that the graph asks for.
        KeyboardInterrupt: the watch of ``context`` stopped it.
    """
    check_options(api, config)
    context = context or BuildContext()
    logger = shared_logger(api)
    logger.lines.clear()
    builder = api.module.Builder(logger)
    network = builder.create_network(api.network_flags)
    parser = api.module.OnnxParser(network, logger)  # owns the network's weights: it must outlive the build
    if not parser.parse_from_file(str(source)):
        reasons = "; ".join(_parser_reason(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineError(f"{api.product} {api.version} does not parse the graph: {reasons}.")
    settings = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *((batch, *image) for batch in config.batches))
    if settings.add_optimization_profile(profile) < 0:  # the index of the profile, -1 if it is invalid
        raise EngineError(f"{api.product} {api.version} does not take the batches {config.batches}.")
    _apply_options(api, settings, config, context)
    build = _Build(api, builder, network, settings)
    return build.tuned(context) if api.tunes_while_building else build.for_targets(context)


def build_into(
    bundle: Path,
    api: TensorRtApi,
    graph: str,
    config: EngineConfig,
    *,
    context: BuildContext | None = None,
    measure: Callable[[memoryview], float] | None = None,
) -> EngineRecord:
    """Build the engine of one graph of the bundle at ``bundle`` and store it there.

    Args:
        bundle: folder.
        api: the product that builds it.
        graph: name of the graph.
        config: choices; of ``keep_best`` builds the fastest is kept.
        context: as of build_audited_engine.
        measure: latency of a plan, ms; needed where more than one is built.
    """
    opened = Bundle.open(bundle)
    source = opened.verified_path(opened.graph(graph).file)
    context = context or BuildContext()
    started = time.perf_counter()

    def build(index: int) -> BuiltEngine:
        part = BuildContext(
            context.workspace_bytes,
            lambda share: context.watch((index + share) / config.keep_best),
            context.timing_cache,
        )
        return build_audited_engine(api, source, opened.manifest.image.shape, config, part)

    built = keep_fastest(build, config.keep_best, measure)
    key = engine_key(opened, api, graph, config)
    return write_engine(bundle, key, built.plan, time.perf_counter() - started, built.audit)


def keep_fastest(
    build: Callable[[int], BuiltEngine], count: int, measure: Callable[[memoryview], float] | None
) -> BuiltEngine:
    """Build ``count`` times and keep the fastest; a single one is not timed.

    TensorRT times kernels while it builds, and noise in that decides between kernels of nearly the same speed, so
    that engines of one graph differ.
    """
    best = build(0)
    if count == 1:
        return best
    if measure is None:
        raise EngineError(f"{count} engines cannot be compared: nothing here times them. Build one.")
    fastest_ms = measure(best.plan)
    for index in range(1, count):
        other = build(index)
        latency_ms = measure(other.plan)
        if latency_ms < fastest_ms:
            best, fastest_ms = other, latency_ms
    return best


def engine_key(bundle: Bundle, api: TensorRtApi, graph: str, config: EngineConfig) -> EngineKey:
    """What an engine of ``graph`` depends on, if it is built here and now by ``config``."""
    file = bundle.graph(graph).file
    return EngineKey(
        product=api.product,
        version=api.version,
        devices=_devices(api, config),
        graph=graph,
        graph_sha256=bundle.manifest.files[file].sha256,
        batches=config.batches,
        options=config.options,
    )


class _Build:
    """One network, ready to be built."""

    def __init__(self, api: TensorRtApi, builder: Any, network: Any, settings: Any) -> None:
        self._api, self._builder, self._network, self._settings = api, builder, network, settings
        verbosity = getattr(api.module, "ProfilingVerbosity", None)
        self._detailed = verbosity.DETAILED if verbosity and hasattr(settings, "profiling_verbosity") else None

    def for_targets(self, context: BuildContext) -> BuiltEngine:
        """Build for devices that are elsewhere: once to see the layers in the builder's log, and once to keep.

        The table costs a build of its own, of which nothing is kept, because the verbosity that prints it is written
        into the plan (one byte; the rest is the same), and there it makes every enqueue slower: NVIDIA, TensorRT API,
        IExecutionContext.nvtx_verbosity. TensorRT-RTX compiles here and tunes on the device, so that this takes 0.1 s
        for a compact VGG and 0.4 to 1 s for the full VGG-16.
        """
        if self._detailed is None:
            return BuiltEngine(self._plan(context.watch), None)
        usual = self._settings.profiling_verbosity
        self._settings.profiling_verbosity = self._detailed
        self._plan(lambda share: context.watch(share / 2))
        self._settings.profiling_verbosity = usual
        rows = audit_layers(text for _, text in shared_logger(self._api).lines)
        audit = _audit(self._api, self._network, rows)
        return BuiltEngine(self._plan(lambda share: context.watch((1 + share) / 2)), audit)

    def tuned(self, context: BuildContext) -> BuiltEngine:
        """Build for the GPU here, which takes minutes, so once; then load it and ask it for its layers.

        Only a plan of detailed verbosity tells them. What that costs at every enqueue, a runtime takes back with
        IExecutionContext.nvtx_verbosity, which may be lowered.
        """
        api, settings = self._api, self._settings
        if self._detailed is not None:
            settings.profiling_verbosity = self._detailed
        attach_timing_cache(api, settings, context.timing_cache)
        plan = self._plan(context.watch)
        keep_timing_cache(api, settings, context.timing_cache)
        rows = inspect_plan(api, plan, network_facts(api.module, self._network)) if self._detailed is not None else ()
        return BuiltEngine(plan, _audit(api, self._network, rows))

    def _plan(self, watch: Watch) -> memoryview:
        monitor = _set_monitor(self._api, self._settings, watch)
        plan = self._builder.build_serialized_network(self._network, self._settings)
        if monitor is not None and monitor.was_stopped:
            raise KeyboardInterrupt
        if plan is None:
            lines = shared_logger(self._api).lines
            said = "; ".join(text for severity, text in lines if severity in {"ERROR", "INTERNAL_ERROR"})
            raise EngineError(
                f"{self._api.product} {self._api.version} does not build the graph: {said or 'it gave no reason'}."
            )
        return memoryview(plan)  # a view: the plan of a full VGG is half a gigabyte


def _audit(api: TensorRtApi, network: Any, rows: Sequence[LayerTableRow]) -> EngineAudit | None:
    """What the rows amount to, checked; None where the product told none."""
    if not rows:
        return None
    facts = network_facts(api.module, network)
    audit = build_audit(rows, facts)
    check_precision(audit, facts)
    return audit


def _set_monitor(api: TensorRtApi, settings: Any, watch: Watch) -> Any:
    """Let the build tell how far it is, where the product can; None where it cannot."""
    if not hasattr(api.module, "IProgressMonitor") or not hasattr(settings, "progress_monitor"):
        return None
    monitor = build_monitor(api.module, watch)
    settings.progress_monitor = monitor
    return monitor


def _apply_options(api: TensorRtApi, settings: Any, config: EngineConfig, context: BuildContext) -> None:
    trt: Any = api.module
    settings.max_aux_streams = 0  # VGG is a chain; a second stream only adds synchronisation
    workspace = context.workspace_bytes or config.workspace_bytes
    if workspace is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if not config.tf32:
        settings.clear_flag(trt.BuilderFlag.TF32)
    if config.optimization_level is not None:
        settings.builder_optimization_level = config.optimization_level
    if api.builds_without_gpu:
        # Every target by name: without a GPU here the build cannot ask for "this one".
        targets = _devices(api, config)
        settings.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            if not settings.set_compute_capability(target_member(api, target), index):
                raise EngineError(f"{api.product} {api.version} refuses the target {target}.")


def _parser_reason(error: Any) -> str:
    """What the parser says, and about which node: the description of an unknown op is the word "false"."""
    where = f"{error.node_operator()} {error.node_name()!r}: " if error.node_operator() else ""
    return f"{where}{error.code().name}, {error.desc()}"


def _devices(api: TensorRtApi, config: EngineConfig) -> tuple[str, ...]:
    """What an engine is for; targets in rising order, so that a set of them has one key however it was named."""
    if not api.builds_without_gpu:
        return (gpu_name(),)
    return tuple(sorted(config.targets or api.targets, key=lambda target: tuple(map(int, target.split(".")))))
