"""The config.pbtxt of a Triton model: a ModelConfig in protobuf's text format, written without protobuf.

What Triton makes of it: NVIDIA, Triton Inference Server, "Model Configuration" and "Batchers", and the file
model_config.proto of triton-inference-server/common, by whose compiled form the tests read the text again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vggedge_export.graph import INPUT, OUTPUT
from vggedge_runtime.errors import UsageError

CONFIG = "config.pbtxt"
LABELS = "labels.txt"

MAX_BATCH = 8
"""Largest batch of an ONNX graph, whose batch is free: as in NVIDIA's examples; the best one for a server, only a
measurement there can tell."""

MAX_QUEUE_DELAY_US = 100
"""How long a request may wait for others: the order of one inference of a compact VGG on a CPU core (0.1 ms), so
that waiting at most about doubles the latency of a request that comes alone."""


class _Enum(str):
    """Name of an enum's value: a token, where other text stands in quotes."""


_Scalar: TypeAlias = str | int | bool
_Value: TypeAlias = "_Scalar | tuple[int, ...] | _Fields"
_Fields: TypeAlias = list[tuple[str, "_Value"]]
"""A message: its fields in order, one that repeats as often as it does."""


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """What a model's configuration depends on.

    Attributes:
        name: of the model, which is that of its folder, too.
        image: (height, width, 3) of the input.
        classes: length of the output.
        plan: whether the file is a TensorRT engine; else it is an ONNX graph.
        batches: smallest, best and largest batch.
        max_queue_delay_us: how long a request may wait for others to share a batch.
        gpu: whether its instances run on a GPU.
        comments: lines for whoever reads the file.
    """

    name: str
    image: tuple[int, int, int]
    classes: int
    plan: bool
    batches: tuple[int, int, int]
    max_queue_delay_us: int
    gpu: bool
    comments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        smallest, _, largest = self.batches
        if 1 < smallest < largest:
            raise UsageError(
                f"the engine takes batches from {smallest} to {largest}, and Triton forms batches from 1 on. Build one "
                "whose smallest batch is 1, or a static one."
            )

    @property
    def is_dynamic(self) -> bool:
        """Whether the batch is free, so that Triton may put requests together."""
        return self.batches[0] < self.batches[2]

    @property
    def file(self) -> str:
        """Name of the model's file, the one that Triton's backend looks for."""
        return "model.plan" if self.plan else "model.onnx"


def build_config(model: TritonModel) -> str:
    """Text of config.pbtxt.

    An engine of a static batch above 1 gets no dynamic batching, because Triton would send it smaller batches when
    time is up: its clients send whole ones.
    """
    smallest, best, largest = model.batches
    fields: _Fields = [("name", model.name)]
    fields.append(("platform", "tensorrt_plan") if model.plan else ("backend", "onnxruntime"))
    fields += [
        ("max_batch_size", largest),
        ("input", _tensor(INPUT, "TYPE_UINT8", model.image, ("format", _Enum("FORMAT_NHWC")))),
        ("output", _tensor(OUTPUT, "TYPE_FP32", (model.classes,), ("label_filename", LABELS))),
        ("version_policy", [("latest", [("num_versions", 1)])]),
        ("instance_group", [("count", 1), ("kind", _Enum("KIND_GPU" if model.gpu else "KIND_CPU"))]),
    ]
    if model.is_dynamic:
        preferred = tuple(sorted({best, largest} - {1}))  # 1 would send off every request alone
        fields.append(
            (
                "dynamic_batching",
                [("preferred_batch_size", preferred), ("max_queue_delay_microseconds", model.max_queue_delay_us)],
            )
        )
    fields += [("model_warmup", _warmup(batch, model.image)) for batch in sorted({smallest, largest})]
    comments = [f"# {line}".rstrip() for text in model.comments for line in text.splitlines() or [""]]
    return "\n".join([*comments, *_lines(fields)]) + "\n"


def _tensor(name: str, data_type: str, dims: tuple[int, ...], more: tuple[str, _Scalar]) -> _Fields:
    return [("name", name), ("data_type", _Enum(data_type)), ("dims", dims), more]


def _warmup(batch: int, image: tuple[int, int, int]) -> _Fields:
    """One request of ``batch`` black images before the model counts as ready; the time does not depend on pixels."""
    data: _Fields = [("data_type", _Enum("TYPE_UINT8")), ("dims", image), ("zero_data", True)]
    return [("name", f"batch {batch}"), ("batch_size", batch), ("inputs", [("key", INPUT), ("value", data)])]


def _lines(fields: _Fields, indent: str = "") -> list[str]:
    """A message in text format, without the braces around it."""
    lines: list[str] = []
    for name, value in fields:
        if isinstance(value, list):
            lines += [f"{indent}{name} {{", *_lines(value, indent + "  "), f"{indent}}}"]
        else:
            lines.append(f"{indent}{name}: {_format(value)}")
    return lines


def _format(value: _Scalar | Sequence[int]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, _Enum)):
        return str(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    return f"[{', '.join(map(str, value))}]"
