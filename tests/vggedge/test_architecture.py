from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from vggedge.architecture import NORMALIZATIONS, SPECS, VggSpec, get_spec, parse_input
from vggedge_runtime.errors import UsageError


def test_the_table_holds_every_variant_and_its_compact_form() -> None:
    names = ["vgg9", "vgg11", "vgg11-lrn", "vgg13", "vgg16-1x1", "vgg16", "vgg19"]
    assert list(SPECS) == names + [f"{name}-compact" for name in names]


@pytest.mark.parametrize("name", SPECS)
def test_the_number_in_the_name_is_the_number_of_weight_layers(name: str) -> None:
    digits = name.removeprefix("vgg").split("-")[0]
    assert SPECS[name].weight_layers == int(digits)
    kinds = [layer.kind for layer in SPECS[name].layers()]
    assert kinds.count("conv") + kinds.count("dense") == int(digits)
    assert kinds.count("pool") == 5


def test_paper_variants_are_those_of_the_paper() -> None:
    spec = get_spec("vgg16")
    assert (spec.widths, spec.dense) == ((64, 128, 256, 512, 512), (4096, 4096))
    assert (spec.input, spec.classes, spec.normalization) == ((224, 224, 3), 1000, "none")
    assert get_spec("vgg11-lrn").normalization == "lrn"
    assert get_spec("vgg16-1x1").stages[2] == (3, 3, 1)


def test_layer_names_are_those_of_keras() -> None:
    names = [layer.name for layer in get_spec("vgg16-compact").layers()]
    assert names[:5] == ["rescaling", "block1_conv1", "block1_bn1", "block1_conv2", "block1_pool"]
    assert names[-6:] == ["flatten", "fc1", "fc1_dropout", "fc2", "fc2_dropout", "predictions"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("none", []),
        ("first", ["block1_bn1"]),
        ("first-of-two-stages", ["block1_bn1", "block2_bn1"]),
        ("two-stages", ["block1_bn1", "block1_bn2", "block2_bn1", "block2_bn2"]),
        ("lrn", ["block1_lrn1"]),
    ],
)
def test_normalization_stands_where_its_name_says(normalization: str, expected: list[str]) -> None:
    layers = get_spec("vgg16-compact", normalization=normalization).layers()
    assert [layer.name for layer in layers if layer.kind in ("batch_norm", "lrn")] == expected
    assert all(layer.activation == "relu" for layer in layers if layer.kind == "conv")


def test_every_puts_the_batch_norm_between_convolution_and_relu() -> None:
    layers = get_spec("vgg13-compact", normalization="every").layers()
    for at, layer in enumerate(layers):
        if layer.kind == "conv":
            assert layer.activation == "linear"
            assert [after.kind for after in layers[at + 1 : at + 3]] == ["batch_norm", "relu"]


def test_no_dropout_layers_at_dropout_zero() -> None:
    assert not any(layer.kind == "dropout" for layer in get_spec("vgg9-compact", dropout=0).layers())


def test_get_spec_replaces_what_is_given() -> None:
    spec = get_spec("vgg11-compact", classes=3, input=(32, 48, 3), normalization="none", dropout=0.25)
    assert (spec.classes, spec.input, spec.normalization, spec.dropout) == (3, (32, 48, 3), "none", 0.25)
    assert spec.widths == SPECS["vgg11-compact"].widths
    assert SPECS["vgg11-compact"].classes == 6


def test_an_unknown_name_gets_the_closest_and_the_list() -> None:
    with pytest.raises(UsageError, match=r"Did you mean vgg16-compact\? Known are: vgg9, .*vgg19-compact"):
        get_spec("VGG16compact")
    with pytest.raises(UsageError, match=r"'zzz'\. Known are"):
        get_spec("zzz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": (31, 64, 3)}, "five poolings need at least 32x32"),
        ({"input": (64, 64, 1)}, "images are RGB"),
        ({"classes": 1}, "at least 2"),
        ({"normalization": "batch"}, "known are none, first"),
        ({"dropout": 1.0}, "below 1"),
        ({"dropout": float("nan")}, "below 1"),
        ({"stages": ((3,),) * 4}, "a VGG has 5"),
        ({"stages": ((3,), (), (3,), (3,), (3,))}, "every stage needs a convolution"),
        ({"stages": ((2,),) * 5}, "odd size"),
        ({"widths": (4, 8, 0, 32, 32)}, "at least 1"),
        ({"dense": (0,)}, "at least 1"),
    ],
)
def test_a_spec_that_no_vgg_can_have_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        msgspec.structs.replace(SPECS["vgg9-compact"], **change)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_spec_survives_json(normalization: str) -> None:
    spec = get_spec("vgg16-1x1-compact", normalization=normalization)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=VggSpec) == spec


def test_parse_input() -> None:
    assert parse_input("224x224x3") == (224, 224, 3)
    assert parse_input(" 48X64 ") == (48, 64, 3)
    for wrong in ("64", "64x", "64x64x3x1", "axb", "-64x64", "6.4x64", ""):
        with pytest.raises(UsageError, match="HEIGHTxWIDTH"):
            parse_input(wrong)


def test_the_model_side_imports_without_tensorflow() -> None:
    code = """
import sys
for name in ("tensorflow", "keras"):
    sys.modules[name] = None
import vggedge.architecture, vggedge.analysis, vggedge.model, vggedge.training
from vggedge_runtime.errors import MissingDependency
try:
    vggedge.model.build_vgg(vggedge.architecture.get_spec("vgg9-compact"))
except MissingDependency as error:
    sys.exit("vggedge[train]" not in str(error))
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
