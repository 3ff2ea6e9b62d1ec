"""Write scikit-learn's handwritten digits as PNG files: 1,797 scans of 8x8 pixels, a folder a class.

The pictures ship with scikit-learn (UCI "Optical Recognition of Handwritten Digits", Alpaydin & Kaynak 1998),
so nothing is downloaded. Every fifth picture of a class goes to ``test``; training never sees those.

    python make_digits.py FOLDER        writes FOLDER/train/0..9 and FOLDER/test/0..9
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 64


def main(folder: Path) -> None:
    """Write all pictures below ``folder`` and print how many."""
    digits = load_digits()
    seen = [0] * 10
    counts = {"train": 0, "test": 0}
    for pixels, digit in zip(digits.images, digits.target, strict=True):
        part = "test" if seen[digit] % 5 == 4 else "train"
        seen[digit] += 1
        path = folder / part / str(digit) / f"{counts[part]:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))  # the scans count from 0 to 16
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(path)
        counts[part] += 1
    print(f"{counts['train']} pictures in {folder / 'train'}, {counts['test']} in {folder / 'test'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
