"""ONNX to engine bytes, for TensorRT or TensorRT-RTX. Precision is in the graph; nothing is chosen here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vggedge_export.audit import audit_layers, build_audit, check_audit, network_facts
from vggedge_export.graph import INPUT
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.device import gpu_name
from vggedge_runtime.engine_cache import EngineKey, EngineRecord, write_engine
from vggedge_runtime.engine_layers import EngineAudit
from vggedge_runtime.errors import EngineError, UsageError
from vggedge_runtime.graphs import GRAPHS
from vggedge_runtime.tensorrt_api import TensorRtApi, shared_logger, target_member


@dataclass(frozen=True)
class EngineConfig:
    """Choices of one engine build.

    Attributes:
        batches: smallest, best and largest batch; three times 1 is the static batch of low latency.
    """

    batches: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        smallest, best, largest = self.batches
        if not 1 <= smallest <= best <= largest:
            raise UsageError(f"batches are {self.batches}; needed is 1 <= smallest <= best <= largest.")


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in memory.

    Attributes:
        plan: its bytes, owned by TensorRT.
        audit: what its kernels are; None where the product printed no layer table that can be read.
    """

    plan: memoryview
    audit: EngineAudit | None


def graphs_for(product: str, graphs: list[str]) -> list[str]:
    """Those of ``graphs`` that are laid out for ``product``."""
    return [name for name in graphs if product in GRAPHS[name].made_for]


def check_buildable(api: TensorRtApi) -> None:
    """Raise EngineError now, not after minutes, where the product needs a GPU to build and there is none."""
    _devices(api)


def build_engine(api: TensorRtApi, source: Path, image: tuple[int, int, int], config: EngineConfig) -> memoryview:
    """Build one strongly typed engine.

    Args:
        api: the product that builds it.
        source: ONNX file of the one graph contract (``images`` uint8 (N, h, w, 3)).
        image: (height, width, 3).
        config: batches.

    Returns:
        The plan's bytes, owned by TensorRT.

    Raises:
        EngineError: as build_audited_engine.
    """
    return build_audited_engine(api, source, image, config).plan


def build_audited_engine(
    api: TensorRtApi, source: Path, image: tuple[int, int, int], config: EngineConfig
) -> BuiltEngine:
    """Build one strongly typed engine, as build_engine does, and look at what its kernels are.

    Raises:
        EngineError: the graph does not parse or does not build, with what TensorRT said; or the engine does not
            run a convolution in INT8 that the graph quantises.
    """
    trt: Any = api.module
    logger = shared_logger(api)
    logger.lines.clear()
    builder = trt.Builder(logger)
    # 10.x needs the flag, 11.x and RTX know nothing else.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        reasons = "; ".join(_parser_reason(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineError(f"{api.product} {api.version} does not parse the graph: {reasons}.")
    settings = builder.create_builder_config()
    settings.max_aux_streams = 0  # VGG is a chain; a second stream only adds synchronisation
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *((batch, *image) for batch in config.batches))
    if settings.add_optimization_profile(profile) < 0:  # the index of the profile, -1 if it is invalid
        raise EngineError(f"{api.product} {api.version} does not take the batches {config.batches}.")
    _set_targets(api, settings)
    # TensorRT proper times its kernels for minutes and prints another table: there, nothing is built twice.
    audit = _audit(api, builder, network, settings) if api.builds_without_gpu else None
    return BuiltEngine(_build_plan(api, builder, network, settings), audit)


def _build_plan(api: TensorRtApi, builder: Any, network: Any, settings: Any) -> memoryview:
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        lines = shared_logger(api).lines
        said = "; ".join(text for severity, text in lines if severity in {"ERROR", "INTERNAL_ERROR"})
        raise EngineError(f"{api.product} {api.version} does not build the graph: {said or 'it gave no reason'}.")
    return memoryview(plan)  # a view: the plan of a full VGG is half a gigabyte


def _audit(api: TensorRtApi, builder: Any, network: Any, settings: Any) -> EngineAudit | None:
    """Build once to see the layers, and check them; None where the builder prints no layer table.

    The table costs a build of its own, of which nothing is kept, because the verbosity that prints it is written
    into the plan (one byte; the rest is the same), and there it makes every enqueue slower: NVIDIA, TensorRT API,
    IExecutionContext.nvtx_verbosity. TensorRT-RTX compiles here and tunes on the device, so that this takes 0.1 s
    for a compact VGG and 0.4 to 3 s for the full VGG-16.
    """
    verbosity = getattr(api.module, "ProfilingVerbosity", None)
    if verbosity is None or not hasattr(settings, "profiling_verbosity"):
        return None
    usual = settings.profiling_verbosity
    settings.profiling_verbosity = verbosity.DETAILED
    _build_plan(api, builder, network, settings)
    settings.profiling_verbosity = usual
    rows = audit_layers(text for _, text in shared_logger(api).lines)
    if not rows:
        return None
    facts = network_facts(api.module, network)
    audit = build_audit(rows, facts)
    check_audit(audit, facts)
    return audit


def build_into(bundle: Path, api: TensorRtApi, graph: str, config: EngineConfig) -> EngineRecord:
    """Build the engine of one graph of the bundle at ``bundle`` and store it there."""
    opened = Bundle.open(bundle)
    source = opened.graph(graph).file
    started = time.perf_counter()
    built = build_audited_engine(api, opened.verified_path(source), opened.manifest.image.shape, config)
    key = EngineKey(
        product=api.product,
        version=api.version,
        devices=_devices(api),
        graph=graph,
        graph_sha256=opened.manifest.files[source].sha256,
        batches=config.batches,
        options={},
    )
    return write_engine(bundle, key, built.plan, time.perf_counter() - started, built.audit)


def _parser_reason(error: Any) -> str:
    """What the parser says, and about which node: the description of an unknown op is the word "false"."""
    where = f"{error.node_operator()} {error.node_name()!r}: " if error.node_operator() else ""
    return f"{where}{error.code().name}, {error.desc()}"


def _set_targets(api: TensorRtApi, settings: Any) -> None:
    """Name every target there is; without a GPU here the build cannot ask for "this one"."""
    if not api.builds_without_gpu:
        return
    settings.num_compute_capabilities = len(api.targets)
    for index, target in enumerate(api.targets):
        if not settings.set_compute_capability(target_member(api, target), index):
            raise EngineError(f"{api.product} {api.version} refuses the target {target}.")


def _devices(api: TensorRtApi) -> tuple[str, ...]:
    return api.targets if api.builds_without_gpu else (gpu_name(),)
