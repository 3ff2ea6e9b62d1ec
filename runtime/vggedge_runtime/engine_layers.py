"""What TensorRT made of a graph: its kernels, as the builder tells them, and what they amount to.

Stored in engine.json, so that whoever asks why an engine is slow need not build it again.
"""

from __future__ import annotations

import msgspec


class EngineLayer(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the builder's layer table, in the words of the product.

    Attributes:
        name: the product's own name for it.
        kind: ``correlation`` (convolution), ``gemm`` (dense), ``maxpool``, ``kgen`` (a generated kernel, mostly of
            elementwise operations), ``runtime_fusion`` (compiled on the device).
        inputs: different types it reads (``Int8``, ``Half``, ``Float``, ``UInt8``), in order.
        weights: different types of its constants of two or more dimensions; one value a channel does not count.
        outputs: different types it writes.
        nodes: ONNX nodes that it comes from, as far as the product tells; one node may be in several rows.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


class EngineAudit(msgspec.Struct, frozen=True, kw_only=True):
    """What the rows amount to. Convolutions and dense layers go by the names of their ONNX nodes.

    Attributes:
        layers: the rows, in the order in which they run.
        convolutions: convolutions in the graph.
        dense: dense layers in the graph; a convolution whose result is one place is one, too.
        int8: convolutions and dense layers that read Int8 input and Int8 weights.
        not_int8: those that the graph quantises, and whose kernel reads something else.
        untold: those that the graph quantises, and that no row names as its own; nothing is known of them.
        extra_kernels: kernels that compute no convolution, no dense layer and no pooling: the head, the softmax, and
            whatever could not be fused.
        extra_after: of these, how many stand behind each convolution or dense layer and before the next one.
        quantizations: steps that round to Int8, alone or as part of a kernel. Each of ``int8`` needs one; more are
            Q/DQ pairs in bad places, which TensorRT may also hide in a longer kernel, without one more of them.
        float_pools: pooling kernels that do not read Int8, in an engine of an INT8 graph.
        float32_kernels: kernels that write Float32, the answer itself not counted.
        unasked_float32: of these, those where the graph is FP16.
    """

    layers: tuple[EngineLayer, ...]
    convolutions: int
    dense: int
    int8: tuple[str, ...]
    not_int8: tuple[str, ...]
    untold: tuple[str, ...]
    extra_kernels: int
    extra_after: dict[str, int]
    quantizations: int
    float_pools: int
    float32_kernels: int
    unasked_float32: tuple[str, ...]
