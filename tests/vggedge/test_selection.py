from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vggedge.data import ImageSet
from vggedge.data.selection import Division, divide
from vggedge_runtime.errors import DataError


def numbered(*counts: int) -> ImageSet:
    """An image of one pixel each, whose value is its number; ``counts`` of each class, in an order that is mixed."""
    targets = np.random.default_rng(5).permutation(np.repeat(np.arange(len(counts)), counts))
    labels = tuple("abcdefgh"[: len(counts)])
    return ImageSet(
        "numbers",
        labels,
        targets,
        lambda i: np.full((1, 1, 3), (i // 256, i % 256, 0), np.uint8),
        lambda i, side: np.full((side, side, 3), (i // 256, i % 256, 0), np.uint8),
    )


def numbers(images: ImageSet) -> list[int]:
    return [int(image[0, 0, 0]) * 256 + int(image[0, 0, 1]) for image in images.read()] if len(images) else []


def counts(images: ImageSet) -> list[int]:
    """Images of every class."""
    return np.bincount(images.targets, minlength=len(images.labels)).tolist()


@pytest.mark.parametrize("count", [1, 2, 7, 29, 30, 100])
def test_take_gives_that_many(count: int) -> None:
    taken = numbered(10, 10, 10).take(count, seed=0)

    assert len(taken) == min(count, 30)
    assert len(set(numbers(taken))) == len(taken)


def test_take_keeps_the_shares_of_the_classes() -> None:
    taken = numbered(20, 10, 10).take(12, seed=0)

    np.testing.assert_array_equal(np.bincount(taken.targets), [6, 3, 3])


def test_take_copes_with_a_rare_class() -> None:
    taken = numbered(100, 1).take(50, seed=0)

    assert len(taken) == 50
    assert np.count_nonzero(taken.targets == 0) >= 49


def test_take_is_seeded() -> None:
    source = numbered(50, 50)

    assert numbers(source.take(20, seed=3)) == numbers(source.take(20, seed=3))
    assert numbers(source.take(20, seed=3)) != numbers(source.take(20, seed=4))


# --- draw


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 30, 31, 99])
def test_draw_parts_the_set_in_two(count: int, balanced: bool) -> None:
    source = numbered(20, 3, 8)
    drawn, rest = source.draw(count, 0, balanced=balanced)
    assert len(drawn) == min(count, 31)
    assert sorted(numbers(drawn) + numbers(rest)) == list(range(31))
    for each in (drawn, rest):
        assert numbers(each) == sorted(numbers(each))  # as they lay in the source
        np.testing.assert_array_equal(each.targets, source.targets[numbers(each)])
        assert (each.name, each.labels) == ("numbers", source.labels)


def test_what_is_drawn_is_read_at_any_size() -> None:
    drawn, rest = numbered(20, 20).draw(7, 0)
    for each in (drawn, rest):
        scaled = [int(each.read_scaled(i, 2)[1, 1, 1]) for i in range(len(each))]
        assert scaled == numbers(each)


def test_take_is_the_first_part_of_draw() -> None:
    source = numbered(30, 10, 5)
    assert numbers(source.take(12, seed=3)) == numbers(source.draw(12, 3)[0])


@pytest.mark.parametrize(
    ("classes", "count", "wanted"),
    [
        ((20, 10, 10), 12, [4, 4, 4]),
        ((20, 10, 2), 12, [5, 5, 2]),
        ((100, 1, 1), 12, [10, 1, 1]),
        ((5, 0, 5), 6, [3, 0, 3]),
        ((4, 4, 4), 12, [4, 4, 4]),
        ((9, 1, 0), 10, [9, 1, 0]),
    ],
)
def test_balanced_takes_of_every_class_equally_many_as_far_as_there_are(
    classes: tuple, count: int, wanted: list[int]
) -> None:
    assert counts(numbered(*classes).draw(count, 0, balanced=True)[0]) == wanted


def test_where_the_count_does_not_divide_chance_says_which_classes_have_one_more() -> None:
    found = {tuple(counts(numbered(9, 9, 9).draw(4, seed, balanced=True)[0])) for seed in range(20)}
    assert found == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


@pytest.mark.parametrize(
    ("count", "parts", "wanted"),
    [(12, 1, [4, 4, 4]), (12, 2, [5, 5, 2]), (12, 3, [5, 5, 2]), (26, 3, [12, 12, 2]), (9, 4, [4, 4, 1])],
)
def test_a_class_gives_its_part_only(count: int, parts: int, wanted: list[int]) -> None:
    assert counts(numbered(36, 36, 4).draw(count, 0, balanced=True, parts=parts)[0]) == wanted


def test_a_class_gives_more_than_its_part_where_nothing_else_is_left() -> None:
    drawn, rest = numbered(10, 10).draw(18, 0, balanced=True, parts=2)
    assert len(drawn) == 18
    assert min(counts(drawn)) >= 8
    assert len(rest) == 2


@pytest.mark.parametrize("balanced", [False, True])
def test_draw_is_seeded(balanced: bool) -> None:
    source = numbered(50, 50)
    drawn = [numbers(source.draw(20, seed, balanced=balanced)[0]) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


# --- divide


def share_out(source: ImageSet, proof: ImageSet | None = None, **options: Any) -> Division:
    sizes = {"calibration_images": 10, "selection_images": 12, "evaluation_images": 14} | options
    return divide(source, proof, **sizes)


def sets_of(division: Division) -> list[ImageSet]:
    return [each for each in (division.calibration, division.selection, division.evaluation) if each is not None]


MIXES = [
    (1, 1, 1), (2, 1), (3,), (20, 20), (200, 5), (5, 200), (100, 100, 1), (7, 7, 7, 7), (300, 2, 40, 0), (17, 90, 33),
]  # fmt: skip
SIZES = [(1, 1, 1), (10, 12, 14), (200, 500, 2000), (1000, 1, 1), (1, 1000, 1), (5, 0, 5), (1000, 0, 1000)]


@pytest.mark.parametrize("classes", MIXES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_image_is_in_two_sets_and_each_has_its_size(classes: tuple, sizes: tuple, seed: int) -> None:
    source, (calibrate, select, prove) = numbered(*classes), sizes
    purposes = 3 if select else 2
    found = divide(
        source, None, calibration_images=calibrate, selection_images=select, evaluation_images=prove, seed=seed
    )
    used = list(itertools.chain.from_iterable(map(numbers, sets_of(found))))
    assert len(used) == len(set(used))
    assert set(used) <= set(range(len(source)))
    for each in sets_of(found):
        np.testing.assert_array_equal(each.targets, source.targets[numbers(each)])
    left = len(source) - len(found.calibration)
    assert len(found.calibration) == min(calibrate, len(source) // purposes)
    assert (0 if found.selection is None else len(found.selection)) == min(select, left // 2)
    assert len(found.evaluation) == min(prove, left - min(select, left // 2))
    assert min(map(len, sets_of(found))) > 0

    shares = [-(-count // purposes) for count in classes]
    unequal = [count for count, share in zip(counts(found.calibration), shares, strict=True) if count < share]
    assert all(count <= share for count, share in zip(counts(found.calibration), shares, strict=True))
    if unequal:  # classes that could have given more have given equally many, and no other has given more than they
        assert max(unequal) - min(unequal) <= 1
        assert max(counts(found.calibration)) <= min(unequal) + 1


def test_a_rare_class_is_proved_as_well() -> None:
    """Balanced over 600 images, 200 of six classes would take all of a class of 30."""
    found = share_out(
        numbered(114, 114, 114, 114, 114, 30), calibration_images=200, selection_images=500, evaluation_images=2000
    )
    assert [counts(each)[5] for each in sets_of(found)] == [10, pytest.approx(10, abs=2), pytest.approx(10, abs=2)]
    assert counts(found.calibration)[:5] == [38] * 5


def test_the_selection_and_the_proof_keep_the_shares_of_the_classes() -> None:
    found = share_out(numbered(400, 200, 200), calibration_images=8, selection_images=80, evaluation_images=160)
    assert counts(found.calibration) in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert found.selection is not None
    np.testing.assert_allclose(counts(found.selection), [40, 20, 20], atol=1)
    np.testing.assert_allclose(counts(found.evaluation), [80, 40, 40], atol=2)


def test_the_rest_proves_and_says_so() -> None:
    found = share_out(numbered(20, 20))
    assert found.selection is not None
    assert [each.name for each in sets_of(found)] == [
        "numbers",
        "numbers",
        "the rest of numbers, which training may have seen",
    ]


def test_what_the_user_named_proves_and_keeps_its_name() -> None:
    proof = numbered(30, 30)
    found = share_out(numbered(20, 20), proof, evaluation_images=16)
    assert (len(found.evaluation), found.evaluation.name, counts(found.evaluation)) == (16, "numbers", [8, 8])
    assert share_out(numbered(20, 20), proof, evaluation_images=60).evaluation is proof


def test_beside_a_proof_the_whole_source_calibrates_and_selects() -> None:
    proof = numbered(3, 3)
    found = share_out(numbered(20, 20), proof, calibration_images=99, selection_images=99)
    assert (len(found.calibration), len(found.selection or ())) == (20, 20)
    assert not set(numbers(found.calibration)) & set(numbers(found.selection))  # type: ignore[arg-type]
    found = share_out(numbered(20, 20), proof, calibration_images=10, selection_images=99)
    assert (len(found.calibration), len(found.selection or ())) == (10, 30)
    found = share_out(numbered(20, 20), proof, calibration_images=99, selection_images=0)
    assert (len(found.calibration), found.selection) == (40, None)


@pytest.mark.parametrize(
    ("images", "options", "purposes"),
    [
        (2, {}, 3),
        (0, {}, 3),
        (1, {"selection_images": 0}, 2),
        (1, {"proof": numbered(3)}, 2),
        (0, {"proof": numbered(3), "selection_images": 0}, 1),
    ],
)
def test_fewer_images_than_purposes_are_refused(images: int, options: dict, purposes: int) -> None:
    with pytest.raises(DataError, match=rf"^numbers: {images} image\(s\), and {purposes} set"):
        share_out(numbered(images), **options)


def test_as_many_images_as_purposes_are_enough() -> None:
    assert [len(each) for each in sets_of(share_out(numbered(1, 2)))] == [1, 1, 1]


def test_a_division_is_seeded() -> None:
    source = numbered(60, 60)
    same, again, other = ([numbers(each) for each in sets_of(share_out(source, seed=seed))] for seed in (3, 3, 4))
    assert same == again
    assert all(first != second for first, second in zip(same, other, strict=True))


def test_an_image_is_named_by_its_number_in_the_whole_set_whatever_was_taken() -> None:
    source = numbered(20, 20)
    taken, rest = source.draw(12, seed=3)
    for part in (taken, rest, taken.take(5, seed=1)):
        assert [part.name_one(row) for row in range(len(part))] == [f"#{number}" for number in numbers(part)]
