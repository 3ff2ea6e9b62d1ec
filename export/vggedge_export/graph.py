"""An ONNX graph while it is worked on: nodes in order, weights as NumPy arrays, no protobuf copies.

ONNX's own ModelProto keeps weights as bytes; every look at one copies it, and fc1 of the full VGG-16 is
411 MB. Here a weight is an array that exists once, and a pass is a few lines of list and dict work.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ConversionError

if TYPE_CHECKING:
    import onnx

Weight = NDArray[Any]

INPUT = "images"
OUTPUT = "probabilities"
OPSET = 20
"""The newest that TensorRT 10.3 (JetPack 6) parses; FP16 scales of Q/DQ need 19."""
_IR_VERSION = 9  # goes with opset 20; older parsers refuse newer files


@dataclass
class Graph:
    """A graph under construction.

    Attributes:
        nodes: in topological order.
        weights: constant tensors by name; a 0-d or 1-element array is a scalar.
        inputs: as ONNX value infos (name, type, shape).
        outputs: likewise.
        opset: version of the default operator set.
        layer_of: the model's layer that a weight came from; folding passes it on, so that every node can
            carry the name its author knows (``block3_conv2``).
    """

    nodes: list[onnx.NodeProto]
    weights: dict[str, Weight]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    opset: int = OPSET
    layer_of: dict[str, str] = field(default_factory=dict)
    name: str = "vgg"
    _serial: int = field(default=0, repr=False)

    def copy(self) -> Graph:
        """A graph that can be changed without changing this one; weights are shared, not copied."""
        return replace(
            self,
            nodes=[clone(node) for node in self.nodes],
            weights=dict(self.weights),
            inputs=[clone(value) for value in self.inputs],
            outputs=[clone(value) for value in self.outputs],
            layer_of=dict(self.layer_of),
        )

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        """The node that computes ``tensor``; None for weights and inputs."""
        return next((node for node in self.nodes if tensor in node.output), None)

    def consumers(self, tensor: str) -> list[onnx.NodeProto]:
        """Nodes that read ``tensor``, in order."""
        return [node for node in self.nodes if tensor in node.input]

    def only_consumer(self, tensor: str) -> onnx.NodeProto | None:
        """The one node that reads ``tensor``; None if there are several, none, or it is a graph output."""
        readers = self.consumers(tensor)
        return readers[0] if len(readers) == 1 and not self.is_output(tensor) else None

    def is_output(self, tensor: str) -> bool:
        """Whether ``tensor`` is an output of the graph."""
        return any(value.name == tensor for value in self.outputs)

    def new_name(self, stem: str) -> str:
        """A tensor name that is not taken."""
        taken = set(self.weights) | {name for node in self.nodes for name in node.output}
        while (name := f"{stem}_{self._serial}") in taken:
            self._serial += 1
        return name

    def free_name(self, wanted: str) -> str:
        """``wanted`` where no tensor, weight or node has that name, else with a number behind it."""
        taken = set(self.weights) | {name for node in self.nodes for name in (node.name, *node.output)}
        numbered = (f"{wanted}_{number}" for number in itertools.count(2))
        return next(name for name in itertools.chain([wanted], numbered) if name not in taken)

    def derive(self, old: str, new_stem: str, array: Weight) -> str:
        """Add ``array``, made from the weight ``old``, under a free name; it belongs to the same layer.

        Returns:
            Its name.
        """
        name = self.new_name(new_stem)
        self.weights[name] = array
        if old in self.layer_of:
            self.layer_of[name] = self.layer_of[old]
        return name

    def rename_tensor(self, old: str, new: str) -> None:
        """Rename a tensor everywhere; graph inputs and outputs follow.

        Raises:
            ConversionError: another tensor has the new name; both would silently become one.
        """
        if new != old and (new in self.weights or self.producer(new) is not None):
            raise ConversionError(f"{old} cannot be called {new}: that name is taken. This is a defect in vggedge.")
        for node in self.nodes:
            _replace(node.input, old, new)
            _replace(node.output, old, new)
        for value in (*self.inputs, *self.outputs):
            if value.name == old:
                value.name = new
        if old in self.weights:
            self.weights[new] = self.weights.pop(old)
            if old in self.layer_of:
                self.layer_of[new] = self.layer_of.pop(old)

    def read_from(self, old: str, new: str) -> None:
        """Let every node that reads ``old`` read ``new`` instead."""
        for node in self.nodes:
            _replace(node.input, old, new)

    def remove(self, node: onnx.NodeProto) -> None:
        """Take ``node`` out; its readers read its first input from then on."""
        position = self.index(node)
        source, result = node.input[0], node.output[0]
        del self.nodes[position]
        if self.is_output(result):
            self.rename_tensor(source, result)
        else:
            self.read_from(result, source)

    def index(self, node: onnx.NodeProto) -> int:
        """Position of this very node (protobuf's == compares contents, not identity)."""
        return next(i for i, other in enumerate(self.nodes) if other is node)

    def op_counts(self) -> dict[str, int]:
        """Number of nodes of every op type, most frequent first."""
        return dict(Counter(node.op_type for node in self.nodes).most_common())

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Shape of every tensor that ONNX's shape inference can tell; a dynamic axis is its name."""
        return {
            value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in self._inferred()
            if value.type.tensor_type.HasField("shape")
        }

    def element_types(self) -> dict[str, int]:
        """Code of onnx.TensorProto for the type of every tensor that ONNX's shape inference can tell."""
        return {value.name: value.type.tensor_type.elem_type for value in self._inferred()}

    def _inferred(self) -> list[onnx.ValueInfoProto]:
        """All tensors as ONNX's shape inference finds them.

        Runs on the graph with its weights as inputs, so it costs no copy of them.
        """
        onnx = require("onnx", "export")
        weights = [value_info(name, array.dtype, array.shape) for name, array in self.weights.items()]
        small = {name: array for name, array in self.weights.items() if array.size <= 16}  # Reshape reads these
        inputs = [*self.inputs, *(value for value in weights if value.name not in small)]
        proto = onnx.helper.make_graph(self.nodes, self.name, inputs, self.outputs)
        proto.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in small.items())
        model = onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", self.opset)])
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        return [*inferred.input, *inferred.value_info, *inferred.output]

    def drop_unused(self) -> None:
        """Remove nodes whose results nobody reads, then weights nobody reads."""
        needed = {value.name for value in self.outputs}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.weights = {name: array for name, array in self.weights.items() if name in needed}

    def write(self, path: Path) -> None:
        """Write the graph as an ONNX file, one weight at a time, without a second copy of any.

        Building a ModelProto and serializing it takes twice the weights again, 1.1 GB for VGG-16. The file is
        byte for byte a plain protobuf: the graph message is its nodes, inputs and outputs followed by its
        initializers (onnx.proto: ModelProto.graph is field 7, GraphProto.initializer 5, TensorProto.raw_data 9).

        Raises:
            ConversionError: the graph is not valid ONNX; a pass is broken. Nothing is written then.
        """
        self.check()
        with path.open("wb") as stream:
            stream.writelines(self._chunks())

    def to_bytes(self) -> bytes:
        """The content of the file that ``write`` writes."""
        self.check()
        return b"".join(self._chunks())

    def sha256(self) -> str:
        """Hex digest of the file that ``write`` writes, without writing it."""
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def _chunks(self) -> Iterator[bytes | memoryview]:
        onnx = require("onnx", "export")
        proto = onnx.helper.make_graph(self.nodes, self.name, self.inputs, self.outputs)
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        model = onnx.ModelProto(ir_version=_IR_VERSION, opset_import=opsets, producer_name="vggedge")
        body = proto.SerializeToString()
        heads = {name: _tensor_head(name, array) for name, array in self.weights.items()}
        lengths = {name: len(heads[name]) + self.weights[name].nbytes for name in heads}
        total = len(body) + sum(len(_field(5, size)) + size for size in lengths.values())
        yield model.SerializeToString() + _field(7, total) + body
        for name, array in self.weights.items():
            yield _field(5, lengths[name]) + heads[name]
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

    def check(self) -> None:
        """Run onnx's checker over everything but the weights' values.

        Raises:
            ConversionError: the graph is not valid ONNX.
        """
        onnx = require("onnx", "export")
        twice = [name for name, count in Counter(node.name for node in self.nodes if node.name).items() if count > 1]
        if twice:  # which onnx's checker accepts and ONNX Runtime refuses
            raise ConversionError(f"two nodes are called {twice[0]!r}. This is a defect in vggedge.")
        weights = [value_info(name, array.dtype, array.shape) for name, array in self.weights.items()]
        proto = onnx.helper.make_graph(self.nodes, self.name, [*self.inputs, *weights], self.outputs)
        model = onnx.helper.make_model(
            proto, opset_imports=[onnx.helper.make_opsetid("", self.opset)], ir_version=_IR_VERSION
        )
        try:
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ConversionError(f"the graph is not valid ONNX: {error}. This is a defect in vggedge.") from error


def _tensor_head(name: str, array: Weight) -> bytes:
    """A TensorProto up to and including the length of its raw data."""
    onnx = require("onnx", "export")
    code = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    head: bytes = onnx.TensorProto(name=name, dims=array.shape, data_type=code).SerializeToString()
    return head + _field(9, array.nbytes)


def _field(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def graph_from_model(model: onnx.ModelProto) -> Graph:
    """Take a ModelProto apart; Constant nodes become weights."""
    onnx = require("onnx", "export")
    reference = require("onnx.reference", "export")
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            weights[node.output[0]] = reference.ReferenceEvaluator(node).run(None, {})[0]
        else:
            nodes.append(clone(node))
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    inputs = [clone(value) for value in model.graph.input if value.name not in weights]
    return Graph(nodes, weights, inputs, [clone(value) for value in model.graph.output], opset)


def read_graph(path: Path) -> Graph:
    """Read a graph from an ONNX file."""
    onnx = require("onnx", "export")
    return graph_from_model(onnx.load(path))


def make_node(op: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    """Make one node with one output; the name defaults to the output's."""
    helper = require("onnx", "export").helper
    node: onnx.NodeProto = helper.make_node(op, inputs, [output], name=name or output, **attributes)
    return node


def value_info(name: str, dtype: Any, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """Name, type and shape of a graph input or output; a string is a dynamic axis."""
    helper = require("onnx", "export").helper
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    info: onnx.ValueInfoProto = helper.make_tensor_value_info(name, code, list(shape))
    return info


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute, or ``default``."""
    onnx = require("onnx", "export")
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def nodes_of(graph: Graph, *ops: str) -> Iterator[onnx.NodeProto]:
    """Nodes of these op types, over a snapshot: the graph may change while one iterates."""
    return iter([node for node in graph.nodes if node.op_type in ops])


def _replace(names: Any, old: str, new: str) -> None:
    for position, name in enumerate(names):
        if name == old:
            names[position] = new


def clone(message: Any) -> Any:
    """A copy of a protobuf message that can be changed alone."""
    twin = type(message)()
    twin.CopyFrom(message)
    return twin
