"""Read the weights of keras.applications' VGG16 and VGG19 from each of Keras's file formats, without Keras.

==================  ==========================================================================================
``.keras``          a zip of ``config.json`` and ``model.weights.h5``
``.weights.h5``     Keras 3: ``layers/conv2d_3/vars/0``, by class and number; newer ones also keep the layer's name
``.h5``             Keras 1 and 2, weights alone or (below ``model_weights``) a whole model: groups by layer name
==================  ==========================================================================================
"""

from __future__ import annotations

import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vggedge.architecture import SPECS, LayerSpec
from vggedge.weights.checkpoint import SOURCES, Checkpoint, Kind, LayerWeights, to_float32
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ModelError
from vggedge_runtime.progress import Advance, ignore_progress

if TYPE_CHECKING:
    import keras

_KINDS: dict[tuple[int, ...], Kind] = {(4, 1): "conv", (2, 1): "dense", (1, 1, 1, 1): "batch_norm"}
"""What a layer is, by the number of axes of its arrays."""

_CLASSES = {"conv": "Conv2D", "pool": "MaxPooling2D", "flatten": "Flatten", "dense": "Dense"}
_SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "conv": {
        "activation": ("relu",),
        "padding": ("same",),
        "strides": ([1, 1],),
        "dilation_rate": ([1, 1],),
        "groups": (1, None),  # Keras before 2.3 knew no groups
        "data_format": ("channels_last",),
    },
    "pool": {"pool_size": ([2, 2],), "strides": ([2, 2],), "padding": ("valid",), "data_format": ("channels_last",)},
    "flatten": {"data_format": ("channels_last", None)},
    "dense": {"activation": ("relu",)},
    "predictions": {"activation": ("softmax", "linear")},  # without its softmax it gives logits, and ours adds one
}
"""What each kind of layer must be set to for our network to compute the same."""

_UNREADABLE = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)
"""What h5py and json raise on damaged files, and what reading an unknown layout ends in."""


class _Stored(NamedTuple):
    """A layer in a file: what the file calls it, its name in the model if the file has it, and unread arrays."""

    place: str
    name: str | None
    arrays: list[Any]

    @property
    def kind(self) -> Kind | None:
        return _KINDS.get(tuple(array.ndim for array in self.arrays))


def read_keras_archive(path: Path, *, top: bool = True, advance: Advance = ignore_progress) -> Checkpoint:
    """Read a ``.keras`` file; without ``top`` only the convolutions are looked at.

    Raises:
        ModelError: damaged, or not the model of keras.applications; the message names the layer.
        MissingDependency: h5py is not installed.
    """
    h5py = require("h5py", "train")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # h5py jumps about in the file, and zipfile checks only what is read in order
            if damaged is not None:
                raise ModelError(f"{path}: its part {damaged} is damaged. Copy or write it again.")
            size = _check_config(archive.read("config.json"), path, top)
            with archive.open("model.weights.h5") as raw, h5py.File(raw, "r") as file:
                layers = _load(_list_layers(file, path), path, top, advance)
    except (*_UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from error
    return _build_checkpoint(str(path), "Keras model (.keras)", layers, size)


def read_hdf5(path: Path, *, top: bool = True, advance: Advance = ignore_progress) -> Checkpoint:
    """Read a ``.weights.h5`` or legacy ``.h5`` file; without ``top`` only the convolutions are looked at.

    Raises:
        ModelError: damaged, or not the weights of keras.applications; the message names the layer.
        MissingDependency: h5py is not installed.
    """
    h5py = require("h5py", "train")
    try:
        with h5py.File(path, "r") as file:
            config = file.attrs.get("model_config")
            size = None if config is None else _check_config(config, path, top)
            stored = _list_layers(file.get("model_weights", file), path)
            if config is None:
                _check_bare(stored, path)
            layers = _load(stored, path, top, advance)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return _build_checkpoint(str(path), "Keras weights (HDF5)", layers, size)


def read_keras_model(model: keras.Model, source: str, *, top: bool = True) -> Checkpoint:
    """Take the weights out of a model of keras.applications in memory.

    Raises:
        ModelError: it is another model; the message names the layer.
    """
    size = _check_config(model.to_json(), source, top)
    stored = [_Stored(layer.name, layer.name, layer.get_weights()) for layer in model.layers]
    layers = _load(stored, source, top, ignore_progress)
    return _build_checkpoint(source, "keras.applications", layers, size)


def _build_checkpoint(source: str, form: str, layers: list[LayerWeights], size: tuple[int, int] | None) -> Checkpoint:
    if layers and layers[0].kind == "conv":
        # Caffe's networks, which these are, take BGR; ours take RGB.
        kernel, *others = layers[0].arrays
        layers[0] = LayerWeights(
            name=layers[0].name, kind=layers[0].kind, arrays=(kernel[..., ::-1, :], *others), role=layers[0].role
        )
    return Checkpoint(source=source, format=form, pixels="caffe", layers=tuple(layers), input=size)


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path}: cannot be read as Keras weights ({error}): damaged, or of another layout. Needed is what "
        f"model.save() or model.save_weights() of Keras 3 or 2 writes of {SOURCES}."
    )


def _list_layers(root: Any, path: Path) -> list[_Stored]:
    """Every layer of the file, in the order of the network; Keras 3 keeps that order only within a class."""
    found = list(_list_keras3(root["layers"])) if "layers" in root else list(_list_legacy(root))
    if not any(layer.kind == "conv" for layer in found):
        raise ModelError(
            f"{path}: no convolution at its top level. Needed are the weights of {SOURCES}; if that is a layer of a "
            "larger model, save it alone: model.get_layer('vgg16').save('vgg16.keras')."
        )
    return found


def _check_bare(stored: list[_Stored], path: Path) -> None:
    """Refuse what only the model's own description, which this file lacks, could tell the place or effect of."""
    for layer in stored:
        if (layer.arrays and layer.kind not in ("conv", "dense")) or "rescaling" in layer.place:
            raise ModelError(
                f"{path}: besides convolutions and dense layers with a bias there is a layer "
                f"{layer.name or layer.place} with arrays of shapes {[tuple(each.shape) for each in layer.arrays]}, "
                f"and weights alone do not say where it belongs. Needed are the weights of {SOURCES}; if only the "
                "head is another, save the whole model with model.save() as .keras and add --no-top."
            )


def _list_keras3(layers: Any) -> Iterator[_Stored]:
    # Layers are numbered within their class: conv2d, conv2d_1, ..., conv2d_10, dense, dense_1.
    def by_number(key: str) -> tuple[str, int]:
        match = re.fullmatch(r"(.*?)(?:_(\d+))?", key)
        return (match[1], int(match[2] or 0)) if match else (key, 0)

    for key in sorted(layers, key=by_number):
        variables = layers[key]["vars"]
        arrays = [variables[str(place)] for place in range(len(variables))]
        yield _Stored(f"layers/{key}", _text(variables.attrs.get("name")), arrays)


def _list_legacy(root: Any) -> Iterator[_Stored]:
    for name in map(_text, root.attrs.get("layer_names", ())):
        group = root[name]
        arrays = [group[_text(each)] for each in group.attrs.get("weight_names", ())]
        yield _Stored(str(name), name, arrays)


def _text(value: Any) -> str | None:
    """HDF5 text, which comes as bytes from some writers."""
    return value.decode() if isinstance(value, bytes) else value


def _load(stored: list[_Stored], source: Path | str, top: bool, advance: Advance) -> list[LayerWeights]:
    """Read the arrays; without ``top`` those of the convolutions alone."""
    layers = []
    stored = [layer for layer in stored if layer.arrays]
    for done, layer in enumerate(stored, start=1):
        name = layer.name or layer.place
        kind = layer.kind
        if kind is None and top:
            shapes = [tuple(array.shape) for array in layer.arrays]
            raise ModelError(
                f"{source}: layer {name} has arrays of shapes {shapes}; a VGG has convolutions and dense layers, each "
                "with a kernel and a bias. If it belongs to the head, add --no-top."
            )
        if kind is not None and (top or kind == "conv"):
            arrays = tuple(to_float32(array[()], f"{source}: {name}") for array in layer.arrays)
            layers.append(LayerWeights(name=name, kind=kind, arrays=arrays, role=layer.name))
        advance(done, len(stored), "reading weights")
    return layers


def _check_config(text: str | bytes, source: Path | str, top: bool) -> tuple[int, int] | None:
    """Check what the model computes, layer by layer; returns its (height, width), pixels, or None if it is open."""
    layers = [(layer["class_name"], layer["config"]) for layer in json.loads(text)["config"]["layers"]]
    has_top = top and any(kind == "Dense" for kind, _ in layers)
    inputs = [config for kind, config in layers if kind == "InputLayer"]
    found = [(kind, config) for kind, config in layers if kind not in ("InputLayer", "Dropout")]
    wanted = _nearest_variant([config["name"] for _, config in found], has_top)
    for layer, each in itertools.zip_longest(wanted, found if has_top else found[: len(wanted)]):
        if layer is None or each is None or each[1]["name"] != layer.name or each[0] != _CLASSES[layer.kind]:
            have = f"{each[0]} {each[1]['name']!r}" if each else "nothing"
            want = f"{_CLASSES[layer.kind]} {layer.name!r}" if layer else "nothing more"
            raise ModelError(
                f"{source}: it has {have} where a VGG has {want}. Needed is the model of {SOURCES} "
                f"alone, without layers before it. {_advise(layers, layer)}"
            )
        _check_settings(layer, each[1], source)
    shape = next((config.get("batch_shape") or config.get("batch_input_shape") for config in inputs), None)
    return (int(shape[1]), int(shape[2])) if shape and shape[1] and shape[2] else None


def _advise(layers: list[tuple[str, dict[str, Any]]], wanted: LayerSpec | None) -> str:
    nested = next((config["name"] for kind, config in layers if kind in ("Functional", "Sequential", "Model")), None)
    if nested is not None:
        return f"A VGG inside another model is taken out with model.get_layer({nested!r}).save('inner.keras')."
    is_head = wanted is None or not wanted.stage
    return "If only the head is another, add --no-top." if is_head else "Only such a model can be imported."


def _nearest_variant(names: list[str], has_top: bool) -> list[LayerSpec]:
    """The layers of that variant which has most of ``names`` in common from the start."""

    def layers(name: str) -> list[LayerSpec]:
        return [layer for layer in SPECS[name].layers() if layer.kind in _CLASSES and (has_top or layer.stage)]

    def shared(wanted: list[LayerSpec]) -> int:
        pairs = zip(wanted, names, strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0].name == pair[1], pairs)))

    return max((layers(name) for name in ("vgg16", "vgg19", "vgg13", "vgg11", "vgg9")), key=shared)


def _check_settings(layer: LayerSpec, config: dict[str, Any], source: Path | str) -> None:
    for key, allowed in _SETTINGS["predictions" if layer.name == "predictions" else layer.kind].items():
        if config.get(key) not in allowed:
            raise ModelError(
                f"{source}: layer {layer.name} has {key} {config.get(key)!r}; needed is {allowed[0]!r}. "
                f"Only the weights of {SOURCES} can be imported."
            )
