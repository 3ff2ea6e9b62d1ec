"""TensorRT as it looks from Python, in two versions, on a machine that has a Jetson Orin's GPU but no TensorRT.

Which attributes a class has in 10.3 and in 11 stands in tensorrt_surfaces.json, read from the sources of the Python
bindings in NVIDIA's public repository (tags 10.3 GA and 11.1, the last that is there; what is known of 11.4 does not
differ for these classes). What a version lacks is missing here; what it has and nobody here needs is there and ends
in NotImplementedError. Networks come from real ONNX files. Orders and arguments that TensorRT refuses are refused.

Environment variable FAKE_TENSORRT, JSON, may change what happens: see ANSWERS.
"""

from __future__ import annotations

import enum
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

ANSWERS: dict[str, Any] = {
    "log": None,  # file that gets a line of JSON for every call worth telling
    "errors": [],  # errors of the build, which then gives no plan
    "float": False,  # whether convolutions come out in FP32, whatever the graph says
    "inspector": "detailed",  # or "names"
    "end": None,  # signal that ends the process in the middle of a build, or "hang"
    "latencies_ms": [1.0],  # of the engines of the builds of this process, in turn
    "loads": True,  # whether a plan deserialises
    "gpu": "Orin",  # None: no driver
}
ANSWERS |= json.loads(os.environ.get("FAKE_TENSORRT", "{}"))

SURFACES: dict[str, dict[str, list[str]]] = json.loads(
    Path(__file__).with_name("tensorrt_surfaces.json").read_text(encoding="utf-8")
)
ran_ms = 0.0  # GPU time spent in inferences
builds = 0


def note(call: str, *arguments: Any) -> None:
    if ANSWERS["log"]:
        with Path(ANSWERS["log"]).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([call, *arguments], default=str) + "\n")


class Misuse(Exception):
    """TensorRT would have refused, crashed or silently done something else."""


def refuse(condition: object, reason: str) -> None:
    if condition:
        raise Misuse(reason)


def names_of(name: str, version: str) -> set[str]:
    found = SURFACES[name]
    return {*found["both"], *found[version]}


def limited(kind: type, name: str, version: str, bases: tuple[type, ...] = ()) -> type:
    """``kind`` with exactly the public attributes that class ``name`` has in ``version``."""
    allowed = names_of(name, version)
    slots = kind.__dict__.get("__slots__", ())
    content = {
        key: value
        for key, value in kind.__dict__.items()
        if (key.startswith("_") and key not in {"__dict__", "__weakref__"}) or key in allowed
    }
    content = {key: value for key, value in content.items() if key not in slots}
    extra = {key for key in content if not key.startswith("_")} - allowed
    refuse(extra, f"{name} {version} has no {extra}")
    for missing in allowed - content.keys() - set(slots):
        content[missing] = property(_not_needed(name, missing))
    return type(name, bases or kind.__bases__, content)


def _not_needed(name: str, attribute: str) -> Any:
    def get(self: Any) -> Any:
        raise NotImplementedError(f"{name}.{attribute} exists, and the fake does not have it")

    return get


def members(name: str, version: str) -> Any:
    if name == "NetworkDefinitionCreationFlag":  # the numbers are bits, so they matter
        bits = {
            "EXPLICIT_BATCH": 0,
            "STRONGLY_TYPED": 1,
            "PREFER_JIT_PYTHON_PLUGINS": 2,
            "PREFER_AOT_PYTHON_PLUGINS": 3,
        }
        return enum.IntEnum(name, [(each, bits[each]) for each in sorted(names_of(name, version))])
    return enum.IntEnum(name, sorted(names_of(name, version)), start=0)


class ILogger:
    def __init__(self) -> None:
        self._is_ready = True


class IProgressMonitor:
    def __init__(self) -> None:
        self._is_ready = True


class HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Tensor:
    __slots__ = ("dtype", "name", "shape")

    def __init__(self, name: str, dtype: Any, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class Layer:
    """Name, type, ``metadata``, inputs and outputs; and the attributes of the class that it is cast to."""

    __slots__ = ("_content",)

    def __init__(self, **content: Any) -> None:
        self._content = content

    name = property(lambda self: self._content["name"])
    type = property(lambda self: self._content["type"])
    metadata = property(lambda self: f"[ONNX Layer: {self._content['node']}]")
    num_inputs = property(lambda self: len(self._content["inputs"]))
    num_outputs = property(lambda self: len(self._content["outputs"]))

    def get_input(self, index: int) -> Any:
        return self._content["inputs"][index]

    def get_output(self, index: int) -> Any:
        return self._content["outputs"][index]


class Convolution:
    __slots__ = ()
    num_output_maps = property(lambda self: self._content["kernel"][0])
    kernel_size_nd = property(lambda self: self._content["kernel"][2:])
    num_groups = property(lambda self: self._content["groups"])


class Network:
    __slots__ = ("_inputs", "_layers", "_outputs")

    def __init__(self) -> None:
        self._inputs: list[Any] = []
        self._layers: list[Any] = []
        self._outputs: list[Any] = []

    num_layers = property(lambda self: len(self._layers))
    num_outputs = property(lambda self: len(self._outputs))
    num_inputs = property(lambda self: len(self._inputs))

    def get_layer(self, index: int) -> Any:
        return self._layers[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def get_input(self, index: int) -> Any:
        return self._inputs[index]


class Profile:
    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        refuse(not all(isinstance(each, tuple) for each in (min, opt, max)), "shapes are tuples")
        self._shapes[input] = (min, opt, max)
        note("set_shape", input, min, opt, max)


class TimingCache:
    __slots__ = ("_entries",)

    def __init__(self, entries: list[str]) -> None:
        self._entries = entries

    def serialize(self) -> HostMemory:
        return HostMemory(b"TIMINGS " + json.dumps(self._entries).encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        self._entries += [each for each in input_cache._entries if each not in self._entries]
        return True

    def reset(self) -> bool:
        self._entries.clear()
        return True


class Config:
    __slots__ = (
        "_cache",
        "_flags",
        "_network",
        "_profiles",
        "_trt",
        "_workspace",
        "builder_optimization_level",
        "max_aux_streams",
        "profiling_verbosity",
        "progress_monitor",
    )

    def __init__(self, trt: Any) -> None:
        self._trt, self._cache, self._profiles, self._workspace = trt, None, [], None
        self._flags = {trt.BuilderFlag.TF32}
        self.builder_optimization_level = 3
        self.max_aux_streams = -1
        self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor = None

    def add_optimization_profile(self, profile: Any) -> int:
        for shapes in profile._shapes.values():
            if any(not low <= best <= high for low, best, high in zip(*shapes, strict=True)):
                return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_flag(self, flag: Any) -> None:
        refuse(type(flag) is not self._trt.BuilderFlag, f"{flag!r} is no BuilderFlag")
        note("set_flag", flag.name)
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        refuse(type(flag) is not self._trt.BuilderFlag, f"{flag!r} is no BuilderFlag")
        note("clear_flag", flag.name)
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        refuse(type(pool) is not self._trt.MemoryPoolType, f"{pool!r} is no MemoryPoolType")
        refuse(type(pool_size) is not int, "a pool's size is an int")
        note("set_memory_pool_limit", pool.name, pool_size)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        content = bytes(memoryview(serialized_timing_cache))
        if not content:
            return self._trt.ITimingCache([])
        if not content.startswith(b"TIMINGS "):
            return None  # what TensorRT does with damaged bytes is not known; None is what a factory gives that fails
        return self._trt.ITimingCache(json.loads(content[8:]))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        refuse(ignore_mismatch, "a cache of another device gives wrong timings")
        refuse(cache is None, "incompatible function arguments")
        self._cache = cache
        note("set_timing_cache", len(cache._entries))
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class ParserError:
    __slots__ = ("_what",)

    def __init__(self, what: tuple[str, str, str]) -> None:
        self._what = what

    def node_operator(self) -> str:
        return self._what[0]

    def node_name(self) -> str:
        return self._what[1]

    def desc(self) -> str:
        return self._what[2]

    def code(self) -> Any:
        return enum.Enum("ErrorCode", ["UNSUPPORTED_NODE"])["UNSUPPORTED_NODE"]


class Parser:
    __slots__ = ("_errors", "_network")

    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Any:
        return self._trt_error(self._errors[index])

    def parse_from_file(self, model: str) -> bool:
        refuse(type(model) is not str, "a path is a str")
        note("parse_from_file", model)
        import onnx

        try:
            graph = onnx.shape_inference.infer_shapes(onnx.load(model)).graph
        except Exception as error:
            self._errors.append(("", "", f"Failed to parse the ONNX model: {type(error).__name__}"))
            return False
        strange = [node for node in graph.node if node.op_type in {"StringNormalizer", "LRN"}]
        self._errors += [(node.op_type, node.name, "false") for node in strange]
        if not strange:
            read_network(self._trt_module, self._network, graph)
        return not strange


def read_network(trt: Any, network: Any, graph: Any) -> None:
    """Layers of an ONNX graph, as far as an audit looks: convolutions, products, constants, Q and DQ, and the rest."""
    types = {1: trt.DataType.FLOAT, 10: trt.DataType.HALF, 3: trt.DataType.INT8, 2: trt.DataType.UINT8}
    tensors: dict[str, Any] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = tuple(each.dim_value if each.HasField("dim_value") else -1 for each in kind.shape.dim)
        tensors[value.name] = trt.ITensor(value.name, types.get(kind.elem_type, trt.DataType.INT64), shape)
    kinds = {
        "Conv": "CONVOLUTION",
        "Gemm": "MATRIX_MULTIPLY",
        "MatMul": "MATRIX_MULTIPLY",
        "QuantizeLinear": "QUANTIZE",
        "DequantizeLinear": "DEQUANTIZE",
        "MaxPool": "POOLING",
        "AveragePool": "POOLING",
        "Relu": "ACTIVATION",
        "Softmax": "SOFTMAX",
        "Cast": "CAST",
        "Transpose": "SHUFFLE",
        "Reshape": "SHUFFLE",
        "Flatten": "SHUFFLE",
    }
    for weight in graph.initializer:
        tensor = trt.ITensor(weight.name, types.get(weight.data_type, trt.DataType.INT64), tuple(weight.dims))
        tensors[weight.name] = tensor
        if len(weight.dims) > 1:
            constant = dict(name=weight.name, node=weight.name, type=trt.LayerType.CONSTANT, inputs=[])
            network._layers.append(trt.ILayer(**constant, outputs=[tensor]))
    weights = {weight.name for weight in graph.initializer}
    for node in graph.node:
        inputs = [
            tensors[name] for name in node.input if name and (name not in weights or len(tensors[name].shape) > 1)
        ]
        content = dict(name=node.name, node=node.name, type=trt.LayerType[kinds.get(node.op_type, "ELEMENTWISE")])
        if node.op_type == "Conv":
            content["kernel"] = tuple(tensors[node.input[1]].shape)
            content["groups"] = next((a.i for a in node.attribute if a.name == "group"), 1)
            # A kernel that is a plain initializer is the layer's own; a dequantised one is its second input.
            inputs = inputs[:1] if node.input[1] in weights else inputs[:2]
        elif content["type"] == trt.LayerType.MATRIX_MULTIPLY:
            inputs = inputs[:2]
        network._layers.append(trt.ILayer(**content, inputs=inputs, outputs=[tensors[name] for name in node.output]))
    network._inputs += [tensors[value.name] for value in graph.input]
    network._outputs += [tensors[value.name] for value in graph.output]


class Builder:
    __slots__ = ("_logger",)

    def __init__(self, logger: Any) -> None:
        refuse(not getattr(logger, "_is_ready", False), "a logger that forgot to call ILogger.__init__")
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        known = self._trt_module.NetworkDefinitionCreationFlag
        note("create_network", flags)
        strong = 1 << int(known.STRONGLY_TYPED)
        refuse(
            not flags & strong and hasattr(known, "EXPLICIT_BATCH"), "weakly typed: TensorRT would choose precisions"
        )
        refuse(flags & ~sum(1 << int(each) for each in known), f"unknown flags in {flags}")
        return self._trt_module.INetworkDefinition()

    def create_builder_config(self) -> Any:
        return self._trt_module.IBuilderConfig(self._trt_module)

    def create_optimization_profile(self) -> Any:
        return self._trt_module.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        global builds
        trt = self._trt_module
        note(
            "build_serialized_network",
            {
                "level": config.builder_optimization_level,
                "aux_streams": config.max_aux_streams,
                "verbosity": config.profiling_verbosity.name,
                "flags": sorted(flag.name for flag in config._flags),
            },
        )
        errors = self._find_errors(network, config)
        if errors or not self._go_through(config.progress_monitor):
            for text in errors or ["Build was cancelled"]:
                self._logger.log(enum.Enum("Severity", ["ERROR"])["ERROR"], text)
            return None
        if config._cache is not None:
            config._cache._entries.append(f"build {builds}")
        latency_ms = ANSWERS["latencies_ms"][builds % len(ANSWERS["latencies_ms"])]
        builds += 1
        image = network._inputs[0]
        plan = {
            "version": trt.surface,
            "latency_ms": latency_ms,
            "io": [[image.name, image.dtype, config._profiles[0]._shapes[image.name]]]
            + [[each.name, each.dtype, each.shape] for each in network._outputs],
            "layers": describe_layers(trt, network, config.profiling_verbosity),
        }
        return HostMemory(b"FAKE PLAN " + json.dumps(plan).encode())

    def _find_errors(self, network: Any, config: Any) -> list[str]:
        if not network._outputs:
            return ["Network must have at least one output"]
        if any(-1 in tensor.shape for tensor in network._inputs) and not config._profiles:
            return ["Network has dynamic or shape inputs, but no optimization profile has been defined."]
        for tensor in network._inputs:
            for shape in config._profiles[0]._shapes[tensor.name]:
                if any(had not in (-1, given) for had, given in zip(tensor.shape, shape, strict=True)):
                    return [f"{tensor.name}: static dimensions differ from the profile's"]
        return list(ANSWERS["errors"])

    def _go_through(self, monitor: Any) -> bool:
        steps = 10
        if monitor is not None:
            refuse(not getattr(monitor, "_is_ready", False), "a monitor that forgot to call IProgressMonitor.__init__")
            monitor.phase_start("Building engine", None, steps)
        for index in range(steps):
            if index == steps // 2 and ANSWERS["end"]:
                if ANSWERS["end"] == "hang":
                    time.sleep(120)
                os.kill(os.getpid(), signal.Signals[ANSWERS["end"]])
            if monitor is not None and not monitor.step_complete("Building engine", index):
                monitor.phase_finish("Building engine")
                return False
        if monitor is not None:
            monitor.phase_finish("Building engine")
        return True


def describe_layers(trt: Any, network: Any, verbosity: Any) -> list[Any]:
    """What the inspector tells: convolutions with their relu, products, pools, and a copy before the first of all."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made_by = {tensor.name: layer for layer in layers for tensor in layer._content["outputs"]}
    kept = {trt.LayerType.CONVOLUTION: "CaskConvolution", trt.LayerType.MATRIX_MULTIPLY: "gemm"}
    kept[trt.LayerType.POOLING] = "CaskPooling"
    rows = []
    for layer in layers:
        if layer.type not in kept:
            continue
        inputs = [each.dtype for each in layer._content["inputs"]]
        sources = [made_by.get(each.name) for each in layer._content["inputs"][:2]]
        convolves = layer.type == trt.LayerType.CONVOLUTION
        if len(sources) == 2 and all(each is not None and each.type == trt.LayerType.DEQUANTIZE for each in sources):
            inputs = [trt.DataType.INT8]
        if convolves and ANSWERS["float"]:
            inputs = [trt.DataType.FLOAT]
        row = _describe(trt, layer, kept[layer.type], inputs[0])
        if convolves:
            shape = layer._content["kernel"]
            row["Weights"] = {"Type": _word(trt, inputs[0]), "Count": math.prod(shape)}
            if not any(each["LayerType"] == "CaskConvolution" for each in rows):
                copy = _describe(trt, layer, "Reformat", trt.DataType.UINT8)
                rows.append(copy | {"Name": f"Reformatting CopyNode for Input Tensor 0 to {layer.name}"})
        rows.append(row)
    if verbosity != trt.ProfilingVerbosity.DETAILED or ANSWERS["inspector"] == "names":
        return [row["Name"] for row in rows]
    return rows


def _describe(trt: Any, layer: Any, kind: str, dtype: Any) -> dict[str, Any]:
    return {
        "Name": layer.name,
        "LayerType": kind,
        "Inputs": [_tensor(trt, layer._content["inputs"][0], dtype)],
        "Outputs": [_tensor(trt, layer._content["outputs"][0], layer._content["outputs"][0].dtype)],
        "TacticName": "sm87_xmma",
        "StreamId": 0,
        "Metadata": f"[ONNX Layer: {layer._content['node']}]\x1e[ONNX Layer: {layer._content['node']}/more]",
    }


def _word(trt: Any, dtype: Any) -> str:
    return {"FLOAT": "Float", "HALF": "Half", "INT8": "Int8", "UINT8": "UInt8", "INT64": "Int64"}[dtype.name]


def _tensor(trt: Any, tensor: Any, dtype: Any) -> dict[str, Any]:
    told = {"Name": tensor.name, "Dimensions": list(tensor.shape)}
    sentence = {
        "FLOAT": "Row major linear FP32",
        "HALF": "Channel major FP16 format where channel % 8 == 0",
        "INT8": "Thirty-two wide channel vectorized row major Int8 format",
    }.get(dtype.name, _word(trt, dtype))
    if trt.surface == "10.3":
        return told | {"Format/Datatype": sentence}
    return told | {"Format": sentence, "DataType": _word(trt, dtype)}


class Runtime:
    __slots__ = ("_logger",)

    def __init__(self, logger: Any) -> None:
        refuse(not getattr(logger, "_is_ready", False), "a logger that forgot to call ILogger.__init__")
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        content = bytes(memoryview(serialized_engine))
        plan = json.loads(content[10:]) if content.startswith(b"FAKE PLAN ") else {"version": None}
        if plan["version"] != self._trt_module.surface or not ANSWERS["loads"]:
            self._logger.log(enum.Enum("Severity", ["ERROR"])["ERROR"], "Serialization assertion magicTag failed")
            return None
        return self._trt_module.ICudaEngine(plan)


class Engine:
    __slots__ = ("_plan",)

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan

    num_io_tensors = property(lambda self: len(self._plan["io"]))

    def get_tensor_name(self, index: int) -> str:
        return str(self._plan["io"][index][0])

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt_module.TensorIOMode
        return modes.INPUT if name == self._plan["io"][0][0] else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt_module.DataType(next(dtype for each, dtype, _ in self._plan["io"] if each == name))

    def create_engine_inspector(self) -> Any:
        return self._trt_module.EngineInspector(self._plan)

    def create_execution_context(self) -> Any:
        return self._trt_module.IExecutionContext(self._plan)


class Inspector:
    __slots__ = ("_plan",)

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan

    def get_engine_information(self, format: Any) -> str:
        refuse(type(format) is not self._trt_module.LayerInformationFormat, "no LayerInformationFormat")
        names = [name for name, *_ in self._plan["io"]]
        if self._trt_module.surface == "10.3":
            return json.dumps({"Layers": self._plan["layers"], "Bindings": names})
        return json.dumps({"Layers": self._plan["layers"], "I/O Tensors": [{"Name": name} for name in names]})


class ExecutionContext:
    __slots__ = ("_addresses", "_plan", "_shape", "nvtx_verbosity")

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan, self._addresses, self._shape = plan, {}, None
        self.nvtx_verbosity = self._trt_module.ProfilingVerbosity.DETAILED

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._plan["io"][0][2]
        fits = all(low <= each <= high for low, each, high in zip(smallest, shape, largest, strict=True))
        self._shape = tuple(shape) if fits else None
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        refuse(self._shape is None, "the shape of an output before that of the input")
        if name == self._plan["io"][0][0]:
            return self._shape
        shape = next(shape for each, _, shape in self._plan["io"] if each == name)
        return tuple(self._shape[0] if size == -1 else size for size in shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        refuse(type(memory) is not int or memory == 0, "an address is an int")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        global ran_ms
        refuse(type(stream_handle) is not int, "a stream is told by its handle")
        refuse(self.nvtx_verbosity != self._trt_module.ProfilingVerbosity.NONE, "slow: verbosity of the build")
        if self._shape is None or len(self._addresses) < len(self._plan["io"]):
            return False
        ran_ms += self._plan["latency_ms"]
        return True


class FakeDriver:
    """libcuda on a Jetson Orin, or the error of a machine without one."""

    def __init__(self, name: str) -> None:
        if ANSWERS["gpu"] is None:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuDeviceGetName":
                arguments[0].value = ANSWERS["gpu"].encode()
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 7, 18: 1}[arguments[1]]
            elif name == "cuMemGetInfo_v2":
                arguments[0]._obj.value = 8_000_000_000
            return 0

        return call


def nptype(trt_type: Any) -> Any:
    return {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8}[trt_type.name]


def use_driver() -> None:
    """Let vggedge find the fake's GPU; both functions take the loader of libcuda as an argument with a default."""
    from vggedge_runtime import device, memory

    device.gpu_name.__defaults__ = (FakeDriver,)
    memory.read_free_memory.__defaults__ = (FakeDriver, Path("/"))


def build_module(version: str) -> dict[str, Any]:
    """Content of the module ``tensorrt`` of ``version``, "10.3" or "11.4"."""
    use_driver()
    trt: Any = type("tensorrt", (), {})
    trt.surface = version
    for name in ("BuilderFlag", "MemoryPoolType", "ProfilingVerbosity", "LayerInformationFormat", "TensorIOMode"):
        setattr(trt, name, members(name, version))
    trt.DataType, trt.LayerType = members("DataType", version), members("LayerType", version)
    trt.NetworkDefinitionCreationFlag = members("NetworkDefinitionCreationFlag", version)
    trt.float32, trt.float16, trt.int8, trt.uint8 = (trt.DataType[each] for each in ("FLOAT", "HALF", "INT8", "UINT8"))
    classes = {
        "Builder": Builder,
        "IBuilderConfig": Config,
        "IOptimizationProfile": Profile,
        "ITimingCache": TimingCache,
        "OnnxParser": Parser,
        "ParserError": ParserError,
        "INetworkDefinition": Network,
        "ITensor": Tensor,
        "ILayer": Layer,
        "Runtime": Runtime,
        "ICudaEngine": Engine,
        "EngineInspector": Inspector,
        "IExecutionContext": ExecutionContext,
    }
    for name, kind in classes.items():
        made = limited(kind, name, version)
        made._trt_module = trt
        setattr(trt, name, made)
    trt.OnnxParser._trt_error = staticmethod(trt.ParserError)
    trt.IConvolutionLayer = limited(Convolution, "IConvolutionLayer", version, (trt.ILayer,))
    trt.ILogger, trt.IProgressMonitor, trt.nptype = ILogger, IProgressMonitor, nptype
    return {name: value for name, value in vars(trt).items() if not name.startswith("_")}
