"""The VGG family as data: what a network is made of, layer by layer, without TensorFlow.

The table follows Simonyan & Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", arXiv 1409.1556, table 1: A is vgg11, A-LRN vgg11-lrn, B vgg13, C vgg16-1x1, D vgg16 and
E vgg19. vgg9 is this project's, one size below A. Each also comes ``-compact``, for 64x64 images.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import Normalization

SpecNormalization: TypeAlias = Literal["none", "first", "first-of-two-stages", "two-stages", "every", "lrn"]
NORMALIZATIONS: tuple[str, ...] = get_args(SpecNormalization)

Head: TypeAlias = Literal["dense", "gap"]
HEADS: tuple[str, ...] = get_args(Head)

SpecPixels: TypeAlias = Literal["symmetric", "caffe", "imagenet"]
PIXELS: Mapping[SpecPixels, Normalization] = MappingProxyType(
    {
        "symmetric": Normalization(mean=(128.0, 128.0, 128.0), std=(128.0, 128.0, 128.0)),
        # Means of the authors' Caffe models, as keras.applications subtracts them, here in RGB order.
        "caffe": Normalization(mean=(123.68, 116.779, 103.939), std=(1.0, 1.0, 1.0)),
        # torchvision's means and deviations of ImageNet, times 255.
        "imagenet": Normalization(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
    }
)
"""What the first layer makes of RGB pixels from 0 to 255."""

LayerKind: TypeAlias = Literal[
    "rescaling", "conv", "batch_norm", "relu", "lrn", "pool", "flatten", "average_pool", "dense", "dropout"
]
Activation: TypeAlias = Literal["linear", "relu", "softmax"]

STAGES = 5
SMALLEST_INPUT = 2**STAGES
"""Every stage ends in a 2x2 pooling; a smaller image has no pixel left after the last."""

_WIDEST = 64
"""Largest width multiplier: takes the compact widths beyond the paper's, and a slip of the keyboard no further."""


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of a spec. The model is built from these and the figures are computed from them.

    Attributes:
        name: Keras's own name of the layer.
        kind: what it does.
        stage: 1 to 5 for the layers of a convolutional stage, 0 before and after them.
        kernel: side of a convolution's or pooling's window, pixels; 0 elsewhere.
        units: output channels of a convolution, or units of a dense layer; 0 elsewhere.
        activation: what follows inside the same Keras layer.
    """

    name: str
    kind: LayerKind
    stage: int = 0
    kernel: int = 0
    units: int = 0
    activation: Activation = "linear"


class VggSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VGG classifier: five stages of convolutions, each halved by a pooling, then dense layers.

    Attributes:
        name: the variant it comes from.
        stages: for each of the five stages, the kernel size of every convolution, pixels.
        widths: channels of the convolutions of each stage.
        dense: units of the dense layers before the classifier; with ``head="gap"`` there may be none.
        input: (height, width, 3), pixels.
        classes: outputs of the classifier.
        normalization: ``first``: BatchNorm after the relu of the first convolution.
            ``first-of-two-stages``: after the first convolution's relu in stages 1 and 2.
            ``two-stages``: after every convolution's relu in stages 1 and 2. ``every``: between each
            convolution, which keeps its bias, and its relu. ``lrn``: local response normalisation
            after the first convolution's relu, the paper's A-LRN. ``none``: the rest of the paper.
        dropout: share of the dense layers' outputs that training sets to zero; 0 leaves it out.
        head: ``dense``: the last stage's pixels, flattened, go into the dense layers (the paper).
            ``gap``: their mean does (global average pooling, Lin et al. 2013, arXiv 1312.4400).
        pixels: what the first layer makes of RGB pixels, a key of PIXELS: ``symmetric`` for networks trained
            here, ``caffe`` and ``imagenet`` for weights from keras.applications and torchvision.
    """

    name: str
    stages: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    dense: tuple[int, ...]
    input: tuple[int, int, int]
    classes: int
    normalization: SpecNormalization
    dropout: float = 0.5
    head: Head = "dense"
    pixels: SpecPixels = "symmetric"

    def __post_init__(self) -> None:
        for is_wrong, found, needed in self._checks():
            if is_wrong:
                raise UsageError(f"{self.name}: {found}; {needed}.")

    def _checks(self) -> tuple[tuple[bool, str, str], ...]:
        """(is it wrong, what was found, what is needed) for every field."""
        height, width, channels = self.input
        kernels = [kernel for stage in self.stages for kernel in stage]
        return (
            (
                len(self.stages) != STAGES or len(self.widths) != STAGES,
                f"{len(self.stages)} stages and {len(self.widths)} widths",
                f"a VGG has {STAGES} of each",
            ),
            (
                not all(self.stages) or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels),
                f"kernel sizes {self.stages}",
                "every stage needs a convolution, and every kernel an odd size",
            ),
            (
                min((*self.widths, *self.dense), default=0) < 1,
                f"widths {self.widths}, dense {self.dense}",
                "each must be at least 1",
            ),
            (
                channels != 3,
                f"input {height}x{width}x{channels}",
                "images are RGB: give it as HEIGHTxWIDTHx3",
            ),
            (
                min(height, width) < SMALLEST_INPUT,
                f"input {height}x{width}",
                f"five poolings need at least {SMALLEST_INPUT}x{SMALLEST_INPUT} pixels",
            ),
            (self.classes < 2, f"{self.classes} class(es)", "a classifier needs at least 2"),
            (
                self.normalization not in NORMALIZATIONS,
                f"normalization {self.normalization!r}",
                f"known are {', '.join(NORMALIZATIONS)}",
            ),
            (not 0 <= self.dropout < 1, f"dropout {self.dropout}", "it is a share: at least 0 and below 1"),
            (self.head not in HEADS, f"head {self.head!r}", f"known are {', '.join(HEADS)}"),
            (self.pixels not in PIXELS, f"pixels {self.pixels!r}", f"known are {', '.join(PIXELS)}"),
        )

    @property
    def weight_layers(self) -> int:
        """Convolutions and dense layers, the number in the variant's name (paper, section 2.2)."""
        return sum(len(stage) for stage in self.stages) + len(self.dense) + 1

    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer from the rescaling of pixels to ``predictions``, in order."""
        found = [LayerSpec(name="rescaling", kind="rescaling")]
        for stage in range(1, STAGES + 1):
            for number in range(1, len(self.stages[stage - 1]) + 1):
                found += self._convolution(stage, number)
            found.append(LayerSpec(name=f"block{stage}_pool", kind="pool", stage=stage, kernel=2))
        if self.head == "gap":
            found.append(LayerSpec(name="avg_pool", kind="average_pool"))
            if self.dropout and not self.dense:
                found.append(LayerSpec(name="avg_pool_dropout", kind="dropout"))
        else:
            found.append(LayerSpec(name="flatten", kind="flatten"))
        for number, units in enumerate(self.dense, start=1):
            found.append(LayerSpec(name=f"fc{number}", kind="dense", units=units, activation="relu"))
            if self.dropout:
                found.append(LayerSpec(name=f"fc{number}_dropout", kind="dropout"))
        found.append(LayerSpec(name="predictions", kind="dense", units=self.classes, activation="softmax"))
        return tuple(found)

    def _convolution(self, stage: int, number: int) -> list[LayerSpec]:
        """One convolution with its relu and what normalises it."""
        norm = self._norm_after(stage, number)
        is_split = self.normalization == "every"  # the relu comes after the BatchNorm, so it is a layer of its own
        convolution = LayerSpec(
            name=f"block{stage}_conv{number}",
            kind="conv",
            stage=stage,
            kernel=self.stages[stage - 1][number - 1],
            units=self.widths[stage - 1],
            activation="linear" if is_split else "relu",
        )
        found = [convolution]
        if norm is not None:
            suffix = "bn" if norm == "batch_norm" else norm
            found.append(LayerSpec(name=f"block{stage}_{suffix}{number}", kind=norm, stage=stage))
        if is_split:
            found.append(LayerSpec(name=f"block{stage}_relu{number}", kind="relu", stage=stage))
        return found

    def _norm_after(self, stage: int, number: int) -> Literal["batch_norm", "lrn"] | None:
        """What normalises convolution ``number`` of ``stage``, both counted from 1."""
        if self.normalization == "lrn":
            return "lrn" if (stage, number) == (1, 1) else None
        wanted = {
            "none": False,
            "first": (stage, number) == (1, 1),
            "first-of-two-stages": stage <= 2 and number == 1,
            "two-stages": stage <= 2,
            "every": True,
        }
        return "batch_norm" if wanted[self.normalization] else None


_KERNELS: dict[str, tuple[tuple[int, ...], ...]] = {
    "vgg9": ((3,), (3,), (3,), (3,), (3, 3)),
    "vgg11": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "vgg11-lrn": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "vgg13": ((3, 3),) * 5,
    "vgg16-1x1": ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1)),
    "vgg16": ((3, 3), (3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "vgg19": ((3, 3), (3, 3), (3,) * 4, (3,) * 4, (3,) * 4),
}


def _full(name: str, stages: tuple[tuple[int, ...], ...]) -> VggSpec:
    return VggSpec(
        name=name,
        stages=stages,
        widths=(64, 128, 256, 512, 512),
        dense=(4096, 4096),
        input=(224, 224, 3),
        classes=1000,
        normalization="lrn" if name.endswith("-lrn") else "none",
    )


def _compact(name: str, stages: tuple[tuple[int, ...], ...]) -> VggSpec:
    return VggSpec(
        name=f"{name}-compact",
        stages=stages,
        widths=(4, 8, 16, 32, 32),
        dense=(256, 256),
        input=(64, 64, 3),
        classes=6,
        # The published compact listing: with Glorot's initialisation training stalls without it, and the pair does
        # best (benchmarks/claims/results/vanishing_gradients.md).
        normalization="lrn" if name.endswith("-lrn") else "first-of-two-stages",
        dropout=0.3,  # 256 units have little to spare: half of them off costs accuracy on 6,000 images
    )


SPECS: Mapping[str, VggSpec] = MappingProxyType(
    {
        spec.name: spec
        for make in (_full, _compact)
        for spec in (make(name, stages) for name, stages in _KERNELS.items())
    }
)
"""Every variant by name: the paper's first, then the compact ones."""


def get_spec(
    name: str,
    *,
    classes: int | None = None,
    input: tuple[int, int, int] | None = None,
    normalization: str | None = None,
    dropout: float | None = None,
    width: float = 1.0,
    head: str | None = None,
) -> VggSpec:
    """Look a variant up and replace what is not None.

    Args:
        name: a key of SPECS.
        classes: outputs of the classifier.
        input: (height, width, 3), pixels.
        normalization: one of NORMALIZATIONS.
        dropout: share from 0 to 1.
        width: multiplies the channels of every convolution and the units of every hidden dense layer; rounded, at
            least 1.
        head: ``gap`` takes the dense layers out, as networks with global average pooling do; ``dense`` keeps them.

    Raises:
        UsageError: no such variant (the message names the closest and lists all), or a value that no
            VGG can have.
    """
    if name not in SPECS:
        near = difflib.get_close_matches(name.lower(), SPECS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"no variant is called {name!r}.{hint} Known are: {', '.join(SPECS)}.")
    given: dict[str, Any] = {
        "classes": classes,
        "input": input,
        "normalization": normalization,
        "dropout": dropout,
        "head": head,
    }
    spec = _scale_width(SPECS[name], width)
    if head == "gap":
        spec = msgspec.structs.replace(spec, head="gap", dense=())
    return msgspec.structs.replace(spec, **{key: value for key, value in given.items() if value is not None})


def _scale_width(spec: VggSpec, factor: float) -> VggSpec:
    if not 0 < factor <= _WIDEST:
        raise UsageError(f"{spec.name}: width {factor:g}; it is a factor above 0 and at most {_WIDEST}, such as 0.5.")
    widths, dense = (tuple(max(1, round(each * factor)) for each in units) for units in (spec.widths, spec.dense))
    return msgspec.structs.replace(spec, widths=widths, dense=dense)


def parse_input(text: str) -> tuple[int, int, int]:
    """Read ``HEIGHTxWIDTHx3``, or ``HEIGHTxWIDTH`` for short, in pixels.

    Raises:
        UsageError: it is written otherwise.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})(?:x(\d{1,5}))?", text.strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is no image size; write HEIGHTxWIDTH in pixels, for example 64x64 or 224x224x3.")
    height, width, channels = match.groups(default="3")
    return (int(height), int(width), int(channels))
