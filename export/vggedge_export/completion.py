"""From the class scores that a model gives to the probabilities that the graph contract promises.

The end of the graph tells what the scores are. What is missing is added twice, apart from each other: as nodes to
the graph, and in NumPy's float64 to the answers of Keras that the graph is then compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vggedge_export.graph import OUTPUT, Graph, make_node, value_info
from vggedge_runtime.errors import ModelError

if TYPE_CHECKING:
    import onnx

SHAPE_OPS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Dropout"})
"""What moves values and does not change them."""

_KERNELS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_LINEAR = SHAPE_OPS | {
    "Add", "Sub", "Sum", "Mean", "Concat", "BatchNormalization", "ReduceMean", "ReduceSum", "AveragePool",
    "GlobalAveragePool", "ReduceMax", "GlobalMaxPool", "Gather", "Slice",
}  # fmt: skip
"""What makes logits of logits, or chooses among them."""
_CHOICES = frozenset({"Max", "Min"})  # of several; with a constant it is a relu
_LINEAR_WITH_CONSTANT = frozenset({"Mul", "Div"})  # a temperature; a product of two activations is none

_SUM_TOLERANCE = 1e-3  # a float32 softmax over thousands of classes sums to 1 within 1e-5
_SMALLEST_SUM = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Completion:
    """What a model's scores are, and so what is missing.

    Attributes:
        scores: ``softmax``: probabilities by construction; ``probabilities``: by observation; ``sigmoid`` of each
            unit; ``log-softmax``; or ``logits``.
        units: of the output; 1 stands for two classes.
    """

    scores: Literal["softmax", "probabilities", "sigmoid", "log-softmax", "logits"]
    units: int

    @property
    def words(self) -> str | None:
        """What is done about it, for the user; None where nothing is."""
        pair = "one unit became two classes, [1 - p, p]"
        return {
            "softmax": None,
            "probabilities": "output: taken as it is; the model has no softmax at its end, but on every evaluation "
            "image its scores are probabilities (none below 0, sum 1)",
            "sigmoid": f"output: {pair}, p being the unit's sigmoid"
            if self.units == 1
            else f"output: the {self.units} sigmoids, each a class against the rest, are divided by their sum",
            "log-softmax": "output: softmax in the place of the model's log-softmax",
            "logits": f"output: {pair}; the unit has no activation, p is the sigmoid of what it gives"
            if self.units == 1
            else "output: softmax added, the model gives logits",
        }[self.scores]


def complete_graph(graph: Graph, scores: NDArray[np.float32]) -> Completion:
    """Add to ``graph``, in place, what makes its output probabilities of at least two classes.

    Args:
        graph: after the passes; its output is (N, units).
        scores: the model's own answers to the evaluation images, (n, units).

    Raises:
        ModelError: the scores are neither probabilities nor anything that becomes some, or are all the same class.
    """
    completion = Completion(_find_scores(graph, scores), scores.shape[1])
    if completion.scores in ("softmax", "probabilities"):
        return completion
    last = _without_shape_ops(graph, OUTPUT)
    layer = "head" if last is None else layer_name(last)
    if last is not None and completion.scores != "logits":
        graph.remove(last)  # the sigmoid or log-softmax: what follows goes from the logits again
    tensor = graph.free_name(f"{layer}/logits")
    graph.rename_tensor(OUTPUT, tensor)
    graph.outputs = [value_info(OUTPUT, np.float32, ["N", max(2, completion.units)])]
    steps = []
    if completion.units == 1:  # softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)], and keeps the digits of both
        graph.weights[f"{layer}/pair_of_classes"] = np.array([[0, 1]], np.float32)
        steps = ["Mul"]
    elif completion.scores == "sigmoid":  # p / sum(p) is the softmax of log p, and log p is -softplus(-z)
        steps = ["Neg", "Softplus", "Neg"]
    for number, op in enumerate(steps):
        result = graph.free_name(f"{layer}/{op.lower()}" if number < 2 else f"{layer}/log_sigmoid")
        inputs = [tensor, f"{layer}/pair_of_classes"] if op == "Mul" else [tensor]
        graph.nodes.append(make_node(op, inputs, result))
        tensor = result
    graph.nodes.append(make_node("Softmax", [tensor], OUTPUT, graph.free_name(f"{layer}/softmax"), axis=-1))
    return completion


def complete_scores(scores: NDArray[np.float32], completion: Completion) -> NDArray[np.float32]:
    """The same for the answers of Keras, (n, units): probabilities (n, classes), computed in float64.

    Raises:
        ModelError: all sigmoids of an image are 0 in FP32, so that they have no sum to be divided by.
    """
    wide = scores.astype(np.float64)
    if completion.scores in ("softmax", "probabilities"):
        return scores
    if completion.units == 1:
        second = wide if completion.scores == "sigmoid" else np.exp(-np.logaddexp(0, -wide))
        completed = np.concatenate([1 - second, second], axis=1)
    elif completion.scores == "sigmoid":
        completed = wide / _sums(wide)
    else:
        powers = np.exp(wide - wide.max(axis=1, keepdims=True))
        completed = powers / powers.sum(axis=1, keepdims=True)
    result: NDArray[np.float32] = completed.astype(np.float32)
    return result


def _sums(sigmoids: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of every row, (n, 1); ModelError where one is 0."""
    sums = sigmoids.sum(axis=1, keepdims=True)
    if (sums < _SMALLEST_SUM).any():
        raise ModelError(
            f"on {int((sums < _SMALLEST_SUM).sum())} of {len(sums)} evaluation images every one of the "
            f"{sigmoids.shape[1]} sigmoids is 0 in FP32, so they cannot be brought to the sum of 1. Check with "
            "--pixels that the model gets its pixels as in training, or let it end in a softmax."
        )
    return np.asarray(sums, dtype=np.float64)


def _find_scores(
    graph: Graph, scores: NDArray[np.float32]
) -> Literal["softmax", "probabilities", "sigmoid", "log-softmax", "logits"]:
    last = _without_shape_ops(graph, OUTPUT)
    op = "" if last is None else last.op_type
    units = scores.shape[1]
    if last is not None and op in ("Softmax", "LogSoftmax") and units == 1:
        raise ModelError(
            f"the layer {layer_name(last)!r} is a softmax over one unit, which is 1 whatever the image shows. Give it "
            "one unit a class, or one unit and activation='sigmoid'."
        )
    finite = bool(np.isfinite(scores).all())  # else the comparison of the graphs says so
    if last is not None and op == "Softmax":
        if finite and not _are_probabilities(scores):
            raise ModelError(
                f"the softmax of the layer {layer_name(last)!r} runs over another axis than the classes: they do not "
                "sum to 1 on the evaluation images. Apply it to (None, classes), last in the model."
            )
        return "softmax"
    # What the graph says goes before what the images show: sure sigmoids look like probabilities on easy images.
    if op == "Sigmoid":
        return "sigmoid"
    if op == "LogSoftmax":
        return "log-softmax"
    if units > 1 and finite and _are_probabilities(scores):
        return "probabilities"
    culprit = _first_nonlinear(graph, OUTPUT)
    if culprit is not None:
        raise ModelError(
            f"the model ends in the layer {layer_name(culprit)!r}, whose {culprit.op_type} leaves scores that are "
            "neither probabilities of the classes nor logits. Give the last layer activation='softmax' and train it "
            "so; 'sigmoid' or no activation is fine, too."
        )
    return "logits"


def _are_probabilities(scores: NDArray[np.float32]) -> bool:
    return bool(scores.min() >= 0 and np.abs(scores.sum(axis=1) - 1).max() <= _SUM_TOLERANCE)


def _without_shape_ops(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    """What computed the values of ``tensor``, before they were only moved."""
    node = graph.producer(tensor)
    while node is not None and node.op_type in SHAPE_OPS:
        node = graph.producer(node.input[0])
    return node


def _first_nonlinear(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    """The node that keeps ``tensor`` from being linear in the result of a convolution or dense layer, or None."""
    node = graph.producer(tensor)
    if node is None or node.op_type in _KERNELS:
        return None
    moving = [name for name in node.input if name and name not in graph.weights]
    is_scaled = node.op_type in _LINEAR_WITH_CONSTANT and len(moving) == 1
    is_choice = node.op_type in _CHOICES and len(moving) == len(node.input)
    if not (node.op_type in _LINEAR or is_scaled or is_choice):
        return node
    return next((found for name in moving if (found := _first_nonlinear(graph, name)) is not None), None)


def layer_name(node: onnx.NodeProto) -> str:
    """The layer that a node belongs to: its own name if it has the kernel, else what stands before ``/sigmoid``."""
    return str(node.name if node.op_type in _KERNELS else node.name.rpartition("/")[0] or node.name)
