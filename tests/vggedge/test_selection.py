from __future__ import annotations

import numpy as np
import pytest

from vggedge.data import ImageSet
from vggedge.data.selection import divide


def numbered(*counts: int) -> ImageSet:
    """An image of one pixel each, whose value is its number; ``counts`` of each class."""
    targets = np.repeat(np.arange(len(counts)), counts)
    labels = tuple("abcdefgh"[: len(counts)])
    return ImageSet(
        "numbers",
        labels,
        targets,
        lambda i: np.full((1, 1, 3), i, np.uint8),
        lambda i, side: np.full((side, side, 3), i, np.uint8),
    )


def numbers(images: ImageSet) -> list[int]:
    return [int(image[0, 0, 0]) for image in images.read()]


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


def test_the_rest_proves_and_says_so() -> None:
    source = numbered(20, 20)
    chosen, proof = divide(source, None, 10, 100)

    assert (len(chosen), len(proof)) == (10, 30)
    assert not set(numbers(chosen)) & set(numbers(proof))
    assert proof.name == "the rest of numbers, which training may have seen"


def test_both_are_limited() -> None:
    chosen, proof = divide(numbered(20, 20), numbered(30, 30), 10, 16)

    assert (len(chosen), len(proof), proof.name) == (10, 16, "numbers")
