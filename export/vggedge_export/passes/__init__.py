"""Graph passes: one change each, one file each, run in the order of one table.

A pass is a function ``run(graph) -> int`` that changes the graph in place and returns how many places it
changed. It never swallows a failure, and leaves alone what it does not recognise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vggedge_export.graph import Graph
from vggedge_export.passes import (
    affine_to_batchnorm,
    flatten_without_transpose,
    fold_batchnorm,
    fold_batchnorm_after_relu,
    fold_bias,
    fold_channel_order,
    fold_constants,
    fold_padding,
    hoist_transposes,
    matmul_to_gemm,
    name_layers,
    raise_opset,
    rewrite_erfc,
)
from vggedge_runtime.bundle import PassRecord


@dataclass(frozen=True)
class Pass:
    """One graph change.

    Attributes:
        name: for reports; the file's name.
        run: changes the graph in place, returns the number of changes.
        why: what it is good for, and why here in the order.
    """

    name: str
    run: Callable[[Graph], int]
    why: str


PASSES: tuple[Pass, ...] = (
    Pass(
        "rewrite_erfc",
        rewrite_erfc.run,
        "tf2onnx passes TensorFlow's Erfc on, which ONNX does not have; before anything asks ONNX about its ops",
    ),
    Pass(
        "raise_opset",
        raise_opset.run,
        "FP16 scales of Q/DQ need opset 19; early, so that all others see one opset",
    ),
    Pass(
        "fold_constants",
        fold_constants.run,
        "weights arrive through Transpose, Reshape and Squeeze; before patterns",
    ),
    Pass(
        "fold_channel_order",
        fold_channel_order.run,
        "RGB to BGR costs nothing in a kernel's order; it would stop the Transposes on their way up",
    ),
    Pass("hoist_transposes", hoist_transposes.run, "one layout change, in the head; pairs cancel on the way up"),
    Pass(
        "fold_padding",
        fold_padding.run,
        "zeros around an image are the convolution's own; needs NCHW, where pads of channels and places are told apart",
    ),
    Pass(
        "fold_bias",
        fold_bias.run,
        "an Add a channel behind a convolution is its bias; needs NCHW constants, and BatchNorm then finds the Conv",
    ),
    Pass(
        "affine_to_batchnorm",
        affine_to_batchnorm.run,
        "Mul+Add a channel is one node again; needs NCHW constants",
    ),
    Pass(
        "fold_batchnorm",
        fold_batchnorm.run,
        "BatchNorm straight after a convolution costs nothing in its weights",
    ),
    Pass(
        "flatten_without_transpose",
        flatten_without_transpose.run,
        "permuted dense rows replace the last Transpose",
    ),
    Pass(
        "matmul_to_gemm",
        matmul_to_gemm.run,
        "bias joins its product, weights in the (out, in) order of Q/DQ axis 0",
    ),
    Pass(
        "name_layers",
        name_layers.run,
        "every node and weight carries its Keras layer's name; last, nothing moves now",
    ),
)

NOT_APPLIED: tuple[Pass, ...] = (
    Pass(
        "fold_batchnorm_after_relu",
        fold_batchnorm_after_relu.run,
        "exact, and without a gain (benchmarks/batchnorm_fold.py, compact VGG-16): TensorRT-RTX plans as many kernels "
        "in all four graphs, accuracy is the same, ONNX Runtime gains 2 %, OpenVINO loses 6 to 15 %",
    ),
)
"""Passes that are right, and that measurements speak against; for whoever measures again."""


def apply_passes(graph: Graph, passes: tuple[Pass, ...] = PASSES) -> list[PassRecord]:
    """Run the passes in order on ``graph``, in place; unused nodes and weights are dropped after each."""
    records = []
    for step in passes:
        before = len(graph.nodes)
        changes = step.run(graph)
        graph.drop_unused()
        records.append(PassRecord(step.name, changes, before, len(graph.nodes)))
    return records
