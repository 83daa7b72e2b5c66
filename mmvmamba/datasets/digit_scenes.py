"""Pictures of handwritten digits on cluttered backgrounds, drawn from a random generator and nothing else.

The digits are real: the 1,797 scans of scikit-learn's ``load_digits``, from the UCI set "Optical Recognition of
Handwritten Digits".
Every function takes its ``numpy.random.Generator`` as an argument, so a scene depends on its seed alone and not on the
order or the process in which scenes are drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from mmvmamba.errors import DataError

Array = np.ndarray
Rng = np.random.Generator

SIDES = (128, 144, 160, 176, 192)
DIGIT_HEIGHT = (34.0, 88.0)
CROWD_DIGIT_HEIGHT = (13.0, 20.0)
MAX_ANGLE = 25.0
MIN_VISIBLE = 0.65  # no digit may be left with less than this share of its pixels
LIGHT, DARK, CLUTTER = 165.0, 105.0, 150.0  # brightness of digits (at least), background and clutter (at most)
RIM = 0.55  # how much darker it gets right around a digit

_LUMA = np.array([0.114, 0.587, 0.299])
_CELL = 6  # the 8 x 8 scans are smoothed on a grid this many times finer before they are warped
_MARGIN = 1  # empty scan pixels added on each side, so that a stroke at the border closes smoothly
_INK = 0.5  # level of the smoothed scan that counts as the edge of a stroke


@dataclass(frozen=True)
class DigitSource:
    """The scans one split may use: images (n, 8, 8) in 0..1, labels (n,), and their indices in scikit-learn's order."""

    images: Array
    labels: Array
    indices: Array


@dataclass
class Instance:
    """One annotated object.

    Attributes:
        mask: Its visible pixels (h, w), boolean.
        label: Its digit.
        sources: The scans it was made of, as indices in scikit-learn's order.
        painted: How many pixels it had before others covered it.
        crowd: Whether it is a crowd of small digits and not one digit.
    """

    mask: Array
    label: int
    sources: list[int]
    painted: int
    crowd: bool = False


@dataclass
class Scene:
    """A BGR image (h, w, 3) of dtype uint8 and its instances, those drawn first (farthest back) first."""

    image: Array
    instances: list[Instance]


def load_digit_sources(seed: int, val_fraction: float = 0.2) -> dict[str, DigitSource]:
    """Split scikit-learn's scans into ``train`` and ``val`` by class; no scan is in both.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits data set needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    bunch = load_digits()
    rng = np.random.default_rng([seed, 0])
    chosen: dict[str, list[Array]] = {"train": [], "val": []}
    for label in range(10):
        order = rng.permutation(np.flatnonzero(bunch.target == label))
        cut = round(len(order) * val_fraction)
        chosen["val"].append(np.sort(order[:cut]))
        chosen["train"].append(np.sort(order[cut:]))
    sources = {}
    for split, parts in chosen.items():
        indices = np.concatenate(parts)
        images = (bunch.images[indices] / 16.0).astype(np.float32)
        sources[split] = DigitSource(images, bunch.target[indices].astype(np.int64), indices)
    return sources


def draw_scene(rng: Rng, source: DigitSource) -> Scene:
    """Draw one scene: about 4 in 100 are empty and about 7 in 100 hold a crowd of small digits of one class."""
    height, width = (int(side) for side in rng.choice(SIDES, size=2))
    canvas = _background(rng, height, width)
    scene = Scene(canvas, [])
    kind = rng.random()
    if kind >= 0.04:
        if kind >= 0.93:
            _add_crowd(rng, scene, source)
        most = 3 + round(height * width / 160**2 * 2)
        for _ in range(int(rng.integers(1, most + 1))):
            _add_digit(rng, scene, source)
    scene.image = np.clip(canvas + rng.normal(0.0, 4.0, canvas.shape), 0, 255).astype(np.uint8)
    return scene


def crop_digit(rng: Rng, scene: Scene, instance: Instance, size: int) -> Array:
    """Cut a square around an instance, 1.05 to 1.6 times its longer side, off centre a little, scaled to ``size``."""
    left, top, width, height = mask_box(instance.mask)
    side = max(width, height) * rng.uniform(1.05, 1.6)
    centre_x = left + width / 2 + rng.uniform(-0.08, 0.08) * side
    centre_y = top + height / 2 + rng.uniform(-0.08, 0.08) * side
    scale = size / side
    matrix = np.array([[scale, 0, size / 2 - scale * centre_x], [0, scale, size / 2 - scale * centre_y]])
    return cv2.warpAffine(scene.image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def mask_box(mask: Array) -> tuple[int, int, int, int]:
    """The tight box (left, top, width, height) of a boolean mask (h, w) with at least one pixel set."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def _add_digit(rng: Rng, scene: Scene, source: DigitSource) -> None:
    """Paint one digit over the scene, unless twelve tries find no place that leaves every digit visible enough."""
    pick = int(rng.integers(len(source.labels)))
    tallest = min(DIGIT_HEIGHT[1], 0.62 * min(scene.image.shape[:2]))
    height = math.exp(rng.uniform(math.log(DIGIT_HEIGHT[0]), math.log(tallest)))
    pose = _Pose(height, rng.uniform(-MAX_ANGLE, MAX_ANGLE), rng.uniform(-0.15, 0.15), rng.uniform(0.85, 1.2))
    overlap = bool(scene.instances) and rng.random() < 0.4
    for _ in range(12):
        centre = _beside_last(rng, scene) if overlap else _anywhere(rng, scene, height)
        alpha = _warp_digit(source.images[pick], pose, centre, scene.image.shape[:2])
        mask = alpha > 0.5
        inside = mask[1:-1, 1:-1].sum() >= max(0.99 * mask.sum(), 40)
        if inside and _leaves_visible(scene, mask):
            _paint(rng, scene.image, alpha)
            _cover(scene, mask)
            label, index = int(source.labels[pick]), int(source.indices[pick])
            scene.instances.append(Instance(mask, label, [index], painted=int(mask.sum())))
            return


def _add_crowd(rng: Rng, scene: Scene, source: DigitSource) -> None:
    """Paint a clump of small digits of one class, annotated together as one crowd."""
    label = int(rng.integers(10))
    candidates = np.flatnonzero(source.labels == label)
    height, width = scene.image.shape[:2]
    centre = np.array([rng.uniform(0.25, 0.75) * width, rng.uniform(0.25, 0.75) * height])
    total = np.zeros((height, width), dtype=bool)
    used = []
    for _ in range(int(rng.integers(7, 14))):
        pick = int(rng.choice(candidates))
        spot = centre + rng.normal(0.0, 16.0, size=2)
        pose = _Pose(rng.uniform(*CROWD_DIGIT_HEIGHT), rng.uniform(-MAX_ANGLE, MAX_ANGLE), 0.0, 1.0)
        alpha = _warp_digit(source.images[pick], pose, (float(spot[0]), float(spot[1])), (height, width))
        if not (alpha > 0.5).any():
            continue
        _paint(rng, scene.image, alpha)
        total |= alpha > 0.5
        used.append(int(source.indices[pick]))
    if used:
        scene.instances.append(Instance(total, label, sorted(set(used)), painted=int(total.sum()), crowd=True))


@dataclass(frozen=True)
class _Pose:
    """How a scan is laid into the picture: height in pixels, angle in degrees, shear, width over height."""

    height: float
    angle: float
    shear: float
    aspect: float


def _anywhere(rng: Rng, scene: Scene, digit_height: float) -> tuple[float, float]:
    height, width = scene.image.shape[:2]
    gap = 0.45 * digit_height
    return float(rng.uniform(gap, width - gap)), float(rng.uniform(gap, height - gap))


def _beside_last(rng: Rng, scene: Scene) -> tuple[float, float]:
    """A place near the newest digit, so that overlaps are common and not left to chance."""
    left, top, width, height = mask_box(scene.instances[-1].mask)
    angle = rng.uniform(0.0, 2 * math.pi)
    reach = rng.uniform(0.45, 0.85)
    return (
        left + width / 2 + reach * max(width, 0.6 * height) * math.cos(angle),
        top + height / 2 + reach * height * math.sin(angle),
    )


def _warp_digit(scan: Array, pose: _Pose, centre: tuple[float, float], shape: tuple[int, int]) -> Array:
    """Draw one scan (8, 8) as coverage in 0..1 over a canvas (h, w), with an edge about one pixel soft."""
    cells = scan.shape[0] + 2 * _MARGIN
    fine = cv2.resize(np.pad(scan, _MARGIN), (cells * _CELL, cells * _CELL), interpolation=cv2.INTER_CUBIC)
    fine = cv2.GaussianBlur(fine, (0, 0), 0.34 * _CELL)
    scale = pose.height / (scan.shape[0] * _CELL)
    angle = math.radians(pose.angle)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn @ np.array([[scale * pose.aspect, scale * pose.shear], [0.0, scale]])
    middle = (cells * _CELL - 1) / 2
    offset = np.array(centre) - linear @ np.array([middle, middle])
    matrix = np.hstack([linear, offset[:, None]])
    field = cv2.warpAffine(fine, matrix, (shape[1], shape[0]), flags=cv2.INTER_LINEAR)
    softness = 0.9 * scan.shape[0] / pose.height  # the smoothed scan climbs from 0 to 1 over about one cell
    return np.clip((field - _INK) / softness + 0.5, 0.0, 1.0)


def _leaves_visible(scene: Scene, mask: Array) -> bool:
    """Whether every instance keeps at least ``MIN_VISIBLE`` of what was painted of it once ``mask`` lies on top."""
    return all(np.count_nonzero(old.mask & ~mask) >= MIN_VISIBLE * old.painted for old in scene.instances)


def _cover(scene: Scene, mask: Array) -> None:
    """Take the pixels of a new object away from the visible masks of those behind it."""
    for old in scene.instances:
        old.mask &= ~mask


def _paint(rng: Rng, canvas: Array, alpha: Array) -> None:
    """Blend a digit into the float canvas (h, w, 3): any light hue, a shading across it, and a soft dark rim.

    Digits are light and backgrounds dark, as chalk on a board, because a network has to learn this within minutes;
    the rim is what tells a digit from another one of nearly its colour behind it.
    """
    rim = np.clip(1.6 * cv2.GaussianBlur(alpha, (0, 0), 1.8), 0.0, 1.0) * RIM
    canvas *= (1.0 - rim)[:, :, None]
    height, width = alpha.shape
    slope = rng.uniform(-18, 18, 2)
    ramp = slope[0] * np.linspace(-1, 1, width)[None, :] + slope[1] * np.linspace(-1, 1, height)[:, None]
    painted = _light_colour(rng)[None, None, :] + ramp[:, :, None]
    canvas += alpha[:, :, None] * (painted - canvas)


def _light_colour(rng: Rng) -> Array:
    """A BGR colour of any hue whose brightness (ITU-R 601) is at least ``LIGHT``."""
    while True:
        colour = rng.uniform(40, 255, 3)
        if colour @ _LUMA >= LIGHT:
            return colour


def _dark_colour(rng: Rng, brightest: float) -> Array:
    """A BGR colour of any hue whose brightness (ITU-R 601) is at most ``brightest``."""
    while True:
        colour = rng.uniform(0, 200, 3)
        if colour @ _LUMA <= brightest:
            return colour


def _background(rng: Rng, height: int, width: int) -> Array:
    """A float canvas (h, w, 3): patches of three colours, a texture, and strokes and shapes as clutter."""
    colours = np.stack([_dark_colour(rng, DARK) for _ in range(3)])
    knots = rng.integers(0, 3, (int(rng.integers(2, 5)), int(rng.integers(2, 5))))
    canvas = cv2.resize(colours[knots], (width, height), interpolation=cv2.INTER_CUBIC)
    canvas += _texture(rng, height, width)[:, :, None] * rng.uniform(-1, 1, 3)
    for _ in range(int(rng.integers(2, 7))):
        canvas = _clutter(rng, canvas)
    grain = cv2.resize(rng.normal(0, 1, (height // 4, width // 4, 3)), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(canvas + rng.uniform(2, 10) * grain, 0, 255)


def _texture(rng: Rng, height: int, width: int) -> Array:
    """Stripes, a grid, or blotches (h, w) with an amplitude of at most 28 grey levels."""
    kind = int(rng.integers(3))
    amplitude = rng.uniform(6, 28)
    if kind == 2:
        small = rng.normal(0, 1, (max(height // 10, 2), max(width // 10, 2)))
        return amplitude * np.clip(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), -1, 1)
    y, x = np.mgrid[0:height, 0:width]
    angle, period = rng.uniform(0, math.pi), rng.uniform(6, 26)
    along = np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period)
    if kind == 0:
        return amplitude * along
    return amplitude * along * np.sin(2 * math.pi * (y * math.cos(angle) - x * math.sin(angle)) / period)


def _clutter(rng: Rng, canvas: Array) -> Array:
    """Blend one line, ellipse, arc or rotated box of any colour into the canvas, at 25 to 75 per cent."""
    height, width = canvas.shape[:2]
    over = canvas.copy()
    colour = tuple(float(v) for v in _dark_colour(rng, CLUTTER))
    x, y = int(rng.integers(width)), int(rng.integers(height))
    kind = int(rng.integers(4))
    if kind == 0:
        end = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.line(over, (x, y), end, colour, int(rng.integers(1, 6)), cv2.LINE_AA)
    elif kind == 3:
        size = (float(rng.uniform(12, 70)), float(rng.uniform(12, 70)))
        corners = cv2.boxPoints(((float(x), float(y)), size, float(rng.uniform(0, 90))))
        cv2.fillPoly(over, [corners.astype(np.int32)], colour, cv2.LINE_AA)
    else:
        axes = (int(rng.integers(6, 36)), int(rng.integers(6, 36)))
        start, sweep = rng.uniform(0, 360), 360.0 if kind == 1 else rng.uniform(60, 200)
        thickness = -1 if kind == 1 else int(rng.integers(1, 5))
        cv2.ellipse(over, (x, y), axes, rng.uniform(0, 180), start, start + sweep, colour, thickness, cv2.LINE_AA)
    weight = rng.uniform(0.25, 0.75)
    return weight * over + (1 - weight) * canvas
