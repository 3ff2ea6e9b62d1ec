"""Picks TensorRT or TensorRT-RTX and says what the one at hand can do.

One adapter for TensorRT 10.3 (JetPack 6) and later, 11.x, and TensorRT-RTX 1.4 and later. Features are found by
asking the module for them, never from version numbers: the products differ in dozens of places, and a version table
is wrong the day after it is written.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vggedge_runtime.dependencies import is_installed, require
from vggedge_runtime.errors import EngineError, MissingDependency, UsageError

PRODUCTS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
"""Product, which is also its import name -> the extra that installs it; in the order of preference."""


@dataclass(frozen=True)
class TensorRtApi:
    """One TensorRT module and what it offers.

    Attributes:
        product: ``tensorrt`` or ``tensorrt_rtx``; their engines are not interchangeable.
        version: of the module.
        module: the module itself.
        builds_without_gpu: whether engines can be built for a set of compute capabilities, with no GPU here.
        targets: compute capabilities that such a build can name ("8.6"), those that run INT8.
    """

    product: str
    version: str
    module: ModuleType
    builds_without_gpu: bool
    targets: tuple[str, ...]

    @property
    def known_targets(self) -> tuple[str, ...]:
        """Every compute capability that the module has a name for; 7.5, too, which turns INT8 into FP16."""
        return _target_names(getattr(self.module, "ComputeCapability", None))

    @property
    def tunes_while_building(self) -> bool:
        """Whether the build times kernels on a GPU: then the level, a timing cache and a second build matter.

        What can be built for a set of devices is tuned on the device, when it is loaded.
        """
        return not self.builds_without_gpu

    @property
    def network_flags(self) -> int:
        """Flags of a strongly typed network: TensorRT 10 must be told, 11 may be, and later there may be no flag."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)


def installed_products() -> tuple[str, ...]:
    """Products whose module can be found here, without importing them."""
    return tuple(name for name in PRODUCTS if is_installed(name))


def choose_product(product: str = "auto", *, has_gpu: bool = True) -> str:
    """The product named, or with ``auto`` the first that is installed and can build here; imports none.

    Args:
        product: ``auto``, ``tensorrt`` or ``tensorrt_rtx``.
        has_gpu: whether there is a GPU to build on. Without one ``auto`` passes over TensorRT if TensorRT-RTX, which
            needs none, is installed too.

    Raises:
        UsageError: no such product.
        MissingDependency: ``auto``, and none is installed.
    """
    if product == "auto":
        there = installed_products()
        if not there:
            raise MissingDependency(
                "neither tensorrt nor tensorrt_rtx is installed, and one of them builds the engines. On a PC: "
                "pip install 'vggedge[rtx]'; on a Jetson TensorRT comes with JetPack; or export with --no-engine."
            )
        return there[0] if has_gpu else there[-1]
    if product not in PRODUCTS:
        raise UsageError(f"TensorRT product {product!r} is unknown; known: auto, {', '.join(PRODUCTS)}.")
    return product


def load_tensorrt(product: str = "auto") -> TensorRtApi:
    """Import a TensorRT product: the one named, or with ``auto`` the first that is installed.

    Raises:
        UsageError: no such product.
        MissingDependency: it is not installed, or does not import.
    """
    product = choose_product(product)
    module = require(product, PRODUCTS[product])
    capabilities = getattr(module, "ComputeCapability", None)
    return TensorRtApi(
        product=product,
        version=str(module.__version__),
        module=module,
        builds_without_gpu=capabilities is not None,
        # 7.5 (Turing) needs a plan of its own and turns INT8 into FP16, so it is no default target.
        targets=tuple(name for name in _target_names(capabilities) if float(name) >= 8),
    )


def target_member(api: TensorRtApi, target: str) -> Any:
    """Member of the product's ComputeCapability for ``"8.6"``; EngineError lists the known ones."""
    member = getattr(api.module.ComputeCapability, "SM" + target.replace(".", ""), None)
    if member is None:
        raise EngineError(f"{api.product} {api.version} has no target {target!r}; it has: {', '.join(api.targets)}.")
    return member


def _target_names(capabilities: Any) -> tuple[str, ...]:
    numbers = sorted(int(name[2:]) for name in dir(capabilities) if name.startswith("SM") and name[2:].isdigit())
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


_loggers: dict[str, Any] = {}
_lock = threading.Lock()


def shared_logger(api: TensorRtApi) -> Any:
    """The process's logger for this product, with a list ``lines`` of (severity name, text).

    TensorRT takes the first logger of a process and ignores all later ones, so there is one. Clear
    ``lines`` before what you want to read about.
    """
    with _lock:
        if api.product not in _loggers:
            _loggers[api.product] = _logger_class(api)()
        return _loggers[api.product]


def _logger_class(api: TensorRtApi) -> Any:
    trt: Any = api.module
    # TensorRT-RTX tells its layers so; TensorRT, which tunes, every kernel that it tries, hundreds of thousands.
    ignored = set() if api.builds_without_gpu else {"VERBOSE"}

    class Lines(trt.ILogger):  # type: ignore[misc]
        """Keeps what TensorRT says instead of printing it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name not in ignored:
                self.lines.append((severity.name, message))

    return Lines
