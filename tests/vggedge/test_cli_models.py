from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from vggedge.analysis import Analysis
from vggedge.architecture import SPECS
from vggedge.cli import models
from vggedge_runtime.errors import UsageError

app = typer.Typer()
app.command(models.NAME)(models.command)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_family() -> None:
    lines = run().splitlines()
    for name in SPECS:
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    row = "vgg16 16 224x224 138,357,544 15,470 196 25,088"
    assert row.split() in [line.split() for line in lines]
    assert max(map(len, lines[:-4])) <= 80


def test_one_variant() -> None:
    found = run("vgg16-compact")
    assert "158,234" in found
    assert "196" in found
    assert "block1_conv1" not in found


def test_layers_of_one_variant() -> None:
    lines = [line.split() for line in run("vgg16-compact", "--layers").splitlines()]
    assert ["block1_conv1", "64x64x4", "112", "0.44", "3", "64.0"] in lines
    assert ["predictions", "6", "1,542", "0.00", "all", "0.0"] in lines


def test_shares_and_stacks_of_vgg16() -> None:
    lines = [" ".join(line.split()) for line in run("vgg16", "--layers").splitlines()]
    assert "convolutions 13 14,714,688 10.6% 15,346.63 99.2%" in lines
    assert "dense layers 3 123,642,856 89.4% 123.63 0.8%" in lines
    assert "stage 2: 2 of 3x3 5x5 294,912 409,600 28.0%" in lines
    assert "stage 3: 3 of 3x3 7x7 1,769,472 3,211,264 44.9%" in lines
    assert not any(line.startswith("normalization 0") for line in lines)


def test_a_variant_without_stacks_says_nothing_of_them() -> None:
    # One convolution a stage, but for the last.
    lines = run("vgg9-compact", "--layers").splitlines()
    assert [line.split(":")[0].strip() for line in lines if " of 3x3 " in line] == ["stage 5"]


def test_width_and_head() -> None:
    found = msgspec.json.decode(run("vgg16", "--width", "0.25", "--head", "gap", "--json"), type=Analysis)
    assert found.spec.widths == (16, 32, 64, 128, 128)
    assert found.spec.dense == ()
    convolutions = 14_714_688  # at width 1; weights go with its square, biases with it, the input has 3 channels
    assert convolutions / 17 < found.parameters < convolutions / 12
    assert "head gap" in " ".join(run("vgg16", "--head", "gap").split())


def test_input_classes_and_normalization_replace_the_variants_own() -> None:
    options = ("--input", "32x48", "--classes", "9", "--normalization", "none", "--json")
    found = msgspec.json.decode(run("vgg11-compact", *options), type=Analysis)
    assert (found.spec.input, found.spec.classes, found.spec.normalization) == ((32, 48, 3), 9, "none")
    assert found.layers[-1].output == (9,)


def test_json_of_the_family_is_a_list() -> None:
    found: list[dict[str, Any]] = json.loads(run("--json"))
    assert [each["spec"]["name"] for each in found] == list(SPECS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg61",), "Did you mean vgg1"),
        (("--layers",), "name it"),
        (("vgg16", "--input", "small"), "HEIGHTxWIDTH"),
        (("vgg16", "--input", "16x16"), "at least 32x32"),
        (("vgg16", "--width", "0"), "factor above 0"),
        (("vgg16", "--width", "nan"), "factor above 0"),
        (("vgg16", "--head", "flat"), "known are dense, gap"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(*arguments)
