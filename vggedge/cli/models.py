"""``vggedge models``: the family, in numbers."""

from __future__ import annotations

from typing import Annotated

import typer

from vggedge.analysis import Analysis, LayerFigures, analyse
from vggedge.architecture import HEADS, NORMALIZATIONS, SPECS, get_spec, parse_input
from vggedge.cli.output import JsonFlag, print_json, print_line, print_table
from vggedge_runtime.errors import UsageError

NAME = "models"


def command(
    name: Annotated[str | None, typer.Argument(help="One variant; all of them without it.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Every layer of the variant.")] = False,
    size: Annotated[
        str | None, typer.Option("--input", metavar="HxWx3", help="Input size in pixels, instead of its own.")
    ] = None,
    classes: Annotated[int | None, typer.Option("--classes", help="Classes, instead of its own.")] = None,
    normalization: Annotated[
        str | None, typer.Option("--normalization", help=f"One of: {', '.join(NORMALIZATIONS)}.")
    ] = None,
    width: Annotated[float, typer.Option("--width", help="Multiplies the channels and the hidden dense units.")] = 1.0,
    head: Annotated[
        str | None, typer.Option("--head", help=f"One of: {', '.join(HEADS)}; gap is global average pooling.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Show the variants: layers, parameters, multiply-accumulates, receptive field, memory."""
    if layers and name is None:
        raise UsageError("--layers shows one variant; name it, for example: vggedge models vgg16-compact --layers")
    shape = None if size is None else parse_input(size)
    found = [
        analyse(get_spec(each, classes=classes, input=shape, normalization=normalization, width=width, head=head))
        for each in ([name] if name is not None else SPECS)
    ]
    if json:
        print_json(found[0] if name is not None else found)
    elif name is None:
        _print_family(found)
    else:
        _print_variant(found[0], layers)


def _print_family(found: list[Analysis]) -> None:
    columns = ("variant", "layers", "input", "parameters", "MMAC", "field", "peak KiB")  # fits into 80 columns
    rows = [
        (
            each.spec.name,
            each.weight_layers,
            _shape(each.spec.input[:2]),
            f"{each.parameters:,}",
            f"{each.macs / 1e6:,.0f}" if each.macs >= 1e8 else _millions(each.macs),
            each.receptive_field,
            f"{each.peak_activation_bytes / 1024:,.0f}",
        )
        for each in found
    ]
    print_table("", columns, rows)
    print_line(
        "One float32 image. Layers: those with weights. MMAC: millions of multiply-accumulates. Field:\n"
        "receptive field after the last convolution, pixels. Peak: activations of the widest layer, in\n"
        "and out. More: vggedge models NAME --layers"
    )


def _print_variant(found: Analysis, layers: bool) -> None:
    spec = found.spec
    if layers:
        columns = ("layer", "output", "parameters", "MMAC", "field px", "KiB")
        print_table(spec.name, columns, [_layer_row(layer) for layer in found.layers])
        _print_shares(found)
        _print_stacks(found)
    facts = (
        ("input", _shape(spec.input)),
        ("classes", spec.classes),
        ("normalization", spec.normalization),
        ("widths", " ".join(map(str, spec.widths))),
        ("head", spec.head),
        ("dense units", " ".join(map(str, spec.dense)) or "none"),
        ("dropout", spec.dropout),
        ("weight layers", found.weight_layers),
        ("parameters", f"{found.parameters:,}"),
        ("float32 weights, KiB", _kibibytes(4 * found.parameters)),
        ("multiply-accumulates, millions", _millions(found.macs)),
        ("receptive field after the last convolution, px", found.receptive_field),
        ("peak of float32 activations, KiB", _kibibytes(found.peak_activation_bytes)),
    )
    print_table("", (spec.name, "one image"), facts)


def _print_shares(found: Analysis) -> None:
    rows = [
        (
            each.what,
            each.layers,
            f"{each.parameters:,}",
            f"{each.parameter_share:.1%}",
            _millions(each.macs),
            f"{each.mac_share:.1%}",
        )
        for each in found.shares
        if each.layers
    ]
    print_table("Who holds the parameters, who does the work", ("", "layers", "parameters", "", "MMAC", ""), rows)


def _print_stacks(found: Analysis) -> None:
    if not found.stacks:
        return
    rows = [
        (
            f"stage {each.stage}: {each.convolutions} of 3x3",
            f"{each.window}x{each.window}",
            f"{each.weights:,}",
            f"{each.single_weights:,}",
            f"{each.saved:.1%}",
        )
        for each in found.stacks
    ]
    print_table("Stacked 3x3 convolutions", ("stack", "sees as", "its weights", "weights of that one", "saved"), rows)
    print_line(
        "Between maps of the stage's width, without biases. Multiply-accumulates are saved in the same\n"
        "proportion, and there is a relu behind each layer instead of one.\n"
    )


def _layer_row(layer: LayerFigures) -> tuple[object, ...]:
    return (
        layer.name,
        _shape(layer.output),
        f"{layer.parameters:,}",
        _millions(layer.macs),
        "all" if layer.receptive_field is None else layer.receptive_field,
        _kibibytes(layer.activation_bytes),
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _millions(macs: int) -> str:
    return f"{macs / 1e6:,.2f}"


def _kibibytes(size: int) -> str:
    return f"{size / 1024:,.1f}"
