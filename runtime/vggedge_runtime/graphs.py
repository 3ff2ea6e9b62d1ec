"""The graphs a bundle can hold, what each is for, and how far an answer may lie from the golden one."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class GraphKind:
    """What one graph of a bundle is.

    Attributes:
        precision: what the user asks for.
        made_for: products and backends it is laid out for.
        golden_tolerance: largest difference of a probability from the golden answer at which a session
            still counts as healthy; the top-1 class must match wherever its margin exceeds it.
        why: the reason for that tolerance.
    """

    precision: str
    made_for: tuple[str, ...]
    golden_tolerance: float
    why: str


GRAPHS: dict[str, GraphKind] = {
    "fp32": GraphKind(
        "fp32",
        ("ort", "tensorrt", "tensorrt_rtx"),
        1e-3,
        "summation order differs between kernels and CPUs: about 1e-6 seen, a wrong layout gives above 1e-1",
    ),
    "fp16": GraphKind(
        "fp16",
        ("tensorrt", "tensorrt_rtx"),
        2e-2,
        "11-bit mantissas round after every layer on a GPU; on a CPU they do not round at all",
    ),
    "int8": GraphKind(
        "int8",
        ("tensorrt",),
        2e-1,
        "an activation between two INT8 values goes either way: 8e-2 seen between two right ways to round",
    ),
    "int8-rtx": GraphKind(
        "int8",
        ("tensorrt_rtx",),
        2e-1,
        "as int8, and FP16 between the layers",
    ),
}
"""In the order in which export makes them."""


def graphs_of(precision: str) -> tuple[str, ...]:
    """Names of the graphs that serve ``precision``."""
    return tuple(name for name, kind in GRAPHS.items() if kind.precision == precision)
