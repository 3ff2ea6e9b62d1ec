"""Drawn hands that show 0 to 5 fingers: a data set that needs no download, in six classes.

A hand is a few tapered capsules in the complex plane. One multiplication and one addition place it,
conjugation mirrors it. It is drawn at three times its size and averaged down, which smooths the edges.
Image ``i`` of seed ``s`` depends on ``(s, i, level)`` alone, so a shorter set is a prefix of a longer one
and two seeds share no image.
"""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vggedge.data.base import ImageSet
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec, Pixels, fit_image, scale_image

LABELS = ("0", "1", "2", "3", "4", "5")
SEED_LIMIT = 2**32
"""Seeds and image numbers stay below this: NumPy splits larger ones into words, and then two could meet."""

_SIDE = 64  # pixels
_SUPERSAMPLING = 3
_Floats: TypeAlias = NDArray[np.float64]
_Colour: TypeAlias = tuple[int, int, int]
_ARC = np.exp(1j * np.linspace(-math.pi / 2, math.pi / 2, 9))

# Palm side of a hand that points up, in palm widths; x to the right, y down. Little finger to index:
_ROOTS = (-0.38 - 0.34j, -0.13 - 0.45j, 0.13 - 0.47j, 0.38 - 0.41j)
_LENGTHS = (0.66, 0.88, 0.97, 0.87)
_RADII = (0.105, 0.122, 0.128, 0.124)
_SPREAD_DEGREES = (-17.0, -5.0, 5.0, 16.0)
_PALM = ((-0.36 - 0.30j, 0.15), (0.36 - 0.36j, 0.15), (0.30 + 0.36j, 0.17), (-0.27 + 0.40j, 0.17))
_RIM = 0.026
_THUMB_ROOT = 0.30 + 0.28j
_THUMB = 4
# Which fingers are up at each number (0 little finger ... 3 index, 4 thumb).
_COUNTING: tuple[tuple[int, ...], ...] = ((), (3,), (2, 3), (1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4))

_SKIN = np.array(
    [(252, 222, 202), (236, 190, 152), (208, 154, 114), (162, 110, 76), (112, 74, 54), (72, 48, 40)],
    dtype=float,
)


@dataclass(frozen=True)
class _Level:
    """How far the pictures of one level stray from the plain case."""

    number: int  # part of the random key: never change it
    degrees: float
    shift: float  # share of the picture's side
    scale: tuple[float, float]  # palm width, as a share of the picture's side
    contrast: float  # least distance of skin and background, RGB units
    noise: tuple[float, float]  # standard deviation, RGB units
    any_fingers: bool
    mirror: bool
    clutter: int  # at most this many things behind the hand


_DEMO = _Level(0, 30.0, 0.08, (0.24, 0.35), 55.0, (2.0, 10.0), any_fingers=False, mirror=False, clutter=0)
_HARD = _Level(1, 75.0, 0.10, (0.21, 0.35), 35.0, (2.0, 16.0), any_fingers=True, mirror=True, clutter=10)


def open_fingers(count: int, seed: int, spec: ImageSpec, *, hard: bool = False) -> ImageSet:
    """The first ``count`` drawings of ``seed``, resized from 64x64 to ``spec``.

    Raises:
        UsageError: ``count`` is below 1, or ``seed`` is outside 0..2**32-1.
    """
    if count < 1:
        raise UsageError(f"fingers: count is {count}; needed is at least 1.")
    _check_key(seed, count - 1)

    def read_one(index: int) -> Pixels:
        return fit_image(draw_hand(seed, index, hard=hard), spec)

    def read_scaled(index: int, side: int) -> Pixels:
        # Not drawn at that size: its noise would be another, and this is to be the same picture.
        return scale_image(draw_hand(seed, index, hard=hard), side, spec.kernel)

    name = f"{'fingers-hard' if hard else 'fingers'}:{count}@{seed}"
    targets = np.arange(count, dtype=np.int64) % len(LABELS)
    return ImageSet(name=name, labels=LABELS, targets=targets, read_one=read_one, read_scaled=read_scaled)


def draw_hand(seed: int, index: int, *, hard: bool = False, size: int = _SIDE) -> Image.Image:
    """Draw image ``index`` of ``seed``: an RGB picture of a hand that shows ``index % 6`` fingers.

    Args:
        seed: which endless sequence of pictures, 0 to 2**32-1.
        index: place in it.
        hard: any fingers instead of the usual order, either hand, strong rotation, clutter and noise.
        size: side of the picture, pixels. The hand is the same at every size, the noise is not.

    Raises:
        UsageError: ``seed`` or ``index`` is outside 0..2**32-1, or ``size`` is below 8.
    """
    _check_key(seed, index)
    if size < 8:
        raise UsageError(f"fingers: size is {size} pixels; a hand needs at least 8.")
    level = _HARD if hard else _DEMO
    generator = np.random.default_rng([seed, index, level.number])
    skin = _pick_skin(generator)
    canvas = _paint_background(generator, size * _SUPERSAMPLING, skin, level)
    _draw_hand(generator, canvas, skin, level, index % len(LABELS))
    return _light(generator, canvas.reduce(_SUPERSAMPLING), level)


def _check_key(seed: int, index: int) -> None:
    if not 0 <= seed < SEED_LIMIT:
        raise UsageError(f"fingers: seed is {seed}; needed is a whole number from 0 to {SEED_LIMIT - 1}.")
    if not 0 <= index < SEED_LIMIT:
        raise UsageError(f"fingers: image {index} does not exist; images count from 0 to {SEED_LIMIT - 1}.")


def _pick_skin(generator: np.random.Generator) -> _Floats:
    place = generator.uniform(0, len(_SKIN) - 1)
    low = int(place)
    tone = _SKIN[low] + (place - low) * (_SKIN[low + 1] - _SKIN[low])
    return np.asarray(np.clip(tone + generator.normal(0, 5, 3), 20, 255))


def _paint_background(generator: np.random.Generator, side: int, skin: _Floats, level: _Level) -> Image.Image:
    """A smooth gradient between four colours around one that the skin stands out from."""
    colour = _pick_wall(generator)
    while float(np.linalg.norm(colour - skin)) < level.contrast:
        colour = _pick_wall(generator)
    corners = np.clip(colour + generator.normal(0, 14, (2, 2, 3)), 0, 255).astype(np.uint8)
    canvas = Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR)
    if level.clutter:
        _draw_clutter(generator, ImageDraw.Draw(canvas), side, int(generator.integers(level.clutter + 1)))
    return canvas


def _pick_wall(generator: np.random.Generator) -> _Floats:
    """Any brightness, and from grey to fully coloured."""
    colour = generator.uniform(15, 240, 3)
    return np.asarray(colour + float(generator.uniform(0, 0.8)) * (colour.mean() - colour))


def _draw_clutter(generator: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, count: int) -> None:
    """Bars and discs behind the hand; a bar is about as wide as a finger, so width alone tells nothing."""
    for _ in range(count):
        start, end = (complex(*generator.uniform(0, side, 2)) for _ in range(2))
        colour = _rgb(generator.uniform(0, 255, 3))
        if generator.random() < 0.6:
            first, last = (side * float(share) for share in generator.uniform(0.01, 0.05, 2))
            _capsule(draw, start, end, first, last, colour)
        else:
            radius = side * float(generator.uniform(0.03, 0.15))
            _capsule(draw, start, start, radius, radius, colour)


def _draw_hand(generator: np.random.Generator, canvas: Image.Image, skin: _Floats, level: _Level, number: int) -> None:
    side = canvas.width
    width = side * float(generator.uniform(*level.scale))
    turn = cmath.rect(width, math.radians(float(generator.uniform(-level.degrees, level.degrees))))
    shift = complex(*(side * generator.uniform(-level.shift, level.shift, 2)))
    # The middle of an open hand lies above its palm; the picture's middle is put there.
    brush = _Brush(
        ImageDraw.Draw(canvas),
        turn,
        complex(side, side) / 2 + shift + 0.42j * turn,
        mirrored=level.mirror and bool(generator.random() < 0.5),
        skin=skin,
    )
    raised = _pick_fingers(generator, number) if level.any_fingers else _COUNTING[number]
    _draw_arm(generator, brush)
    jitter = np.clip(generator.normal(0, 1, (5, 3)), -2.5, 2.5)
    spread = float(generator.uniform(0.75, 1.25))
    for finger in (0, 1, 2, 3):
        if finger in raised:
            _draw_raised(brush, finger, spread, jitter[finger])
    if _THUMB in raised:
        _draw_raised_thumb(brush, jitter[_THUMB])
    _draw_palm(brush)
    for finger in (0, 1, 2, 3):
        if finger not in raised:
            _draw_folded(brush, finger, jitter[finger])
    if _THUMB not in raised:
        _draw_folded_thumb(brush, len(raised), jitter[_THUMB])


def _pick_fingers(generator: np.random.Generator, number: int) -> Sequence[int]:
    """Any fingers, but the middle one never without a neighbour: that hand does not count, it insults."""
    while True:
        fingers: list[int] = generator.permutation(5)[:number].tolist()
        if set(fingers) - {_THUMB} != {2}:
            return fingers


class _Brush:
    """Draws skin in hand coordinates: a dark rim, the skin, and a lighter streak where the light falls."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, turn: complex, origin: complex, *, mirrored: bool, skin: _Floats
    ) -> None:
        self._draw = draw
        self._turn = turn
        self._origin = origin
        self._mirrored = mirrored
        self.skin = _rgb(skin)
        self.rim = _rgb(skin * 0.55)
        self.glow = _rgb(skin + (255 - skin) * 0.22)

    def place(self, point: complex) -> complex:
        """Hand coordinates to canvas pixels."""
        return self._origin + self._turn * (-point.conjugate() if self._mirrored else point)

    def capsule(self, start: complex, end: complex, first: float, last: float, colour: _Colour) -> None:
        """Fill the shape between a disc of radius ``first`` and one of radius ``last``."""
        unit = abs(self._turn)
        _capsule(self._draw, self.place(start), self.place(end), first * unit, last * unit, colour)

    def limb(self, joints: Sequence[complex], radii: Sequence[float], *, streak: bool = True) -> None:
        """A finger or an arm: capsules from joint to joint."""
        bones = list(itertools.pairwise(zip(joints, radii, strict=True)))
        for (a, r), (b, s) in bones:
            self.capsule(a, b, r + _RIM, s + _RIM, self.rim)
        for (a, r), (b, s) in bones:
            self.capsule(a, b, r, s, self.skin)
        for (a, r), (b, s) in bones if streak else ():
            self.capsule(a - 0.02, b - 0.02, r * 0.42, s * 0.42, self.glow)

    def crease(self, start: complex, end: complex) -> None:
        """A thin dark line."""
        self.capsule(start, end, 0.014, 0.014, self.rim)


def _draw_arm(generator: np.random.Generator, brush: _Brush) -> None:
    brush.limb((0.02 + 0.35j, 0.03 + 0.75j, 0.05 + 2.4j), (0.30, 0.29, 0.38), streak=False)
    if generator.random() < 0.5:
        cuff = 0.85 + float(generator.uniform(0, 0.3))
        colour = generator.uniform(10, 245, 3)
        brush.capsule(0.02 + 1j * cuff, 0.05 + 2.6j, 0.38, 0.5, _rgb(colour * 0.6))
        brush.capsule(0.02 + 1j * (cuff + 0.03), 0.05 + 2.6j, 0.36, 0.48, _rgb(colour))


def _draw_palm(brush: _Brush) -> None:
    ring = [*_PALM, _PALM[0]]
    for grow, colour in ((_RIM, brush.rim), (0.0, brush.skin)):
        for (a, r), (b, s) in itertools.pairwise(ring):
            brush.capsule(a, b, r + grow, s + grow, colour)
    brush.capsule(-0.1 - 0.1j, 0.05 + 0.2j, 0.33, 0.33, brush.skin)
    brush.capsule(0.03 + 0.35j, 0.03 + 0.7j, 0.26, 0.27, brush.skin)  # no rim between palm and wrist
    brush.crease(0.10 + 0.44j, 0.06 + 0.10j)
    brush.crease(0.06 + 0.10j, 0.30 - 0.12j)
    brush.crease(-0.38 - 0.02j, 0.12 - 0.16j)


def _draw_raised(brush: _Brush, finger: int, spread: float, jitter: _Floats) -> None:
    angle = math.radians(_SPREAD_DEGREES[finger] * spread + 2.0 * float(jitter[0]))
    length = _LENGTHS[finger] * (1 + 0.04 * float(jitter[1]))
    root, radius = _ROOTS[finger], _RADII[finger]
    lower = root + cmath.rect(0.5 * length, angle - math.pi / 2)
    # The upper half leans a little its own way: no finger is a ruler.
    tip = lower + cmath.rect(0.5 * length, angle - math.pi / 2 - 0.5 * angle + 0.05 * float(jitter[2]))
    brush.limb((root, lower, tip), (radius, radius * 0.97, radius * 0.82))
    across = cmath.rect(0.6 * radius, angle)
    brush.crease(lower - across, lower + across)


def _draw_folded(brush: _Brush, finger: int, jitter: _Floats) -> None:
    """A finger curled onto the palm: its knuckle stands above the palm's edge, its tip lies inside."""
    root, radius = _ROOTS[finger], _RADII[finger] * 1.06
    knuckle = root + 0.04j + 0.015j * float(jitter[0])
    tip = knuckle - 0.06 * root.real + 0.32j + 0.02j * float(jitter[1])
    brush.limb((knuckle, tip), (radius, radius * 0.95))


def _draw_raised_thumb(brush: _Brush, jitter: _Floats) -> None:
    sway = cmath.rect(1.0, math.radians(5.0 * float(jitter[0])))
    middle = _THUMB_ROOT + (0.34 - 0.30j) * sway
    tip = middle + (0.20 - 0.33j) * sway * (1 + 0.05 * float(jitter[1]))
    brush.limb((_THUMB_ROOT, middle, tip), (0.19, 0.145, 0.115))


def _draw_folded_thumb(brush: _Brush, raised: int, jitter: _Floats) -> None:
    """Across the curled fingers of a fist; across the palm where the fingers are up."""
    reach = (0.10 if raised < 3 else 0.02) + 0.03 * float(jitter[0])
    middle = 0.40 + 0.06j
    brush.limb((_THUMB_ROOT + 0.02j, middle, middle - 0.28 - reach + 0.02j), (0.18, 0.14, 0.115))


def _light(generator: np.random.Generator, image: Image.Image, level: _Level) -> Image.Image:
    """Brightness that falls off to one side, then noise."""
    pixels = np.asarray(image, dtype=np.float32)
    side = image.width
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    slope = generator.normal(0, 0.07, 2)
    gain = float(generator.uniform(0.8, 1.1)) + float(slope[0]) * ramp[:, None] + float(slope[1]) * ramp
    grain = generator.standard_normal((side, side, 3), dtype=np.float32)
    grain *= float(generator.uniform(*level.noise))
    lit = pixels * gain[:, :, None].astype(np.float32) + grain
    return Image.fromarray(np.clip(np.rint(lit), 0, 255).astype(np.uint8))


def _capsule(
    draw: ImageDraw.ImageDraw, start: complex, end: complex, first: float, last: float, colour: _Colour
) -> None:
    along = end - start
    heading = along / abs(along) if along else 1 + 0j
    outline = np.concatenate((end + last * heading * _ARC, start - first * heading * _ARC))
    draw.polygon(outline.view(np.float64).tolist(), fill=colour)


def _rgb(colour: _Floats) -> _Colour:
    red, green, blue = np.clip(colour, 0, 255).astype(int).tolist()
    return red, green, blue
