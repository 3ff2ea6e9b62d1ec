"""What a data set is to the rest of vggedge: labelled images, read in batches at one ImageSpec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vggedge_runtime.errors import DataError
from vggedge_runtime.preprocess import Pixels


@dataclass(frozen=True)
class ImageSet:
    """Labelled images that are read when asked for.

    Attributes:
        name: what the user typed, for messages and manifests.
        labels: class names; a target is an index into them.
        targets: class of every image, int64 (n,).
        read_one: from 0..n-1 to one (height, width, 3) uint8 image: what the network is shown.
        read_scaled: from an index and a length in pixels to the same image, whole and with its own aspect ratio,
            whose shorter side has that length: uint8 again. Scale jitter, crops and dense evaluation start there.
        name_one: from an index to where its user finds that image: its file, or its number in the set as it was named.
        skipped: files that lay among the images and are of no format that is read.
    """

    name: str
    labels: tuple[str, ...]
    targets: NDArray[np.int64]
    read_one: Callable[[int], Pixels]
    read_scaled: Callable[[int, int], Pixels]
    skipped: tuple[Path, ...] = ()
    name_one: Callable[[int], str] = "#{}".format

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: Sequence[int] | NDArray[np.int64] | None = None) -> Pixels:
        """Read images as (n, height, width, 3) uint8; all of them if ``indices`` is None."""
        chosen = range(len(self)) if indices is None else indices
        return np.stack([self.read_one(int(i)) for i in chosen])

    def subset(self, indices: NDArray[np.int64]) -> ImageSet:
        """The same source restricted to ``indices``, in that order."""
        kept = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            targets=self.targets[kept],
            read_one=lambda i: self.read_one(int(kept[i])),
            read_scaled=lambda i, side: self.read_scaled(int(kept[i]), side),
            name_one=lambda i: self.name_one(int(kept[i])),
        )

    def take(self, count: int, seed: int) -> ImageSet:
        """At most ``count`` images, chosen by ``seed``: of every class the share it has here, as near as it goes.

        Classes too rare for a place of their own come in by chance.
        """
        return self if count >= len(self) else self.draw(count, seed)[0]

    def draw(self, count: int, seed: int, *, balanced: bool = False, parts: int = 1) -> tuple[ImageSet, ImageSet]:
        """(at most ``count`` images, all others), chosen by ``seed``.

        Of every class the share it has here, as ``take``; or, ``balanced``, of every class equally many: what a class
        has too few of, the others make up for. A class gives then no more than one of ``parts`` parts of itself
        (rounded up) before all the others have given as much, so that the others of a rare class are left.
        """
        generator, most = np.random.default_rng(seed), min(count, len(self))
        chosen = np.sort(self._choose_balanced(most, generator, parts) if balanced else self._choose(most, generator))
        return self.subset(chosen), self.subset(np.setdiff1d(np.arange(len(self)), chosen))

    def _choose(self, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
        kept: list[NDArray[np.int64]] = []
        left: list[NDArray[np.int64]] = []
        for index in range(len(self.labels)):
            members = generator.permutation(np.flatnonzero(self.targets == index))
            whole = len(members) * count // len(self)
            kept.append(members[:whole])
            left.append(members[whole:])
        missing = count - sum(map(len, kept))
        kept.append(generator.permutation(np.concatenate(left))[:missing])
        return np.concatenate(kept)

    def _choose_balanced(self, count: int, generator: np.random.Generator, parts: int) -> NDArray[np.int64]:
        whole = [generator.permutation(np.flatnonzero(self.targets == index)) for index in range(len(self.labels))]
        members = [each[: -(-len(each) // parts)] for each in whole]
        spare = generator.permutation(np.concatenate([each[-(-len(each) // parts) :] for each in whole]))
        # Round by round, one of every class that has any left; the last round reaches some classes only, by chance.
        rounds = [
            generator.permutation(np.array([each[turn] for each in members if turn < len(each)], dtype=np.int64))
            for turn in range(max(map(len, members)))
        ]
        return np.concatenate([*rounds, spare])[:count]

    def split(self, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """Split off ``share`` of every class, at least one image each: (rest, split off).

        Raises:
            DataError: a class has fewer than two images, so it cannot stand on both sides.
        """
        generator = np.random.default_rng(seed)
        held: list[NDArray[np.int64]] = []
        for index, label in enumerate(self.labels):
            members = np.flatnonzero(self.targets == index)
            if len(members) < 2:
                raise DataError(
                    f"{self.name}: class {label!r} has {len(members)} image(s); a split into two parts "
                    "needs at least 2 of every class. Add images or remove the class."
                )
            count = min(len(members) - 1, max(1, round(share * len(members))))
            held.append(generator.permutation(members)[:count])
        off = np.sort(np.concatenate(held))
        rest = np.setdiff1d(np.arange(len(self)), off)
        return self.subset(rest), self.subset(off)
