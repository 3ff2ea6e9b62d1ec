from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vggedge.data.base import ImageSet
from vggedge.training.augmentation import Augmenter, hold_images, measure_colours, read_largest
from vggedge.training.config import AugmentationConfig
from vggedge_runtime.preprocess import Pixels, scale_image

INPUT = (32, 32, 3)
JITTER = AugmentationConfig(scale=(40, 64))


def ramp(index: int = 0) -> Pixels:
    """A picture of 64x96 whose red is the column and whose green is the row."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[..., 0] = np.arange(96)
    image[..., 1] = np.arange(64)[:, None]
    image[..., 2] = index
    return image


def noise(index: int, side: int = 32) -> Pixels:
    return np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)


def nothing(done: int, total: int, what: str) -> None:
    pass


def test_nothing_to_draw_leaves_the_image_alone() -> None:
    np.testing.assert_array_equal(Augmenter(noise, AugmentationConfig(), INPUT, 0).read(3, 5), noise(5))


def test_a_crop_is_a_part_of_the_image_at_some_scale_and_place() -> None:
    augmenter = Augmenter(ramp, JITTER, INPUT, seed=1)
    steps, corners = [], []
    for epoch in range(200):
        found = augmenter.read(epoch, 0)
        assert (found.shape, found.dtype) == (INPUT, np.uint8)
        across = (float(found[0, -1, 0]) - float(found[0, 0, 0])) / 31
        down = (float(found[-1, 0, 1]) - float(found[0, 0, 1])) / 31
        assert across == pytest.approx(down, abs=0.1)  # isotropic: no stretching
        steps.append(across)
        corners.append((found[0, 0, 0], found[0, 0, 1]))
    # Source pixels for each pixel of the crop: 64 / S, so 1.6 at S = 40 and 1 at S = 64.
    assert min(steps) == pytest.approx(1.0, abs=0.05)
    assert max(steps) == pytest.approx(1.6, abs=0.05)
    assert np.mean(64 / np.array(steps)) == pytest.approx(52, abs=1.5)
    lefts, tops = np.array(corners).T
    assert (lefts.min(), tops.min()) == (0, 0)
    assert lefts.max() > 55  # of 64 at S = 64
    assert tops.max() > 25  # of 32


def test_a_fixed_scale_that_is_the_networks_size_leaves_the_place_along_the_longer_side() -> None:
    augmenter = Augmenter(
        lambda _: scale_image(Image.fromarray(ramp()), 32), AugmentationConfig(scale=(32, 32)), INPUT, 0
    )
    shifts = {int(augmenter.read(epoch, 0)[0, 0, 0]) for epoch in range(100)}
    assert len(shifts) == 17  # columns 0 to 16 of 48
    assert len({int(augmenter.read(epoch, 0)[0, 0, 1]) for epoch in range(10)}) == 1


def test_the_kernel_is_the_one_that_images_are_read_with() -> None:
    """Two colours stay two with the nearest pixel; another kernel would mix them."""
    checks = np.where(np.indices((64, 64)).sum(axis=0) % 2, 255, 0).astype(np.uint8)
    image = np.repeat(checks[..., None], 3, axis=2)
    for kernel, is_mixed in (("nearest", False), ("bilinear", True)):
        config = AugmentationConfig(scale=(40, 60), kernel=kernel)  # type: ignore[arg-type]
        found = Augmenter(lambda _: image, config, INPUT, seed=2).read(0, 0)
        assert (len(np.unique(found)) > 2) == is_mixed


def test_half_of_the_images_are_flipped() -> None:
    augmenter = Augmenter(noise, AugmentationConfig(flip=True), INPUT, seed=0)
    flipped = 0
    for index in range(400):
        found = augmenter.read(0, index)
        is_flipped = np.array_equal(found, noise(index)[:, ::-1])
        assert is_flipped or np.array_equal(found, noise(index))
        flipped += is_flipped
    assert 160 < flipped < 240  # four deviations of a fair coin


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone() -> None:
    config = AugmentationConfig(scale=(40, 64), flip=True, colour_shift=0.1)
    colours = measure_colours(8, ramp, nothing)
    first, second = (Augmenter(ramp, config, INPUT, 3, colours) for _ in range(2))
    forward = [first.read(epoch, index) for epoch in range(3) for index in range(4)]
    backward = [second.read(epoch, index) for epoch in (2, 1, 0) for index in (3, 2, 1, 0)][::-1]
    np.testing.assert_array_equal(forward, backward)
    assert len({image.tobytes() for image in forward}) == 12
    other = Augmenter(ramp, config, INPUT, 4, colours)
    assert not np.array_equal(other.read(0, 0), forward[0])


def test_colour_components_are_those_of_the_pixels() -> None:
    generator = np.random.default_rng(0)
    along = np.array([2.0, 1.0, 0.0]) / np.sqrt(5)
    images = [
        np.clip(128 + generator.normal(0, 20, (40, 40, 1)) * along + generator.normal(0, 1, (40, 40, 3)), 0, 255)
        .round()
        .astype(np.uint8)
        for _ in range(6)
    ]
    found = measure_colours(6, lambda index: images[index], nothing)
    lengths = np.linalg.norm(found, axis=0)
    # Variance 20**2 + 1 + 1/12 (rounding) along the line, in units of 0 to 1, and back to pixels.
    assert lengths.max() == pytest.approx(401.1 / 255, rel=0.05)
    assert np.sort(lengths)[1] < 0.02 * lengths.max()
    strongest = found[:, lengths.argmax()]
    np.testing.assert_allclose(np.abs(strongest / lengths.max()), along, atol=0.02)


def test_the_colour_shift_is_one_for_the_whole_image_and_as_strong_as_it_says() -> None:
    colours = np.diag([400.0, 100.0, 0.0])  # pixels
    grey = np.full(INPUT, 128, np.uint8)
    augmenter = Augmenter(lambda _: grey, AugmentationConfig(colour_shift=0.1), INPUT, 0, colours)
    found = np.array([augmenter.read(0, index) for index in range(500)], dtype=float)
    assert np.ptp(found, axis=(1, 2)).max() == 0
    shifts = found[:, 0, 0] - 128
    assert shifts[:, 0].std() == pytest.approx(40, rel=0.12)
    assert shifts[:, 1].std() == pytest.approx(10, rel=0.12)
    assert set(shifts[:, 2]) == {0}
    assert abs(shifts[:, 0].mean()) < 6


def test_a_colour_shift_stops_at_black_and_white() -> None:
    colours = np.diag([1e6, 1e6, 1e6])
    augmenter = Augmenter(noise, AugmentationConfig(colour_shift=1.0), INPUT, 0, colours)
    assert set(np.unique([augmenter.read(0, index) for index in range(20)])) == {0, 255}


def test_measuring_colours_reads_at_most_256_images_and_says_so() -> None:
    read: list[int] = []
    told: list[tuple[int, int, str]] = []

    def read_one(index: int) -> Pixels:
        read.append(index)
        return noise(index, 8)

    measure_colours(10_000, read_one, lambda *each: told.append(each))
    assert len(read) == len(set(read)) == 256
    assert (min(read), max(read)) == (0, 9999)
    assert told[-1] == (256, 256, "measuring colours")


@pytest.mark.parametrize(("memory_bytes", "kept"), [(0, 0), (3 * 8 * 8 * 3, 3), (2**20, 5)])
def test_as_many_images_stay_in_memory_as_fit(memory_bytes: int, kept: int) -> None:
    read: list[int] = []
    told: list[tuple[int, int, str]] = []

    def read_one(index: int) -> Pixels:
        read.append(index)
        return noise(index, 8)

    held, left = hold_images(5, read_one, memory_bytes, lambda *each: told.append(each), "reading")
    assert left == memory_bytes - kept * 8 * 8 * 3
    read.clear()
    for index in range(5):
        np.testing.assert_array_equal(held(index), noise(index, 8))
    assert read == list(range(kept, 5))
    assert not told or told[-1][0] == told[-1][1]


def test_images_are_read_once_at_their_greatest_scale() -> None:
    sides: list[int] = []

    def read_scaled(index: int, side: int) -> Pixels:
        sides.append(side)
        return scale_image(Image.fromarray(ramp(index)), side)

    data = ImageSet("ramps", ("a",), np.zeros(2, np.int64), noise, read_scaled)
    assert read_largest(data, JITTER)(1).shape == (64, 96, 3)
    assert sides == [64]
    np.testing.assert_array_equal(read_largest(data, AugmentationConfig(flip=True))(1), noise(1))
