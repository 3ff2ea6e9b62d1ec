from __future__ import annotations

import math

import pytest

from vggedge.analysis import analyse
from vggedge.architecture import SPECS, get_spec


@pytest.mark.parametrize(
    ("normalization", "parameters"),
    [
        ("none", 158_186),
        ("first", 158_202),
        ("first-of-two-stages", 158_234),
        ("two-stages", 158_282),
        ("lrn", 158_186),
        ("every", 158_186 + 4 * (2 * 4 + 2 * 8 + 3 * 16 + 6 * 32)),
    ],
)
def test_parameters_of_compact_vgg16(normalization: str, parameters: int) -> None:
    assert analyse(get_spec("vgg16-compact", normalization=normalization)).parameters == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vgg9", 129_913_448),
        ("vgg11", 132_863_336),
        ("vgg11-lrn", 132_863_336),
        ("vgg13", 133_047_848),
        ("vgg16-1x1", 133_638_952),
        ("vgg16", 138_357_544),
        ("vgg19", 143_667_240),
    ],
)
def test_parameters_of_the_papers_variants(name: str, parameters: int) -> None:
    assert analyse(get_spec(name)).parameters == parameters


def test_multiply_accumulates_of_vgg16() -> None:
    layers = analyse(get_spec("vgg16")).layers
    assert sum(layer.macs for layer in layers if layer.kind == "conv") == 15_346_630_656
    assert sum(layer.macs for layer in layers if layer.kind == "dense") == 123_633_664
    assert all(layer.macs == 0 for layer in layers if layer.kind not in ("conv", "dense"))


def test_receptive_field_of_vgg16() -> None:
    found = analyse(get_spec("vgg16"))
    fields = {layer.name: layer.receptive_field for layer in found.layers}
    assert (fields["block1_conv1"], fields["block1_conv2"], fields["block1_pool"]) == (3, 5, 6)
    assert (fields["block5_conv3"], fields["block5_pool"]) == (196, 212)
    assert (fields["flatten"], fields["fc1"], fields["predictions"]) == (212, None, None)
    assert found.receptive_field == 196


def test_a_convolution_of_one_pixel_adds_nothing_to_the_field() -> None:
    assert analyse(get_spec("vgg16-1x1")).receptive_field == analyse(get_spec("vgg13")).receptive_field == 140


def test_shapes_and_memory_of_the_compact_net() -> None:
    found = analyse(get_spec("vgg16-compact"))
    rows = {layer.name: layer for layer in found.layers}
    assert rows["block1_conv1"].output == (64, 64, 4)
    assert rows["block1_conv1"].activation_bytes == 64 * 64 * 4 * 4
    assert rows["block5_pool"].output == (2, 2, 32)
    assert rows["flatten"].output == (128,)
    assert rows["predictions"].output == (6,)
    # block1_conv2 reads and writes 64x64x4; nothing else has more at once.
    assert found.peak_activation_bytes == 2 * 64 * 64 * 4 * 4
    assert analyse(get_spec("vgg16-compact"), bytes_per_value=1).peak_activation_bytes == 2 * 64 * 64 * 4


def test_odd_sizes_lose_their_last_row_in_the_pooling() -> None:
    rows = {layer.name: layer for layer in analyse(get_spec("vgg9-compact", input=(65, 47, 3))).layers}
    assert rows["block1_pool"].output == (32, 23, 4)
    assert rows["block5_pool"].output == (2, 1, 32)


@pytest.mark.parametrize("name", SPECS)
def test_totals_are_the_sums_of_the_rows(name: str) -> None:
    found = analyse(SPECS[name])
    assert found.parameters == sum(layer.parameters for layer in found.layers)
    assert found.macs == sum(layer.macs for layer in found.layers)
    assert found.weight_layers == SPECS[name].weight_layers
    assert all(layer.activation_bytes == 4 * math.prod(layer.output) for layer in found.layers)
    assert found.peak_activation_bytes >= max(layer.activation_bytes for layer in found.layers)


def test_a_stack_saves_what_the_paper_says() -> None:
    stacks = {stack.stage: stack for stack in analyse(get_spec("vgg19")).stacks}
    assert (stacks[1].convolutions, stacks[1].window) == (2, 5)
    assert (stacks[3].convolutions, stacks[3].window) == (4, 9)
    three = analyse(get_spec("vgg16")).stacks[2]
    # 3 * 9 * C^2 against 49 * C^2: the single layer needs 81 % more (section 2.3).
    assert (three.window, three.weights, three.single_weights) == (7, 27 * 256**2, 49 * 256**2)
    assert three.single_weights / three.weights == pytest.approx(1.81, abs=0.005)
    # The 1x1 behind two 3x3 sees no further.
    assert {stack.window for stack in analyse(get_spec("vgg16-1x1")).stacks} == {5}


def test_the_window_of_a_stack_is_the_receptive_field_that_the_rows_have() -> None:
    for name in ("vgg13", "vgg16", "vgg19"):
        rows = {layer.name: layer for layer in analyse(get_spec(name)).layers}
        first = analyse(get_spec(name)).stacks[0]
        assert rows[f"block1_conv{first.convolutions}"].receptive_field == first.window


@pytest.mark.parametrize("name", SPECS)
def test_shares_add_up(name: str) -> None:
    found = analyse(SPECS[name])
    assert sum(share.parameters for share in found.shares) == found.parameters
    assert sum(share.macs for share in found.shares) == found.macs
    assert sum(share.parameter_share for share in found.shares) == pytest.approx(1)
    assert sum(share.mac_share for share in found.shares) == pytest.approx(1)
    convolutions, dense, norms = found.shares
    assert convolutions.layers + dense.layers == found.weight_layers
    assert (norms.layers > 0) == (SPECS[name].normalization != "none")


def test_a_pooled_head() -> None:
    rows = {layer.name: layer for layer in analyse(get_spec("vgg16-compact", head="gap")).layers}
    assert rows["avg_pool"].output == (32,)
    assert (rows["avg_pool"].parameters, rows["avg_pool"].macs, rows["avg_pool"].receptive_field) == (0, 0, None)
    assert rows["predictions"].parameters == 32 * 6 + 6
    assert "flatten" not in rows
    assert "fc1" not in rows
