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
        golden_tolerance: wherever ``golden_tolerance()`` knows nothing tighter for a backend.
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
        "11-bit mantissas round after every layer on a GPU; on a CPU they do not round at all: 6e-4 seen",
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
        "as int8, and FP16 between the layers, which ONNX Runtime does not round to on a CPU: 8e-2 seen",
    ),
    "mixed": GraphKind("int8", ("tensorrt",), 2e-1, "as int8-rtx: it has FP16 between the layers, too"),
    "mixed-rtx": GraphKind("int8", ("tensorrt_rtx",), 2e-1, "as int8-rtx"),
}
"""In the order in which export makes them. A mixed graph stands in the place of an INT8 one that lost too much."""


_GOLDEN_ON: dict[tuple[str, str], tuple[float, str]] = {
    ("int8", "ort"): (
        5e-2,
        "the golden answer came from ONNX Runtime itself; another order of summing turns one activation to the other "
        "INT8 value: on four compact VGGs, 1409 images, 3.2e-2 at most between ONNX Runtime's own optimisation levels; "
        "a shift by one pixel gives more on 85 to 99 of 100 choices of four images",
    ),
    ("int8", "openvino"): (
        5e-2,
        "as on ONNX Runtime: 1.3e-3 at most on the golden images of ten graphs, above 5e-2 on 2 of 2095 other images; "
        "golden images shifted by a pixel are off by more on four VGGs for hands (on one for digits, whose pixels are "
        "coarse, three of four shifts pass), and sums that overflow by 6e-2 to 9e-1 on four graphs of five",
    ),
}
"""(graph, backend) -> tolerance and the reason for it, where it is not the graph's own."""


def golden_tolerance(graph: str, backend: str) -> float:
    """Largest difference of a probability from the golden answer at which a session still counts as healthy.

    The top-1 class must match wherever its margin exceeds it.
    """
    row = _GOLDEN_ON.get((graph, backend))
    return row[0] if row else GRAPHS[graph].golden_tolerance


def graphs_of(precision: str) -> tuple[str, ...]:
    """Names of the graphs that serve ``precision``."""
    return tuple(name for name, kind in GRAPHS.items() if kind.precision == precision)
