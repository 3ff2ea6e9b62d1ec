from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vggedge.data.fingers import LABELS, SEED_LIMIT, draw_hand, open_fingers
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec

SPEC = ImageSpec(height=64, width=64)


def pixels(seed: int, index: int, *, hard: bool = False, size: int = 64) -> np.ndarray:
    return np.asarray(draw_hand(seed, index, hard=hard, size=size)).astype(np.float64)


@pytest.mark.parametrize("hard", [False, True])
def test_same_key_gives_the_same_picture_whatever_was_drawn_before(hard: bool) -> None:
    first = pixels(7, 4, hard=hard)
    pixels(7, 5, hard=hard)
    np.testing.assert_array_equal(pixels(7, 4, hard=hard), first)


@pytest.mark.parametrize("hard", [False, True])
def test_shorter_set_is_a_prefix_of_a_longer_one(hard: bool) -> None:
    short = open_fingers(10, 1, SPEC, hard=hard)
    long = open_fingers(5000, 1, SPEC, hard=hard)
    np.testing.assert_array_equal(short.read(), long.read(range(10)))
    np.testing.assert_array_equal(short.targets, long.targets[:10])


def test_no_two_pictures_of_seeds_levels_and_places_are_equal() -> None:
    drawn = {
        draw_hand(seed, index, hard=hard).tobytes()
        for seed in range(4)
        for index in range(24)
        for hard in (False, True)
    }
    assert len(drawn) == 4 * 24 * 2


@pytest.mark.parametrize("count", [6, 100, 6000])
def test_classes_are_balanced_to_one_image(count: int) -> None:
    images = open_fingers(count, 0, SPEC)
    assert images.labels == LABELS == ("0", "1", "2", "3", "4", "5")
    assert len(images) == count
    assert np.ptp(np.bincount(images.targets, minlength=6)) <= 1


def test_pictures_use_the_whole_range_and_all_channels() -> None:
    batch = open_fingers(120, 3, SPEC).read().astype(np.float64)
    assert 80 < batch.mean() < 175
    assert (batch.mean(axis=(0, 1, 2)) > 60).all()
    assert batch.std(axis=(1, 2)).mean(axis=1).min() > 8  # never a flat picture
    assert np.unique(batch).size > 250
    # Places of light and dark pixels vary: no pixel gives the class away by itself.
    assert batch.std(axis=0).min() > 20


def test_every_finger_adds_edges_where_it_is_drawn() -> None:
    """The mean over many hands of one class: the fingers add edges above the palm, the thumb beside it."""
    above, beside = [], []
    for number in range(6):
        members = np.stack([pixels(2, index) for index in range(number, 360, 6)])
        edges = np.abs(np.diff(members, axis=2)).mean(axis=(0, 3))
        above.append(edges[:26].mean())
        beside.append(edges[26:48, 42:].mean())
    assert above[:5] == sorted(above[:5])
    assert above[4] > 1.3 * above[0]
    assert beside[5] > 1.1 * beside[4]


def test_hard_level_has_more_contrast_than_the_demo() -> None:
    def roughness(hard: bool) -> float:
        return float(np.mean([np.abs(np.diff(pixels(0, i, hard=hard), axis=0)).mean() for i in range(60)]))

    assert roughness(True) > 1.2 * roughness(False)


def test_size_changes_the_resolution_and_not_the_hand() -> None:
    small, large = pixels(5, 3, size=32), draw_hand(5, 3, size=128)
    assert large.size == (128, 128)
    assert large.mode == "RGB"
    shrunk = np.asarray(large.reduce(4)).astype(np.float64)
    assert np.abs(shrunk - small).mean() < 12
    assert np.abs(shrunk - pixels(5, 9, size=32)).mean() > 25


def test_set_is_read_at_the_spec_size() -> None:
    spec = ImageSpec(height=48, width=96)
    images = open_fingers(3, 0, spec)
    batch = images.read([2, 0])
    assert batch.shape == (2, 48, 96, 3)
    assert batch.dtype == np.uint8
    assert images.name == "fingers:3@0"
    native = open_fingers(3, 0, SPEC).read_one(1)
    cut = open_fingers(3, 0, ImageSpec(height=64, width=64, resize="crop", scale=96)).read_one(1)
    np.testing.assert_array_equal(cut, images.read_scaled(1, 96)[16:80, 16:80])
    np.testing.assert_array_equal(native, np.asarray(draw_hand(0, 1)))


def test_largest_seed_works_and_the_next_is_refused() -> None:
    draw_hand(SEED_LIMIT - 1, 0)
    for seed in (-1, SEED_LIMIT):
        with pytest.raises(UsageError, match=f"seed is {seed}; needed is a whole number from 0 to 4294967295"):
            draw_hand(seed, 0)


def test_impossible_counts_indices_and_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="image -1 does not exist"):
        draw_hand(0, -1)
    with pytest.raises(UsageError, match="count is 0; needed is at least 1"):
        open_fingers(0, 0, SPEC)
    with pytest.raises(UsageError, match="size is 4 pixels"):
        draw_hand(0, 0, size=4)


@pytest.mark.parametrize("hard", [False, True])
def test_scaled_images_are_the_same_pictures(hard: bool) -> None:
    for side in (32, 64, 96):
        images = open_fingers(4, 5, ImageSpec(height=side, width=side), hard=hard)
        for index in range(4):
            np.testing.assert_array_equal(images.read_scaled(index, side), images.read_one(index))
    assert images.read_scaled(3, 40).shape == (40, 40, 3)


def test_scaled_images_show_the_same_hand() -> None:
    images = open_fingers(12, 5, SPEC)
    for index in range(3):
        small = images.read_one(index).astype(np.float64)
        shrunk = np.asarray(Image.fromarray(images.read_scaled(index, 128)).reduce(2)).astype(np.float64)
        assert np.abs(shrunk - small).mean() < 12
        assert np.abs(shrunk - images.read_one(index + 6)).mean() > 25
