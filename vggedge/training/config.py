"""What training can be told: TrainConfig, its named recipes, and the checks of both."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from vggedge.model import Initialization
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import LARGEST_SCALE, Kernel

Recipe: TypeAlias = Literal["modern", "paper"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
Optimizer: TypeAlias = Literal["adam", "sgd"]
Schedule: TypeAlias = Literal["cosine", "constant", "plateau"]

COLOUR_SHIFT = 0.1
"""Deviation of the colour shift's factors in Krizhevsky, Sutskever & Hinton 2012, section 4.1."""


class AugmentationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How training images are drawn anew in each epoch; validation images never are. The default leaves them alone.

    Attributes:
        scale: least and greatest S, pixels: each time an image is resized, whole and with its aspect ratio, until
            its shorter side is S, drawn evenly from these bounds, and the network's size is cut out of it anywhere
            (scale jitter; the VGG paper's section 3.1, arXiv 1409.1556). Equal bounds fix S. Every S is made from the
            image at the upper bound, so images at smaller S are resized twice and a little softer than a device's.
            None leaves the images as they are read.
        kernel: resampling kernel of ``scale``; needed is that of the ImageSpec that the images are read by.
        flip: half of the time left and right are swapped. Not for classes that this changes, as letters.
        colour_shift: adds to all pixels of an image the principal components of the training set's RGB values, each
            times its eigenvalue and a normal number of this deviation: 0.1 in Krizhevsky, Sutskever & Hinton 2012,
            section 4.1, with pixels from 0 to 1 for the eigenvalues' unit, which they leave open. 0 keeps colours.
    """

    scale: tuple[int, int] | None = None
    kernel: Kernel = "bilinear"
    flip: bool = False
    colour_shift: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.scale or (1, 1)
        _check(
            self,
            (
                "scale",
                1 <= low <= high <= LARGEST_SCALE,
                f"two lengths of at most {LARGEST_SCALE} pixels, the least first, such as 64,128",
            ),
            ("colour_shift", 0 <= self.colour_shift < math.inf, "a finite number of at least 0"),
        )

    def check_size(self, input: tuple[int, int, int]) -> None:
        """Raise UsageError if an image of the least scale does not cover the network's ``input``."""
        side = max(input[:2])
        if self.scale is not None and self.scale[0] < side:
            raise UsageError(
                f"scale is {self.scale[0]} pixels at least; the network takes {input[0]}x{input[1]}, which cannot be "
                f"cut out of less than {side}. Raise the scale or lower the input size."
            )


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train; the defaults are the recipe ``modern``. "The paper" is the VGG paper, arXiv 1409.1556.

    Attributes:
        epochs: at most so many passes over the images.
        batch_size: images for each step.
        optimizer: ``adam`` (Kingma & Ba 2014, arXiv 1412.6980) or ``sgd``, with momentum.
        learning_rate: of the optimizer, at its highest.
        momentum: share of the last step that ``sgd`` adds to the next; ``adam`` has its own and ignores this.
        weight_decay: so much of every kernel is added to its gradient, as an L2 penalty of half this factor does
            (the paper's meaning; not the decoupled kind of AdamW). Losses are reported without it; biases and
            BatchNorm are spared.
        schedule: ``cosine`` rises from a tenth over the first tenth of all steps, then falls to 0 at the end of
            ``epochs`` (Loshchilov & Hutter 2016, arXiv 1608.03983, without restarts); ``constant`` stays; ``plateau``
            divides the rate by 10 when validation accuracy has stopped to improve, at most 3 times, and then ends
            training (the paper's section 3.1).
        plateau_patience: epochs without a better validation accuracy after which ``plateau`` acts. The paper has no
            figure; a small set needs many, since its accuracy is noisy and a deep net may take some to leave chance.
        initialization: of the kernels, see ``vggedge.model.build_vgg``.
        augmentation: how training images are changed.
        validation_share: of every class, held back to judge each epoch.
        patience: epochs without a better validation loss before training stops; 0 never stops early. ``plateau``
            ends by its own rule and ignores this.
        seed: of the split, the weights, the order of the images, their augmentation and the dropout.
        memory_bytes: as many images as fit in this, as uint8 and with ``augmentation.scale`` at its upper bound, are
            kept in memory; the others are read again in every epoch. The result is the same.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: Optimizer = "adam"
    learning_rate: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    plateau_patience: int = 10
    initialization: Initialization = "auto"
    augmentation: AugmentationConfig = msgspec.field(default_factory=AugmentationConfig)
    validation_share: float = 0.1
    patience: int = 5
    seed: int = 0
    memory_bytes: int = 2**30

    def __post_init__(self) -> None:
        _check(
            self,
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("optimizer", self.optimizer in get_args(Optimizer), "adam or sgd"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0"),
            ("momentum", 0 <= self.momentum < 1, "a share from 0 to below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            ("schedule", self.schedule in get_args(Schedule), "cosine, constant or plateau"),
            ("plateau_patience", self.plateau_patience >= 1, "at least 1"),
            ("initialization", self.initialization in get_args(Initialization), "auto, he, glorot or paper"),
            ("validation_share", 0 < self.validation_share < 1, "a share above 0 and below 1, such as 0.1"),
            ("patience", self.patience >= 0, "at least 0, which never stops early"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
            ("memory_bytes", self.memory_bytes >= 0, "at least 0"),
        )

    def with_kernel(self, kernel: Kernel) -> TrainConfig:
        """The same with this resampling kernel for the augmentation's scale."""
        augmentation = msgspec.structs.replace(self.augmentation, kernel=kernel)
        return msgspec.structs.replace(self, augmentation=augmentation)


def get_config(
    recipe: str,
    input: tuple[int, int, int],
    *,
    scale: str | None = None,
    flip: bool | None = None,
    colour_shift: bool | None = None,
    **changes: Any,
) -> TrainConfig:
    """A named recipe for networks of ``input``, with what is not None in place of its own values.

    ``modern`` is ``TrainConfig()``. ``paper`` is the VGG paper's section 3.1: SGD with momentum 0.9, weight decay
    5e-4, learning rate 1e-2 divided by 10 on plateaus, at most 74 epochs, Glorot's initialisation (which the authors
    name as equal to their growing from net A), scale jitter from 8/7 to 16/7 of the network's size (256 to 512 at
    224), flips and colour shift. Different here: 64 images a step instead of 256, since sets of some thousand images
    give too few steps otherwise. The dropout of 0.5 is the spec's, and the full-size variants have it. A subject that
    fills its picture is cut off at most of these scales: give a smaller range there.

    Args:
        recipe: one of RECIPES.
        input: (height, width, 3) of the network, pixels.
        scale: as ``parse_scale`` reads it.
        flip: whether to flip.
        colour_shift: whether to shift colours, with COLOUR_SHIFT.
        changes: other fields of TrainConfig.

    Raises:
        UsageError: no such recipe, a value that makes no sense, or one that the rest of the config leaves unused.
    """
    if recipe not in RECIPES:
        raise UsageError(f"no recipe is called {recipe!r}. Known are: {', '.join(RECIPES)}.")
    config = TrainConfig() if recipe == "modern" else _build_paper_config(input)
    given = {name: value for name, value in changes.items() if value is not None}
    drawn: dict[str, Any] = {}
    if scale is not None:
        drawn["scale"] = parse_scale(scale)
    if flip is not None:
        drawn["flip"] = flip
    if colour_shift is not None:
        drawn["colour_shift"] = COLOUR_SHIFT * colour_shift
    augmentation = msgspec.structs.replace(config.augmentation, **drawn)
    augmentation.check_size(input)
    config = msgspec.structs.replace(config, **given, augmentation=augmentation)
    _check_used(config, given)
    return config


def parse_scale(text: str) -> tuple[int, int] | None:
    """Read ``S`` or ``SMIN,SMAX``, pixels; ``none`` for no scaling.

    Raises:
        UsageError: it is written otherwise.
    """
    if text == "none":
        return None
    match = re.fullmatch(r"([0-9]{1,9})(?:,([0-9]{1,9}))?", text)
    if match is None:
        raise UsageError(f"scale is {text!r}; write S or SMIN,SMAX in pixels, such as 72 or 64,128, or none.")
    return int(match[1]), int(match[2] or match[1])


def _build_paper_config(input: tuple[int, int, int]) -> TrainConfig:
    side = max(input[:2])
    return TrainConfig(
        epochs=74,
        optimizer="sgd",
        learning_rate=1e-2,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="plateau",
        initialization="glorot",
        augmentation=AugmentationConfig(
            scale=(math.ceil(side * 8 / 7), round(side * 16 / 7)), flip=True, colour_shift=COLOUR_SHIFT
        ),
    )


def _check_used(config: TrainConfig, given: dict[str, Any]) -> None:
    """Raise UsageError for a given value that has no effect: the user expects one."""
    is_plateau = config.schedule == "plateau"
    for name, is_used, reason in (
        ("momentum", config.optimizer == "sgd", "only the optimizer sgd takes one"),
        ("plateau_patience", is_plateau, "only the schedule plateau has one"),
        ("patience", not is_plateau, "the schedule plateau ends by its own rule; set plateau_patience instead"),
    ):
        if name in given and not is_used:
            raise UsageError(f"{name} is {given[name]} and has no effect: {reason}. Leave it out.")


def _check(config: msgspec.Struct, *checks: tuple[str, bool, str]) -> None:
    """Raise UsageError for the first (field, is right, what is needed) that is not right."""
    for name, is_right, needed in checks:
        if not is_right:
            raise UsageError(f"{name} is {getattr(config, name)}; needed is {needed}.")
