"""One scene of the generated set: what is drawn and where, all of it from one random generator."""

import zlib
from dataclasses import dataclass

import cv2
import numpy as np

SHAPE_CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")

MAX_OBJECTS = 10
MIN_SIDE, MAX_SIDE = 0.05, 0.60  # of the image's side
MAX_HIDDEN = 0.70  # share of an object's pixels that later objects may cover
_SUPERSAMPLE = 4  # masks are drawn this much larger and averaged down, for soft edges
_TRIES = 12  # placements tried for one object before it is given up
_COUNT_DECAY = 0.85  # P(k objects) ~ 0.85^k: 4.2 on average


@dataclass
class Scene:
    """pixels uint8 (H, W, 3) RGB; an object: class index, visible box xyxy (int, half-open), hidden share."""

    pixels: np.ndarray
    labels: list[int]
    boxes_xyxy: list[tuple[int, int, int, int]]
    hidden: list[float]


def draw_scene(seed: int, split: str, index: int, size: int) -> Scene:
    """Draw image `index` of a split: 1 to 10 objects, later ones over earlier ones.

    Boxes are those of the *visible* pixels. A placement that would hide more than 70% of an earlier object,
    or leave it a visible side under 5% of the image, is tried again elsewhere; so every drawn object is
    annotated.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    canvas = _background(rng, size)
    weights = _COUNT_DECAY ** np.arange(1, MAX_OBJECTS + 1)
    number = 1 + int(rng.choice(MAX_OBJECTS, p=weights / weights.sum()))
    owner = np.full((size, size), -1)  # which object each pixel shows
    labels, areas = [], []
    for _ in range(number):
        for _ in range(_TRIES):
            label = int(rng.integers(len(SHAPE_CLASSES)))
            mask = _shape_mask(rng, SHAPE_CLASSES[label], size)
            trial = np.where(mask > 0.5, len(labels), owner)
            if all(_is_visible(trial == i, area) for i, area in enumerate([*areas, (mask > 0.5).sum()])):
                canvas = _paint(rng, canvas, mask)
                owner = trial
                labels.append(label)
                areas.append((mask > 0.5).sum())
                break
    boxes = [_extent(owner == i) for i in range(len(labels))]
    hidden = [1.0 - float((owner == i).sum() / area) for i, area in enumerate(areas)]
    return Scene(_camera(rng, canvas), labels, boxes, hidden)


def _is_visible(visible: np.ndarray, area: int) -> bool:
    """Whether enough of an object of `area` pixels is left, given the mask (H, W) of its visible ones."""
    if area == 0 or visible.sum() < (1.0 - MAX_HIDDEN) * area:
        return False
    x0, y0, x1, y1 = _extent(visible)
    return min(x1 - x0, y1 - y0) >= MIN_SIDE * len(visible)


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Half-open bounding box xyxy of the true pixels of a mask (H, W) that has some."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _shape_mask(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """Coverage in [0, 1], float32 (size, size), of one shape at a random place, size, stretch and turn."""
    longest = MIN_SIDE + (MAX_SIDE - MIN_SIDE) * rng.beta(1.5, 2.6)
    stretch = rng.uniform(0.75, 1.0)
    sides = np.array([longest, longest * stretch] if rng.random() < 0.5 else [longest * stretch, longest])
    sides = np.clip(sides * size, MIN_SIDE * size, MAX_SIDE * size - 1)  # a soft edge adds up to one pixel
    contours = [_rotate(contour, rng, name) for contour in _outlines(name)]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    corner = rng.uniform(0.0, size - sides)
    mask = np.zeros((size * _SUPERSAMPLE, size * _SUPERSAMPLE), np.uint8)
    pixels = [((c - low) / (high - low) * sides + corner) * _SUPERSAMPLE for c in contours]
    cv2.fillPoly(mask, [np.round(p).astype(np.int32) for p in pixels], 255)  # even-odd: a ring has a hole
    return cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0


def _outlines(name: str) -> list[np.ndarray]:
    """Closed contours, (P, 2) around the origin, the outer one first."""
    if name in ("circle", "ring"):
        outer = _polygon(64, [1.0])
        return [outer, outer * 0.55] if name == "ring" else [outer]
    if name == "square":
        return [_polygon(4, [1.0], turn=np.pi / 4)]
    if name == "triangle":
        return [_polygon(3, [1.0], turn=-np.pi / 2)]
    if name == "star":
        return [_polygon(10, [1.0, 0.45], turn=-np.pi / 2)]
    arm = 0.33
    quarter = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])
    turn = np.array([[0, 1], [-1, 0]])
    return [np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])]


def _polygon(corners: int, radii: list[float], turn: float = 0.0) -> np.ndarray:
    """Corners on circles of the given radii, in turn, (corners, 2)."""
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    radius = np.resize(radii, corners)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _rotate(contour: np.ndarray, rng: np.random.Generator, name: str) -> np.ndarray:
    # A ring is two contours and looks the same turned: its holes must not turn apart.
    if name in ("circle", "ring"):
        return contour
    angle = rng.uniform(-np.pi, np.pi) if name in ("triangle", "star") else rng.uniform(-0.35, 0.35)
    cosine, sine = np.cos(angle), np.sin(angle)
    return contour @ np.array([[cosine, sine], [-sine, cosine]])


def _paint(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The canvas, float32 (H, W, 3), with one object of a random fill laid over it."""
    below = canvas[mask > 0.5].mean(axis=0)
    colour = rng.uniform(0, 255, 3)
    while np.abs(colour - below).max() < 70:  # it must be possible to see it
        colour = rng.uniform(0, 255, 3)
    fill = np.broadcast_to(colour.astype(np.float32), canvas.shape)
    kind = rng.random()
    if kind < 0.35:  # hatched with a darker or lighter tone of the same colour
        fill = fill * (1.0 + rng.choice([-0.35, 0.3]) * (_stripes(rng, len(mask)) > 0))[..., None]
    elif kind < 0.6:  # shaded
        fill = fill * (1.0 + 0.25 * _ramp(rng, len(mask)))[..., None]
    weight = mask[..., None]
    return canvas * (1.0 - weight) + np.clip(fill, 0, 255) * weight


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise with a gradient and stripes, float32 (size, size, 3)."""
    cells = int(rng.integers(2, 9))
    noise = cv2.resize(rng.uniform(-1, 1, (cells, cells, 3)), (size, size), interpolation=cv2.INTER_CUBIC)
    texture = rng.uniform(10, 35) * noise
    texture = texture + (rng.uniform(0, 40) * _ramp(rng, size))[..., None]
    if rng.random() < 0.5:
        texture = texture + (rng.uniform(4, 18) * _stripes(rng, size))[..., None]
    return np.clip(rng.uniform(50, 205, 3) + texture, 0, 255).astype(np.float32)


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """A linear gradient in a random direction, (size, size), within [-1, 1] up to a factor sqrt(2)."""
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-1, 1, size)
    return np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """A sine wave in a random direction with a period of 4 to 20% of the side, (size, size), in [-1, 1]."""
    period = rng.uniform(0.04, 0.20)
    return np.sin(_ramp(rng, size) * np.pi / period + rng.uniform(0, 2 * np.pi))


def _camera(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """What a camera adds: a little blur, a little noise. uint8 (H, W, 3)."""
    canvas = cv2.GaussianBlur(canvas.astype(np.float32), (0, 0), rng.uniform(0.2, 0.9))
    canvas = canvas + rng.normal(0.0, rng.uniform(0.0, 8.0), canvas.shape)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)
