"""How much memory a build takes, and whether there is as much."""

from __future__ import annotations

import msgspec

from vggedge_export.engine_config import EngineConfig
from vggedge_runtime.errors import EngineError
from vggedge_runtime.memory import FreeMemory

_BASE_BYTES = 250_000_000
_HOST_COPIES = 3
_STEP_BYTES = 64_000_000
_MOST_WORKSPACE_BYTES = 4_000_000_000


class MemoryNeed(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that the build of one graph takes, as far as it can be foretold, and what was free.

    Attributes:
        graph: its name.
        graph_bytes: its ONNX file.
        host_bytes: in the host's memory.
        gpu_bytes: in the GPU's; 0 where the build uses none. On a Jetson both come out of one memory.
        workspace_bytes: what kernels may use, part of ``gpu_bytes``; None leaves it to the product.
        free: what was free before the build.
    """

    graph: str
    graph_bytes: int
    host_bytes: int
    gpu_bytes: int
    workspace_bytes: int | None
    free: FreeMemory

    def __str__(self) -> str:
        workspace = (
            f", {_gb(self.workspace_bytes)} of that workspace" if self.workspace_bytes and self.gpu_bytes else ""
        )
        on_gpu = f" and {_gb(self.gpu_bytes)} of the GPU's{workspace}" if self.gpu_bytes else ""
        swap = f" (and {_gb(self.free.swap_bytes)} of swap)" if self.free.swap_bytes else ""
        free = f"{_gb(self.free.host_bytes)} of memory{swap}"
        if self.gpu_bytes and self.free.gpu_bytes is not None:
            free += ", shared with the GPU" if self.free.is_shared else f" and {_gb(self.free.gpu_bytes)} of the GPU's"
        return f"a graph of {_gb(self.graph_bytes)} needs about {_gb(self.host_bytes)} of memory{on_gpu}; free: {free}"


def estimate_need(
    graph: str, graph_bytes: int, config: EngineConfig, free: FreeMemory, *, builds_on_gpu: bool
) -> MemoryNeed:
    """What a build will take.

    The host's part, 0.25 GB and three times the ONNX file, is what TensorRT-RTX 1.7.1 took for the full VGG-16 (peak
    resident sets of 1.85, 1.04 and 0.66 GB for graphs of 553, 277 and 142 MB): the file, the network and the plan.
    TensorRT is taken to need as much there, and on the GPU the weights once; neither was measured.

    The workspace, where none is given, is half of what is then left, rounded down to 64 MB: the other half is for
    activations and for whoever else uses the machine. It is capped at 4 GB, which holds the unfolded input of the
    largest convolution of VGG-16 at batch 64 in FP16 (64 * 224 * 224 * 576 * 2 bytes); more would help no kernel.
    """
    host = _BASE_BYTES + _HOST_COPIES * graph_bytes
    if config.keep_best > 1:
        host += graph_bytes  # the best plan so far, beside the one that is being built
    if not builds_on_gpu or free.gpu_bytes is None:
        return MemoryNeed(
            graph=graph,
            graph_bytes=graph_bytes,
            host_bytes=host,
            gpu_bytes=0,
            workspace_bytes=config.workspace_bytes,
            free=free,
        )
    workspace = config.workspace_bytes
    if workspace is None:
        left = free.gpu_bytes - graph_bytes - (host if free.is_shared else 0)
        half = min(max(0, left) // 2, _MOST_WORKSPACE_BYTES)
        workspace = max(_STEP_BYTES, half // _STEP_BYTES * _STEP_BYTES)
    return MemoryNeed(
        graph=graph,
        graph_bytes=graph_bytes,
        host_bytes=host,
        gpu_bytes=graph_bytes + workspace,
        workspace_bytes=workspace,
        free=free,
    )


def check_fits(need: MemoryNeed) -> None:
    """Raise EngineError for a build that cannot end well, before it begins."""
    free, on_host = need.free, need.host_bytes
    fits_on_gpu = True
    if need.gpu_bytes and free.gpu_bytes is not None:
        fits_on_gpu = need.gpu_bytes <= free.gpu_bytes
        on_host += need.gpu_bytes if free.is_shared else 0
    fits = fits_on_gpu and on_host <= free.host_bytes + free.swap_bytes
    if not fits:
        raise EngineError(f"{need.graph} cannot be built with the memory that is free: {need}. {WHAT_TO_DO}")


WHAT_TO_DO = (
    "Close other programs (a Jetson's desktop takes 0.8 GB), add swap, ask for less with --workspace, build one "
    "precision at a time, or build on a larger machine."
)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
