"""From a Keras model back to its spec: which VGG it is, told by its layers alone.

Transfer, weight import and dense evaluation need the spec of a model that somebody hands them; no file beside
the model has to be trusted for it. They rely on the spec alone, so a model that computes anything else than
``build_vgg`` of that spec is refused.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from vggedge.architecture import (
    NORMALIZATIONS,
    PIXELS,
    SMALLEST_INPUT,
    SPECS,
    STAGES,
    LayerKind,
    LayerSpec,
    SpecPixels,
    VggSpec,
)
from vggedge.model import import_keras
from vggedge_runtime.errors import ModelError, UsageError

if TYPE_CHECKING:
    import keras

_CONVOLUTION = re.compile(r"block([1-5])_conv\d+")
_DENSE = re.compile(r"fc\d+")
_NEEDED = "Needed is a model that vggedge train or vggedge import-weights wrote, or one with the same layers."

_CLASSES: dict[LayerKind, str] = {
    "rescaling": "Rescaling",
    "conv": "Conv2D",
    "batch_norm": "BatchNormalization",
    "relu": "Activation",
    "lrn": "vggedge>LocalResponseNorm",
    "pool": "MaxPooling2D",
    "flatten": "Flatten",
    "average_pool": "GlobalAveragePooling2D",
    "dense": "Dense",
    "dropout": "Dropout",
}
"""The class that ``build_vgg`` uses, by the name under which Keras saves it."""

_SETTINGS: dict[LayerKind, dict[str, tuple[Any, ...]]] = {
    "conv": {
        "strides": ((1, 1),),
        "padding": ("same",),
        "data_format": ("channels_last",),
        "dilation_rate": ((1, 1),),
        "groups": (1,),
        "use_bias": (True,),
        "lora_rank": (None,),
    },
    "batch_norm": {"axis": (-1, 3), "epsilon": (1e-3,), "center": (True,), "scale": (True,)},
    "relu": {"activation": ("relu",)},
    "pool": {"pool_size": ((2, 2),), "strides": ((2, 2),), "padding": ("valid",), "data_format": ("channels_last",)},
    "flatten": {"data_format": ("channels_last",)},
    "average_pool": {"data_format": ("channels_last",), "keepdims": (False,)},
    "dense": {"use_bias": (True,), "lora_rank": (None,), "quantization_config": (None,)},
    "dropout": {"noise_shape": (None,)},
}
"""What may stand in a layer's config where every spec has the same; ``build_vgg`` sets the first of each."""


class _Strange(Exception):
    """What shows that a model is none of the family."""


def recognize_spec(model: keras.Model, *, scores: bool = False) -> VggSpec:
    """The spec from which ``build_vgg`` makes a network that computes what ``model`` does with the same weights.

    Its name is that of the variant with these kernels, the compact one where the widths are nearer to those.

    Args:
        model: any model; it stays as it is.
        scores: take a network whose ``predictions`` have no softmax, too.

    Raises:
        ModelError: it is none of the family; the message names the layer that shows it.
    """
    layers = {layer.name: layer for layer in model.layers if type(layer).__name__ != "InputLayer"}
    try:
        outline = _match_names(list(layers))
        for each in outline.layers():
            _check_class(each, layers[each.name])
        spec = _read_sizes(outline, _read_input(model), layers)
        for each in spec.layers():
            _check_settings(spec, each, layers[each.name].get_config(), scores)
        _check_chain(model, list(layers))
    except (_Strange, UsageError) as error:
        reason = str(error).removesuffix(".")
        raise ModelError(f"{model.name}: not a VGG of this family; {reason}. {_NEEDED}") from error
    return spec


def _match_names(names: list[str]) -> VggSpec:
    """A spec whose layers have these names in this order; its sizes say nothing yet."""
    found = [match[1] for match in map(_CONVOLUTION.fullmatch, names) if match]
    stages = tuple((3,) * found.count(str(stage)) for stage in range(1, STAGES + 1))
    if not all(stages):
        raise _Strange(f"no layer block1_conv1 to block{STAGES}_conv1 in each stage")
    outlines = [
        VggSpec(
            name="vgg",
            stages=stages,
            widths=(1,) * STAGES,
            dense=(1,) * sum(_DENSE.fullmatch(name) is not None for name in names),
            input=(SMALLEST_INPUT, SMALLEST_INPUT, 3),
            classes=2,
            normalization=normalization,  # type: ignore[arg-type]  # NORMALIZATIONS is the type's own list
            dropout=0.5 if any(name.endswith("_dropout") for name in names) else 0.0,
            head="gap" if "avg_pool" in names else "dense",
        )
        for normalization in NORMALIZATIONS
    ]
    # The one that agrees longest is either the right one or tells the most about what is wrong.
    outline = max(outlines, key=lambda each: _shared_length(names, _names(each)))
    wanted = _names(outline)
    if names != wanted:
        place = _shared_length(names, wanted)
        if place == len(names):
            raise _Strange(f"layers are missing at its end: needed next is {wanted[place]!r}")
        needed = f"; needed is {wanted[place]!r}" if place < len(wanted) else ""
        raise _Strange(f"its layer {names[place]!r} is not expected there{needed}")
    return outline


def _names(spec: VggSpec) -> list[str]:
    return [layer.name for layer in spec.layers()]


def _shared_length(first: list[str], second: list[str]) -> int:
    """How many items the two lists have in common from the start."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in same)


def _check_class(layer: LayerSpec, found: Any) -> None:
    # Keras's own layers are registered under their bare names, others below a package: "mine>Conv2D".
    name = import_keras().saving.get_registered_name(type(found))
    if name != _CLASSES[layer.kind]:
        raise _Strange(f"its layer {layer.name!r} is of class {name}; needed is {_CLASSES[layer.kind]}")


def _read_input(model: keras.Model) -> tuple[int, int, int]:
    inputs, outputs = getattr(model, "inputs", None), getattr(model, "outputs", None)
    if not inputs or not outputs:
        raise _Strange("its input is not known; needed is a model that begins with keras.Input((height, width, 3))")
    if len(inputs) != 1 or len(outputs) != 1:
        raise _Strange(f"it has {len(inputs)} input(s) and {len(outputs)} output(s); needed is one of each")
    size = tuple(inputs[0].shape[1:])
    if len(size) != 3 or None in size:
        raise _Strange(f"its input is {size}; needed are a fixed height and width in pixels and 3 channels")
    return (int(size[0]), int(size[1]), int(size[2]))


def _read_sizes(outline: VggSpec, input: tuple[int, int, int], layers: dict[str, Any]) -> VggSpec:
    """``outline`` with the sizes of ``layers``, whose names and classes are its own."""
    stages: list[list[int]] = [[] for _ in range(STAGES)]
    for layer in outline.layers():
        if layer.kind == "conv":
            stages[layer.stage - 1].append(int(layers[layer.name].kernel_size[0]))
    kernels = tuple(map(tuple, stages))
    widths = tuple(int(layers[f"block{stage}_conv1"].filters) for stage in range(1, STAGES + 1))
    rates = {layer.name: float(layers[layer.name].rate) for layer in outline.layers() if layer.kind == "dropout"}
    for name, rate in rates.items():
        if rate == 0:
            raise _Strange(f"its layer {name!r} has rate 0; needed is a rate above 0, or no such layer")
    return msgspec.structs.replace(
        outline,
        name=_variant(kernels, widths, outline.normalization),
        stages=kernels,
        widths=widths,
        dense=tuple(int(layer.units) for name, layer in layers.items() if _DENSE.fullmatch(name)),
        input=input,
        classes=int(layers["predictions"].units),
        dropout=next(iter(rates.values()), 0.0),
        pixels=_pixels(layers["rescaling"]),
    )


def _variant(stages: tuple[tuple[int, ...], ...], widths: tuple[int, ...], normalization: str) -> str:
    """Name of the variant with these kernels whose widths are nearest, by the ratio of their sums."""
    same = [spec for spec in SPECS.values() if spec.stages == stages]
    same.sort(key=lambda spec: ((spec.normalization == "lrn") != (normalization == "lrn"), _ratio(spec.widths, widths)))
    return same[0].name if same else "vgg"


def _ratio(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    return abs(float(np.log(sum(first) / sum(second))))


def _pixels(rescaling: Any) -> SpecPixels:
    """Which of PIXELS the Rescaling layer computes."""
    for name, wanted in PIXELS.items():
        scale, mean = 1 / np.array(wanted.std), np.array(wanted.mean)
        has_scale, has_offset = np.asarray(rescaling.scale, float), np.asarray(rescaling.offset, float)
        if np.allclose(has_scale, scale, rtol=1e-5) and np.allclose(has_offset, -mean * scale, rtol=1e-5):
            return name
    raise _Strange(
        f"its layer {rescaling.name!r} computes pixel * {rescaling.scale} + {rescaling.offset}, "
        f"which is none of {', '.join(PIXELS)}"
    )


def _check_settings(spec: VggSpec, layer: LayerSpec, config: dict[str, Any], scores: bool) -> None:
    """Check what changes the layer's answers; how it was drawn and how it learns may be anything."""
    for setting, allowed in _needed_settings(spec, layer, scores).items():
        found = config.get(setting)
        if not any(_is_same(found, each) for each in allowed):
            raise _Strange(
                f"its layer {layer.name!r} has {setting} {_describe(found)}; needed is {_describe(allowed[0])}"
            )


def _needed_settings(spec: VggSpec, layer: LayerSpec, scores: bool) -> dict[str, tuple[Any, ...]]:
    needed = dict(_SETTINGS.get(layer.kind, {}))
    if layer.kind in ("conv", "dense"):
        is_free = scores and layer.activation == "softmax"
        needed["activation"] = ("softmax", "linear") if is_free else (layer.activation,)
    if layer.kind == "conv":
        needed |= {"filters": (layer.units,), "kernel_size": ((layer.kernel, layer.kernel),)}
    elif layer.kind == "dropout":
        needed["rate"] = (spec.dropout,)
    return needed


def _is_same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float):
        return math.isclose(found, wanted, rel_tol=1e-6)  # files may keep float32
    return bool((tuple(found) if isinstance(found, list) else found) == wanted)


def _describe(value: Any) -> str:
    """A setting for a message; Keras writes what is no plain value as a dictionary with its class."""
    if value is None:
        return "none"
    return str(value.get("class_name", "of its own")) if isinstance(value, dict) else repr(value)


def _check_chain(model: keras.Model, names: list[str]) -> None:
    """Check that every layer takes what the one before gives, and nothing comes between or after."""
    # Over the same tensors, since Sequential and subclasses describe themselves otherwise.
    graph = import_keras().Model(model.inputs, model.outputs).get_config()["layers"]
    extra = [each["name"] for each in graph[1:] if each["name"] not in names]
    if extra:  # such as value * 2, which is no layer of the model
        raise _Strange(f"between or after its layers it computes {extra[0]!r}; needed are the layers alone")
    for before, each in itertools.pairwise(graph):
        sources = list(_sources(each["inbound_nodes"]))
        if sources != [before["name"]]:
            taken = " and ".join(map(repr, sources))
            raise _Strange(f"its layer {each['name']!r} takes the output of {taken}; needed is {before['name']!r}")
        if each["inbound_nodes"][0]["kwargs"].get("training"):
            raise _Strange(f"its layer {each['name']!r} is called with training=True; needed is a call without it")


def _sources(value: Any) -> Iterator[str]:
    """Names of the layers whose outputs occur in the saved arguments of a call."""
    if isinstance(value, dict) and "keras_history" in value:
        yield value["keras_history"][0]
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _sources(each)
