"""Compute once what depends on weights alone.

tf2onnx leaves a Transpose on every kernel, Reshape and Squeeze on every bias and the arithmetic of every
BatchNorm in the graph, because the weights were arguments while it worked.
"""

from __future__ import annotations

from vggedge_export.graph import Graph
from vggedge_runtime.dependencies import require


def run(graph: Graph) -> int:
    """Replace every node that reads only weights by its value; ONNX's reference evaluator computes it."""
    reference = require("onnx.reference", "export")
    kept, folded = [], 0
    for node in graph.nodes:  # topological order: one sweep reaches everything
        if not node.input or any(name and name not in graph.weights for name in node.input):
            kept.append(node)
            continue
        values = {name: graph.weights[name] for name in node.input if name}
        results = reference.ReferenceEvaluator(node).run(None, values)
        owner = next((graph.layer_of[name] for name in values if name in graph.layer_of), None)
        for name, value in zip(node.output, results, strict=True):
            graph.weights[name] = value
            if owner is not None:
                graph.layer_of[name] = owner
        folded += 1
    graph.nodes = kept
    return folded
