"""A reversal of the image's channels (RGB to BGR) goes into the kernel of the first convolution.

preprocess_input of keras.applications' VGG and ResNet turns the channels round, and so does the image spec of such a
model. A convolution sums over its input channels, so their order can be had by ordering its kernel instead, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vggedge_export.graph import Graph, attribute, nodes_of

if TYPE_CHECKING:
    import onnx

_RANK = 4
_BY_ELEMENT = frozenset({"Add", "Sub", "Mul", "Div", "Relu", "Clip", "Identity"})


def run(graph: Graph) -> int:
    """Fold every reordering of channels that leads to one convolution through nothing that mixes channels."""
    changes = 0
    for node in nodes_of(graph, "Gather", "Concat"):
        found = _reordering(graph, node)
        if found is None:
            continue
        source, axis, order = found
        path = _path_to_convolution(graph, node.output[0], axis, len(order))
        if path is None:
            continue
        back = np.argsort(order)
        for step, place in path:
            _reorder_constants(graph, step, place, back)
        graph.read_from(node.output[0], source)
        graph.drop_unused()
        changes += 1
    return changes


def _reordering(graph: Graph, node: onnx.NodeProto) -> tuple[str, int, list[int]] | None:
    """(source, axis, which source channel each channel is) of a node that does nothing else, or None."""
    axis = int(attribute(node, "axis", 0)) % _RANK
    if node.op_type == "Gather":
        source, indices = node.input[0], graph.weights.get(node.input[1], np.zeros(()))
        order = indices.tolist() if indices.ndim == 1 else []
    else:
        slices = [_single_channel(graph, name, axis) for name in node.input]
        order = [found[1] for found in slices if found is not None]
        if len(order) != len(slices) or len({found[0] for found in slices if found is not None}) != 1:
            return None
        source = next(found[0] for found in slices if found is not None)
    is_whole = sorted(order) == list(range(len(order))) and graph.shapes().get(source, ())[axis:][:1] == (len(order),)
    return (source, axis, order) if is_whole else None


def _single_channel(graph: Graph, tensor: str, axis: int) -> tuple[str, int] | None:
    """(source, channel) where ``tensor`` is a slice of one channel, else None."""
    node = graph.producer(tensor)
    if node is None or node.op_type != "Slice" or len(node.input) < 4:
        return None
    if any(name not in graph.weights or graph.weights[name].size != 1 for name in node.input[1:]):
        return None
    start, end, sliced = (int(graph.weights[name].reshape(())) for name in node.input[1:4])
    return (node.input[0], start) if sliced % _RANK == axis and 0 <= start == end - 1 else None


def _path_to_convolution(
    graph: Graph, tensor: str, axis: int, channels: int
) -> list[tuple[onnx.NodeProto, int]] | None:
    """Nodes from ``tensor`` to the convolution, each with the axis on which its input has the channels; or None."""
    path: list[tuple[onnx.NodeProto, int]] = []
    while (node := graph.only_consumer(tensor)) is not None:
        path.append((node, axis))
        constants = [name for name in node.input if name and name != tensor]
        if any(name not in graph.weights for name in constants):
            return None
        if node.op_type == "Conv":
            kernel = graph.weights[node.input[1]]
            return path if axis == 1 and kernel.shape[1:2] == (channels,) and kernel.ndim == _RANK else None
        if node.op_type == "Transpose":
            axis = list(attribute(node, "perm")).index(axis)
        elif node.op_type == "Pad":
            pads = graph.weights[node.input[1]]
            if pads.size != 2 * _RANK or pads[axis] or pads[axis + _RANK] or len(node.input) > 3:
                return None
        elif node.op_type not in _BY_ELEMENT:
            return None
        tensor = node.output[0]
    return None


def _reorder_constants(graph: Graph, node: onnx.NodeProto, axis: int, back: np.ndarray) -> None:
    """Reorder what ``node`` holds a channel; its copy, for others may read the same."""
    if node.op_type == "Conv":
        kernel = node.input[1]
        node.input[1] = graph.derive(kernel, f"{kernel}_reordered", graph.weights[kernel][:, back])
    elif node.op_type in _BY_ELEMENT:
        for index, name in enumerate(node.input):
            place = axis - _RANK + graph.weights[name].ndim if name in graph.weights else -1
            if place >= 0 and graph.weights[name].shape[place] > 1:
                reordered = np.take(graph.weights[name], back, axis=place)
                node.input[index] = graph.derive(name, f"{name}_reordered", reordered)
