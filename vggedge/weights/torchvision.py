"""Read a state dict of torchvision's VGG from a safetensors file, without torch.

torchvision numbers the modules of a network: ``features.0``, ``features.3``, ... are convolutions and, in the ``_bn``
variants, BatchNorms; relus and poolings have numbers but no weights. ``classifier.0``, ``.3`` and ``.6`` are the
dense layers (torchvision/models/vgg.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from vggedge.architecture import SMALLEST_INPUT
from vggedge.weights.checkpoint import SOURCES, Checkpoint, Float32, LayerWeights, to_float32
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ModelError
from vggedge_runtime.progress import Advance, ignore_progress

_KEY = re.compile(r"(features|classifier)\.(\d+)\.(weight|bias|running_mean|running_var)")
_CONVOLUTION = ("weight", "bias")
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_HEAD = {0: "fc1", 3: "fc2", 6: "predictions"}
_CELLS = 7
"""Rows and columns that torchvision's AdaptiveAvgPool2d hands to the first dense layer, whatever the image."""

_TORCH_EPSILON = 1e-5
_KERAS_EPSILON = 1e-3
"""What each library's BatchNorm adds to the variance unless told otherwise."""

_FLOATS = ("F64", "F32", "F16")


def read_torchvision(path: Path, *, top: bool = True, advance: Advance = ignore_progress) -> Checkpoint:
    """Read every convolution, BatchNorm and, with ``top``, dense layer, in the order of the network.

    BatchNorms are rescaled for Keras's epsilon, and the inputs of ``classifier.0`` put into Keras's order (height,
    width, channels), so that the network computes the same. Without ``top`` only the features are looked at.

    Raises:
        ModelError: no safetensors file, or other layers than a VGG of torchvision has; the message names them.
        MissingDependency: safetensors is not installed.
    """
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = _group_names(path, list(file.keys()), top)
            layers = _read_layers(file, names, path, advance)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({error}): cut short, or another format under this name. "
            "Copy or write it again."
        ) from error
    has_top = any(layer.kind == "dense" for layer in layers)
    return Checkpoint(
        source=str(path),
        format="torchvision state dict",
        pixels="imagenet",
        layers=tuple(layers),
        input=(SMALLEST_INPUT * _CELLS, SMALLEST_INPUT * _CELLS) if has_top else None,
    )


def _group_names(path: Path, keys: list[str], top: bool) -> dict[tuple[str, int], set[str]]:
    """The arrays of each module: {("features", 0): {"weight", "bias"}, ...}, in the order of the network."""
    groups: dict[tuple[str, int], set[str]] = {}
    for key in keys:
        if key.endswith(".num_batches_tracked") or not (top or key.startswith("features.")):
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise ModelError(
                f"{path}: it has an array {key!r}; needed is the state dict of {SOURCES}, whose arrays are called "
                "features.N.weight, classifier.N.bias and so on. If only the head is another, add --no-top."
            )
        groups.setdefault((match[1], int(match[2])), set()).add(match[3])
    # "features" come before "classifier" in the network, and after it in the alphabet.
    return dict(sorted(groups.items(), key=lambda item: (item[0][0] == "classifier", item[0][1])))


def _read_layers(file: Any, names: dict[tuple[str, int], set[str]], path: Path, advance: Advance) -> list[LayerWeights]:
    layers: list[LayerWeights] = []
    counter = _Features(path)
    for done, ((part, number), found) in enumerate(names.items(), start=1):
        name = f"{part}.{number}"
        is_norm = "running_mean" in found
        wanted = _BATCH_NORM if is_norm else _CONVOLUTION
        if found != set(wanted):
            raise ModelError(f"{path}: {name} has {sorted(found)}; needed are {sorted(wanted)}. Write the file again.")
        arrays = [_read_array(file, f"{name}.{each}", path) for each in wanted]
        if is_norm:
            layers.append(_build_norm(name, counter.count_norm(number), arrays, path))
        elif part == "features":
            role = counter.count_convolution(number)
            layers.append(_build_layer(name, role, arrays, (2, 3, 1, 0), path))
        else:
            channels = layers[-1].arrays[-1].size if layers else 0  # of the last convolution, or units before
            layers.append(_build_dense(name, number, arrays, channels, path))
        advance(done, len(names), "reading weights")
    return layers


def _read_array(file: Any, key: str, path: Path) -> Float32:
    kind = file.get_slice(key).get_dtype()
    if kind not in _FLOATS:
        raise ModelError(
            f"{path}: {key} is {kind}, which NumPy does not know; needed is one of {', '.join(_FLOATS)}. "
            "Convert every tensor with .float() in torch and write the file again."
        )
    return to_float32(file.get_tensor(key), f"{path}: {key}")


class _Features:
    """Tells from the numbers in ``features`` which layer of a VGG each one is: relus and poolings are the gaps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stage = 1
        self._place = 0
        self._next = 0
        self._last: int | None = None

    def count_convolution(self, number: int) -> str:
        if number == self._next + 1 and self._place:  # a pooling lies between
            self._stage += 1
            self._place = 0
        elif number != self._next:
            raise self._strange(number, f"a convolution at {self._next}" + f" or {self._next + 1}" * bool(self._place))
        self._place += 1
        self._last = number
        self._next = number + 2  # its relu lies between
        return f"block{self._stage}_conv{self._place}"

    def count_norm(self, number: int) -> str:
        if self._last is None or number != self._last + 1:
            raise self._strange(number, "a BatchNorm right behind a convolution")
        self._next += 1
        return f"block{self._stage}_bn{self._place}"

    def _strange(self, number: int, needed: str) -> ModelError:
        return ModelError(
            f"{self._path}: features.{number} is not where a VGG has it; needed is {needed}. "
            f"Only the weights of {SOURCES} can be imported."
        )


def _build_layer(name: str, role: str, arrays: list[Float32], order: tuple[int, ...], path: Path) -> LayerWeights:
    """A convolution or dense layer, its kernel's axes put into Keras's ``order``."""
    kernel, bias = arrays
    if kernel.ndim != len(order) or bias.ndim != 1:
        raise ModelError(
            f"{path}: {name} has shapes {kernel.shape} and {bias.shape}; needed are {len(order)} axes and 1. "
            f"Only the weights of {SOURCES} can be imported."
        )
    kind: Any = "conv" if len(order) == 4 else "dense"
    return LayerWeights(name=name, kind=kind, arrays=(kernel.transpose(order), bias), role=role)


def _build_dense(name: str, number: int, arrays: list[Float32], channels: int, path: Path) -> LayerWeights:
    if number not in _HEAD:
        raise ModelError(
            f"{path}: it has a dense layer {name}; torchvision's VGG has classifier.0, classifier.3 and classifier.6. "
            "Add --no-top to import the convolutions alone."
        )
    weight, bias = arrays
    if number == 0:
        inputs = channels * _CELLS * _CELLS
        if weight.ndim != 2 or weight.shape[1] != inputs:
            raise ModelError(
                f"{path}: {name}.weight has shape {weight.shape}; needed is (units, {inputs}), from {channels} "
                f"channels of {_CELLS}x{_CELLS}. Add --no-top to import the convolutions alone."
            )
        # torch flattens (channels, rows, columns), Keras (rows, columns, channels).
        weight = weight.reshape(-1, channels, _CELLS, _CELLS).transpose(0, 2, 3, 1).reshape(-1, inputs)
    return _build_layer(name, _HEAD[number], [weight, bias], (1, 0), path)


def _build_norm(name: str, role: str, arrays: list[Float32], path: Path) -> LayerWeights:
    gamma, beta, mean, variance = arrays
    if gamma.shape != variance.shape or float(variance.min(initial=0)) < 0:
        raise ModelError(
            f"{path}: {name} has weights of shape {gamma.shape} and variances of shape {variance.shape}, the smallest "
            f"{variance.min(initial=0):g}; needed is a variance of at least 0 for each weight. Write the file again."
        )
    # gamma / sqrt(variance + epsilon) is what counts; Keras's layer adds another epsilon.
    exact = variance.astype(np.float64)
    gamma = (gamma * np.sqrt((exact + _KERAS_EPSILON) / (exact + _TORCH_EPSILON))).astype(np.float32)
    return LayerWeights(name=name, kind="batch_norm", arrays=(gamma, beta, mean, variance), role=role)
