"""Erfc, which tf2onnx passes on as TensorFlow has it, becomes 1 - Erf: Keras's exact gelu is made of it."""

from __future__ import annotations

import numpy as np

from vggedge_export.graph import Graph, make_node, nodes_of

REWRITTEN = frozenset({"Erfc"})
"""What is not ONNX's own and may be in the graph before this pass."""


def run(graph: Graph) -> int:
    """Rewrite every Erfc.

    For large arguments erfc keeps digits that 1 - erf has lost, below 1e-7; gelu multiplies them by its input,
    and they stay far below an FP32 rounding of the activations around them.
    """
    changes = 0
    for node in nodes_of(graph, *REWRITTEN):
        one = graph.new_name("one")
        graph.weights[one] = np.array(1, np.float32)
        inner = graph.new_name(f"{node.input[0]}_erf")
        position = graph.index(node)
        graph.nodes[position : position + 1] = [
            make_node("Erf", [node.input[0]], inner, node.name.replace("Erfc", "Erf")),
            make_node("Sub", [one, inner], node.output[0], node.name),
        ]
        changes += 1
    return changes
