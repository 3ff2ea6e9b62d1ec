"""First weights from another network: a base for transfer, or a shallower network to grow from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from vggedge.architecture import HEADS, SPECS, STAGES, VggSpec, get_spec
from vggedge.model import read_model
from vggedge.recognition import recognize_spec
from vggedge.training.config import TrainConfig
from vggedge.training.history import Origin
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec

if TYPE_CHECKING:
    import keras

DEFAULT_VARIANT = "vgg16-compact"


@dataclass(frozen=True)
class Start:
    """A trained network that another one begins with.

    Attributes:
        model: the trained one.
        spec: its spec.
        image: how its images were read; None if its file came without a card.
        name: of its file, for messages and the history.
        kind: ``transfer`` takes the five stages and leaves the head fresh; ``initial`` takes every layer that has the
            same name and shapes. The VGG paper's section 3.1 grows its deep networks from net A so, but takes only
            the first four convolutions and the dense layers.
        frozen_stages: how many stages, counted from the images, ``transfer`` does not train. BatchNorm in them uses
            and keeps the statistics that it has.
    """

    model: keras.Model
    spec: VggSpec
    image: ImageSpec | None
    name: str
    kind: Literal["transfer", "initial"]
    frozen_stages: int = 0

    def __post_init__(self) -> None:
        _check_frozen_stages(self.frozen_stages, self.kind)

    def copy_into(self, model: keras.Model, spec: VggSpec) -> Origin:
        """Copy weights into ``model``, a fresh network of ``spec``, and freeze its first stages.

        Raises:
            ModelError: the two normalise pixels differently, no layer agrees, or ``transfer`` lacks a layer of the
                stages; ``model`` is then as it was.
        """
        if spec.pixels != self.spec.pixels:
            raise ModelError(
                f"{self.name}: its pixels are {self.spec.pixels}, those of the new network {spec.pixels}; weights "
                "fit only what they were trained on. Set the new spec's pixels to the same."
            )
        sources = {layer.name: layer for layer in self.model.layers if layer.weights}
        targets = [layer for layer in model.layers if layer.weights]
        if self.kind == "transfer":
            targets = [layer for layer in targets if layer.name.startswith("block")]
        fitting = [layer for layer in targets if _shapes(sources.get(layer.name)) == _shapes(layer)]
        if self.kind == "transfer" and len(fitting) < len(targets):
            raise self._lacks(next(layer for layer in targets if layer not in fitting), sources)
        if not fitting:
            raise ModelError(
                f"{self.name}: none of its layers has the name and shapes of one in {spec.name}; its widths are "
                f"{self.spec.widths}, needed are {spec.widths}. Start from a network of the same widths."
            )
        for layer in fitting:
            layer.set_weights(sources[layer.name].get_weights())
        for layer in model.layers:
            if any(layer.name.startswith(f"block{stage}_") for stage in range(1, self.frozen_stages + 1)):
                layer.trainable = False
        digest = hashlib.sha256()
        for layer in fitting:
            for weight in layer.get_weights():
                digest.update(weight.tobytes())
        return Origin(
            kind=self.kind,
            model=self.name,
            weights_sha256=digest.hexdigest(),
            layers=tuple(layer.name for layer in fitting),
            frozen_stages=self.frozen_stages,
        )

    def _lacks(self, layer: keras.Layer, sources: dict[str, keras.Layer]) -> ModelError:
        """What is wrong when ``transfer`` has nothing for ``layer``, which would stay random, or even be frozen so."""
        own = sources.get(layer.name)
        found = (
            f"it has no layer {layer.name} with weights"
            if own is None
            else f"its layer {layer.name} has weights of shapes {_list_shapes(own)}"
        )
        return ModelError(
            f"{self.name}: {found}; needed are {_list_shapes(layer)}. A transfer takes all five stages: build the new "
            "spec with build_transfer_spec, or take what fits with kind='initial'."
        )


def open_network(
    *,
    variant: str | None = None,
    transfer: Path | None = None,
    initial: Path | None = None,
    frozen_stages: int | None = None,
    input: tuple[int, int, int] | None = None,
    normalization: str | None = None,
    dropout: float | None = None,
    width: float | None = None,
    head: str | None = None,
) -> tuple[VggSpec, Start | None]:
    """What is trained, and what it begins with; the spec's classes are still those of where it came from.

    Args:
        variant: name of a spec; DEFAULT_VARIANT if it is None and there is no ``transfer``.
        transfer: file of a trained network whose stages are taken.
        initial: file of a trained network to grow from; its normalisation of pixels is taken over.
        frozen_stages: of ``transfer``; None freezes all.
        input: (height, width, 3); None is the variant's or the base's, as for what follows.
        normalization: one of NORMALIZATIONS.
        dropout: share from 0 to 1.
        width: multiplies the variant's widths, see ``get_spec``.
        head: one of HEADS.

    Raises:
        UsageError: choices that exclude each other, or a value that no VGG can have.
        ModelError: a file cannot be read, or is no VGG.
        MissingDependency: a file is to be read, and TensorFlow or Keras is not installed.
    """
    if transfer is None:
        if frozen_stages is not None:
            raise UsageError("freeze counts the stages of a base; name it with --transfer BASE.keras.")
        spec = get_spec(
            variant or DEFAULT_VARIANT,
            input=input,
            normalization=normalization,
            dropout=dropout,
            width=1.0 if width is None else width,
            head=head,
        )
        start = None if initial is None else read_start(initial, "initial")
        return (spec if start is None else msgspec.structs.replace(spec, pixels=start.spec.pixels)), start
    excluded = {"model": variant, "normalization": normalization, "width": width, "initial": initial}
    for name, found in excluded.items():
        if found is not None:
            raise UsageError(f"--{name} {found}: with --transfer the base decides that. Leave one of the two out.")
    _check_head(head)
    start = read_start(transfer, "transfer", STAGES if frozen_stages is None else frozen_stages)
    return build_transfer_spec(start.spec, input=input, head=head, dropout=dropout), start


def read_start(path: Path, kind: Literal["transfer", "initial"], frozen_stages: int = 0) -> Start:
    """Read a trained network for another one to begin with.

    Raises:
        UsageError: ``frozen_stages`` is not 0 to 5, or not 0 for ``initial``.
        ModelError: the file cannot be read, or is no VGG.
        MissingDependency: TensorFlow or Keras is not installed.
    """
    _check_frozen_stages(frozen_stages, kind)
    model, card = read_model(path)
    image = None if card is None else card.image
    try:
        spec = recognize_spec(model)
    except ModelError as error:
        raise ModelError(
            f"{path}: {error} If it is from keras.applications, vggedge import-weights makes such a model of it."
        ) from error
    return Start(model, spec, image, path.name, kind, frozen_stages)


def build_image_spec(spec: VggSpec, start: Start | None, config: TrainConfig) -> ImageSpec:
    """How images become the input of a network of ``spec``: as for ``start``, if that says it.

    Trained at scales S, it is tested at their middle, as in the VGG paper's section 4.1: objects are then as large as
    in training.
    """
    height, width, _ = spec.input
    scales = config.augmentation.scale
    if start is None or start.image is None:
        image = ImageSpec(height=height, width=width)
    else:
        base = start.image
        scale = base.scale and round(base.scale * max(height, width) / max(base.height, base.width))
        image = msgspec.structs.replace(base, height=height, width=width, scale=scale)
    return image if scales is None else msgspec.structs.replace(image, resize="crop", scale=sum(scales) // 2)


def build_transfer_spec(
    base: VggSpec,
    *,
    input: tuple[int, int, int] | None = None,
    head: str | None = None,
    dropout: float | None = None,
) -> VggSpec:
    """The spec of a network on the stages of ``base``; what is None is as there.

    A dense head in place of a pooled one without dense layers takes the units of the variant ``base`` comes from.

    Raises:
        UsageError: a value that no VGG can have, or a dense head where the variant is not known.
    """
    _check_head(head)
    dense = base.dense
    if head == "gap" and base.head == "dense":
        dense = ()
    elif head == "dense" and not dense:
        if base.name not in SPECS:
            raise UsageError(f"{base.name}: no variant with these stages is known to take dense layers from. Use gap.")
        dense = SPECS[base.name].dense
    given = {"input": input, "head": head, "dropout": dropout}
    return msgspec.structs.replace(base, dense=dense, **{key: each for key, each in given.items() if each is not None})


def _check_head(head: str | None) -> None:
    if head is not None and head not in HEADS:
        raise UsageError(f"head is {head!r}; known are {', '.join(HEADS)}.")


def _check_frozen_stages(count: int, kind: str) -> None:
    if not 0 <= count <= STAGES:
        raise UsageError(f"freeze is {count}; a VGG has {STAGES} stages, so needed is 0 (none) to {STAGES} (all).")
    if count and kind != "transfer":
        raise UsageError(f"frozen_stages is {count} and kind {kind}; only transfer freezes. Leave frozen_stages at 0.")


def _shapes(layer: keras.Layer | None) -> list[tuple[int, ...]]:
    return [] if layer is None else [tuple(weight.shape) for weight in layer.weights]


def _list_shapes(layer: keras.Layer) -> str:
    return ", ".join(map(str, _shapes(layer)))
