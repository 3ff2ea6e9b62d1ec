"""What can be chosen of an engine, and which product has the choice."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vggedge_runtime.errors import UsageError
from vggedge_runtime.tensorrt_api import TensorRtApi

_LEVELS = range(6)
_LARGEST_BATCH = 2**31 - 1  # what a dimension of TensorRT's C++ interface counts to, at the least
_LARGEST_WORKSPACE = 2**63 - 1


@dataclass(frozen=True)
class EngineConfig:
    """Choices of one engine build; what no product takes is refused here, before anything is built.

    Attributes:
        batches: smallest, best and largest batch; three times 1 is the static batch of low latency.
        targets: compute capabilities to build for, ahead of time ("8.9"); none is all those of the product that
            run INT8. TensorRT-RTX only.
        workspace_bytes: most that kernels may use beside weights and activations; None is a share of what is free
            (build_memory.estimate_need), and no limit ahead of time, for devices that are not at hand.
        optimization_level: 0 (fast build) to 5 (every tactic); None is the product's default, 3. TensorRT only.
        tf32: whether float32 products may be rounded to TF32, whose mantissa has 11 bits, as FP16's; False for an
            engine that is to be compared with the fp32 graph. Products of FP16 and INT8 are what they are.
        timing_cache: whether timings of kernels are kept between builds; None is yes, where they are of use: not
            with TensorRT-RTX, and not where several builds are to differ.
        keep_best: so many engines are built, timed, and the fastest is kept. TensorRT with a GPU only.
    """

    batches: tuple[int, int, int] = (1, 1, 1)
    targets: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    tf32: bool = True
    timing_cache: bool | None = None
    keep_best: int = 1

    def __post_init__(self) -> None:
        smallest, best, largest = self.batches
        if not 1 <= smallest <= best <= largest <= _LARGEST_BATCH:
            raise UsageError(
                f"batches are {self.batches}; needed is 1 <= smallest <= best <= largest <= {_LARGEST_BATCH}."
            )
        self._check_targets()
        if self.workspace_bytes is not None and not 1 <= self.workspace_bytes <= _LARGEST_WORKSPACE:
            raise UsageError(
                f"the workspace is {self.workspace_bytes:.4g} bytes; needed is 1 or more, say 1 GB, and no more than "
                "64-bit numbers count."
            )
        if self.optimization_level is not None and self.optimization_level not in _LEVELS:
            raise UsageError(f"the optimisation level is {self.optimization_level}; known: 0 to {_LEVELS[-1]}.")
        if self.keep_best < 1:
            raise UsageError(f"the best of {self.keep_best} engines is to be kept; needed is 1 or more.")
        if self.keep_best > 1 and self.timing_cache:
            raise UsageError(
                f"{self.keep_best} engines are to be built and a timing cache used: with one the builds choose the "
                "same kernels, and there is nothing to compare. Leave one of both out."
            )

    def _check_targets(self) -> None:
        wrong = [target for target in self.targets if not re.fullmatch(r"\d+\.\d", target)]
        if wrong:
            raise UsageError(f"{', '.join(map(repr, wrong))}: no compute capability, which looks like 8.9 or 12.0.")
        if len(set(self.targets)) < len(self.targets):
            raise UsageError(f"the targets {', '.join(self.targets)} name one of them twice; name each once.")

    @property
    def options(self) -> dict[str, str]:
        """Those choices that make the engine another one, as its key holds them; what is left at its default is not.

        A workspace that follows from the memory that happens to be free is none of them: each build would then look
        like another engine.
        """
        given = {
            "optimization_level": self.optimization_level,
            "tf32": None if self.tf32 else "off",
            "workspace_bytes": self.workspace_bytes,
        }
        return {name: str(value) for name, value in given.items() if value is not None}


def check_options(api: TensorRtApi, config: EngineConfig) -> None:
    """Raise UsageError for a choice that the product at hand does not have, and say which has it."""
    if api.tunes_while_building:
        if config.targets:
            raise UsageError(
                f"targets are {', '.join(config.targets)}, and {api.product} {api.version} builds for the GPU at hand "
                "only. TensorRT-RTX builds for others: --for rtx."
            )
        return
    unknown = [target for target in config.targets if target not in api.known_targets]
    if unknown:
        raise UsageError(
            f"{api.product} {api.version} has no target {', '.join(unknown)}; it has: {', '.join(api.known_targets)}."
        )
    lacking = {
        "an optimisation level": config.optimization_level is not None,
        "a timing cache": config.timing_cache is True,
        f"the best of {config.keep_best} builds": config.keep_best > 1,
    }
    for choice, is_asked in lacking.items():
        if is_asked:
            raise UsageError(
                f"{choice} is asked for, and {api.product} {api.version} builds the same plan with it: it times its "
                "kernels on the device, when the engine is loaded. TensorRT has it: --for tensorrt, with a GPU."
            )
