"""vggedge evaluate: how well a model or a bundle answers labelled images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import typer

from vggedge.cli import output
from vggedge.cli.reading import open_labelled
from vggedge.data import ImageSet
from vggedge.evaluation import Evaluation, Protocol, build_predict, evaluate, frequent_confusions, worst_classes
from vggedge.model import read_card, read_model
from vggedge_export.conversion import normalizing_layer
from vggedge_runtime.backends.base import backend_choices
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.progress import Advance
from vggedge_runtime.session import Session
from vggedge_runtime.statistics import ClassFigures

NAME = "evaluate"

_MATRIX_LIMIT = 12
"""Classes whose confusion matrix still fits a terminal."""
_SHOWN = 10

OpenData: TypeAlias = Callable[[ImageSpec, "tuple[str, ...] | None"], ImageSet]
"""From the network's image spec and labels, if it has any, to the images that the user named."""


class EvaluateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints.

    Attributes:
        model: the file or bundle.
        graph: the graph of the bundle that ran; None for a Keras model.
        backend: what ran it; ``keras`` for a Keras model.
        image: how an image becomes the input, where the protocol names no scales.
        result: the figures.
    """

    model: str
    graph: str | None
    backend: str
    image: ImageSpec
    result: Evaluation


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="MODEL.keras, or the folder of a bundle.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled images, best never seen in training.")],
    scales: Annotated[
        str | None,
        typer.Option(help="Scale every image until its shorter side has so many pixels; several, comma-separated."),
    ] = None,
    crops: Annotated[
        int, typer.Option(min=1, help="Crop each scaled image in a grid of so many rows and columns.")
    ] = 1,
    flip: Annotated[
        bool, typer.Option("--flip", help="Average with mirror images; not if left or right matters.")
    ] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Answer whole scaled images, fully convolutionally.")] = False,
    images: Annotated[int | None, typer.Option(min=1, help="Evaluate on at most so many; all if left out.")] = None,
    backend: Annotated[
        str | None, typer.Option(help=f"Of a bundle: one of {backend_choices()}; auto if left out.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of a bundle: auto, fp32, fp16, int8, or the name of a graph; auto if left out."),
    ] = None,
    json: output.JsonFlag = False,
) -> None:
    """Measure accuracy, overall and by class, and what is confused with what; several views are averaged."""
    protocol = Protocol(scales=_parse_scales(scales), crops=crops, flip=flip, dense=dense)
    with output.progress(quiet=json) as advance:
        open_data = functools.partial(_open_data, data, images, quiet=json)
        if model.is_dir():
            answer = _evaluate_bundle(model, open_data, protocol, (backend or "auto", precision or "auto"), advance)
        elif backend or precision:
            raise UsageError(f"{model}: --backend and --precision choose within a bundle, and this is none.")
        else:
            answer = _evaluate_keras(model, open_data, protocol, advance)
    if json:
        output.print_json(answer)
    else:
        _print_tables(answer)


def _parse_scales(text: str | None) -> tuple[int, ...]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if any(not (part.isascii() and part.isdigit() and len(part) < 10) for part in parts):
        raise UsageError(f"--scales is {text!r}; needed are lengths in pixels, such as 64 or 64,80,96.")
    return tuple(map(int, parts))


def _open_data(
    data: str, count: int | None, spec: ImageSpec, labels: tuple[str, ...] | None, *, quiet: bool
) -> ImageSet:
    """Open DATA and check that its classes are those of the network; None: the network brings no labels."""
    found = open_labelled(data, spec, labels, "the network")
    if labels is None and not quiet:
        output.print_note("no labels file beside the model: labels are the data's class names, images stretched")
    return found if count is None else found.take(count, seed=0)


def _evaluate_bundle(
    path: Path, open_data: OpenData, protocol: Protocol, choice: tuple[str, str], advance: Advance
) -> EvaluateAnswer:
    if protocol.dense:
        raise UsageError(
            f"{path}: the graphs of a bundle take images of one size, so --dense cannot run on them. "
            "Give the MODEL.keras that it was exported from."
        )
    backend, precision = choice
    with Session.open(path, backend, precision) as session:
        images = open_data(session.image_spec, session.labels)
        result = evaluate(session.predict, images, protocol, advance)
        return EvaluateAnswer(
            model=output.format_path(path),
            graph=session.graph,
            backend=session.backend,
            image=session.image_spec,
            result=result,
        )


def _evaluate_keras(path: Path, open_data: OpenData, protocol: Protocol, advance: Advance) -> EvaluateAnswer:
    card = read_card(path)
    # What can be refused without TensorFlow is refused before it loads.
    images = open_data(card.image, card.labels) if card else None
    if card:
        protocol.check_size(card.image.height, card.image.width)
    advance(0, 1, "loading the model")
    network, _ = read_model(path)
    advance(1, 1, "loading the model")
    _check_shapes(network)
    spec = card.image if card else _spec_of(network)
    _check_normalization(network, spec)
    if protocol.dense and not protocol.scales and spec.scale is not None:
        protocol = msgspec.structs.replace(protocol, scales=(spec.scale,))
    predict = build_predict(network, dense=protocol.dense, normalization=spec.normalization)
    result = evaluate(predict, open_data(spec, None) if images is None else images, protocol, advance)
    return EvaluateAnswer(model=output.format_path(path), graph=None, backend="keras", image=spec, result=result)


def _check_shapes(network: Any) -> None:
    """Raise ModelError unless the model goes from RGB images to one score a class."""
    inputs, outputs = (getattr(network, name, None) for name in ("input_shape", "output_shape"))
    if not (
        isinstance(inputs, tuple)
        and isinstance(outputs, tuple)
        and (len(inputs), len(outputs)) == (4, 2)
        and inputs[3] == 3
        and (outputs[1] or 0) > 1
    ):
        raise ModelError(
            f"the model goes from {inputs} to {outputs}; evaluation needs (n, height, width, 3) and (n, classes) with "
            "at least 2 classes. vggedge export adapts grey inputs and single sigmoids: evaluate its bundle."
        )


def _spec_of(network: Any) -> ImageSpec:
    """Image spec of a model that came without one: its input's size, images stretched to it.

    Raises:
        ModelError: the model leaves its size open.
        UsageError: nothing says how its pixels are normalised. Guessing would be worse than asking: a model
            trained on x/255 and fed 0 to 255 answers, wrongly.
    """
    _, height, width, _ = network.input_shape
    if height is None or width is None:
        raise ModelError(
            f"the model takes images of any size, {network.input_shape}, and there is no image spec beside it. "
            "Write MODEL.labels.txt and MODEL.image.json."
        )
    if normalizing_layer(network) is None:
        raise UsageError(
            "the model has no Rescaling or Normalization layer and no image spec beside it, so nothing says what its "
            "pixels were divided by in training. Write two files beside it: MODEL.labels.txt, a class a line, and "
            f'MODEL.image.json; for pixels from 0 to 1 that is {{"height": {height}, "width": {width}, '
            '"normalization": {"mean": [0, 0, 0], "std": [255, 255, 255]}}.'
        )
    return ImageSpec(height=height, width=width)


def _check_normalization(network: Any, spec: ImageSpec) -> None:
    inside = normalizing_layer(network)
    if inside is not None and spec.normalization is not None:
        raise ModelError(
            f"the model's layer {inside!r} normalises the image, and so would the image spec. Remove `normalization` "
            "from MODEL.image.json; doing both gives wrong answers."
        )


def _print_tables(answer: EvaluateAnswer) -> None:
    result = answer.result
    rows: list[list[object]] = [["accuracy [95 %]", result.accuracy]]
    if result.top5_accuracy is not None:
        rows.append(["top-5 accuracy [95 %]", result.top5_accuracy])
    rows.append(["balanced accuracy", _percent(result.balanced_accuracy)])
    rows.append(["cross-entropy", f"{result.cross_entropy:.4f}"])
    ran_by = answer.backend if answer.graph is None else f"{answer.graph} on {answer.backend}"
    output.print_table(f"{answer.model} ({ran_by}) on {result.data}, {result.n} images", ["figure", "value"], rows)
    if len(result.labels) <= _MATRIX_LIMIT:
        matrix = [[label, *row] for label, row in zip(result.labels, result.confusion, strict=True)]
        output.print_table("Confusion: true class by row, answered class by column", ["", *result.labels], matrix)
        _print_classes("Classes", result.classes)
    else:
        _print_classes(f"The {_SHOWN} worst of {len(result.labels)} classes", worst_classes(result, _SHOWN))
        confusions = [
            [each.true, each.answered, each.images, _percent(each.share)]
            for each in frequent_confusions(result, _SHOWN)
        ]
        columns = ["true class", "answered", "images", "of its class"]
        output.print_table(f"The {len(confusions)} most frequent confusions", columns, confusions)
    shown = "" if result.protocol.scales or result.protocol.dense else f" Images: {answer.image.describe()}."
    output.print_line(f"Protocol: {result.description}.{shown} {result.seconds:.1f} s.")


def _print_classes(title: str, classes: Sequence[ClassFigures]) -> None:
    rows = [
        [each.label, each.images, _percent(each.recall), _percent(each.precision), _percent(each.f1)]
        for each in classes
    ]
    output.print_table(title, ["class", "images", "recall", "precision", "F1"], rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"
