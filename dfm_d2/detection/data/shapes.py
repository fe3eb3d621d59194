"""The generated VOC-format set: coloured shapes that occlude each other on textured backgrounds.

Image i of a split is a pure function of (seed, split, i, size): the same bytes every time.

    <out>/Annotations/*.xml  ImageSets/Main/{train,val}.txt  JPEGImages/*.jpg  shapes.json
"""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from dfm_d2.data.files import write_text_atomically
from dfm_d2.detection.data.readers import split_members
from dfm_d2.errors import UserError

SHAPE_CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")

MAX_OBJECTS = 10
MIN_SIDE, MAX_SIDE = 0.05, 0.60  # of the image's side
MAX_HIDDEN = 0.70  # share of an object's pixels that later objects may cover
_SUPERSAMPLE = 4  # masks are drawn this much larger and averaged down, for soft edges
_TRIES = 12  # placements tried for one object before it is given up
_COUNT_DECAY = 0.85  # P(k objects) ~ 0.85^k: 4.2 on average

FORMAT_VERSION = 1  # raise it when the same parameters would give other images
_MIN_SIZE = 32  # below this, 5% of the side is not even two pixels
# Shapes are turned by up to this angle, in radians; a circle and a ring look the same turned.
_TURNS = {"cross": 0.35, "square": 0.35, "star": np.pi, "triangle": np.pi}


class Scene(NamedTuple):
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
            trial, trial_areas = np.where(mask > 0.5, len(labels), owner), [*areas, (mask > 0.5).sum()]
            if all(_is_visible(trial == i, area) for i, area in enumerate(trial_areas)):
                canvas, owner, areas = _paint(rng, canvas, mask), trial, trial_areas
                labels.append(label)
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
    contours = _OUTLINES[name]
    if name in _TURNS:
        angle = rng.uniform(-_TURNS[name], _TURNS[name])
        cosine, sine = np.cos(angle), np.sin(angle)
        contours = [contour @ np.array([[cosine, sine], [-sine, cosine]]) for contour in contours]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    corner = rng.uniform(0.0, size - sides)
    mask = np.zeros((size * _SUPERSAMPLE, size * _SUPERSAMPLE), np.uint8)
    pixels = [((c - low) / (high - low) * sides + corner) * _SUPERSAMPLE for c in contours]
    cv2.fillPoly(mask, [np.round(p).astype(np.int32) for p in pixels], 255)  # even-odd: a ring has a hole
    return cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0


def _polygon(corners: int, radii: list[float], turn: float = 0.0) -> np.ndarray:
    """Corners on circles of the given radii, in turn, (corners, 2)."""
    angles, radius = turn + 2 * np.pi * np.arange(corners) / corners, np.resize(radii, corners)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


# Closed contours, (P, 2) around the origin, the outer one first.
_CIRCLE, _ARM, _QUARTER_TURN = _polygon(64, [1.0]), 0.33, np.array([[0, 1], [-1, 0]])
_QUARTER = np.array([[_ARM, -1.0], [_ARM, -_ARM], [1.0, -_ARM]])
_OUTLINES = {
    "circle": [_CIRCLE],
    "cross": [np.concatenate([_QUARTER @ np.linalg.matrix_power(_QUARTER_TURN, k) for k in range(4)])],
    "ring": [_CIRCLE, _CIRCLE * 0.55],
    "square": [_polygon(4, [1.0], turn=np.pi / 4)],
    "star": [_polygon(10, [1.0, 0.45], turn=-np.pi / 2)],
    "triangle": [_polygon(3, [1.0], turn=-np.pi / 2)],
}


def _paint(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The canvas, float32 (H, W, 3), with one object of a random fill laid over it."""
    below = canvas[mask > 0.5].mean(axis=0)
    colour = rng.uniform(0, 255, 3)
    while np.abs(colour - below).max() < 70:  # it must be possible to see it
        colour = rng.uniform(0, 255, 3)
    fill, kind = np.broadcast_to(colour.astype(np.float32), canvas.shape), rng.random()
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
    angle, axis = rng.uniform(0, 2 * np.pi), np.linspace(-1, 1, size)
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


def write_shapes(out: str | Path, num_train: int, num_val: int, size: int, seed: int) -> bool:
    """Write the set to the folder `out`, or do nothing if exactly this set is there already.

    out: made if needed; an interrupted run is taken up again. size: side of the square images, at least 32.
    Returns True if it wrote, False if the set was complete.
    Raises UserError for bad numbers, and if `out` holds anything else.
    """
    if num_train < 1 or num_val < 1 or size < _MIN_SIZE or seed < 0:
        raise UserError(
            f"Cannot generate {num_train} + {num_val} images of {size} px with seed {seed}: "
            f"give at least 1 image a split, {_MIN_SIZE} px or more and a seed of 0 or more."
        )
    out, splits = Path(out), {"train": num_train, "val": num_val}
    parameters = {"format": FORMAT_VERSION, "splits": splits, "size": size, "seed": seed}
    names = {split: [f"{split}_{index:06d}" for index in range(number)] for split, number in splits.items()}
    if _is_complete(out, parameters, names):
        return False
    for folder in ("Annotations", "JPEGImages"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _write_state(out, parameters, complete=False)
    with tqdm(total=num_train + num_val, desc="shapes", unit="image", mininterval=1.0) as bar:
        for split in splits:
            for index, name in enumerate(names[split]):
                scene = draw_scene(seed, split, index, size)
                # Plain writes: shapes.json says "complete" only after the last, and a rerun writes all again.
                image, annotation = _files(out, name)
                Image.fromarray(scene.pixels).save(image, quality=95)
                annotation.write_text(_scene_xml(name, scene), encoding="utf-8")
                bar.update()
            write_text_atomically(_split_file(out, split), "\n".join(names[split]) + "\n")
    _write_state(out, parameters, complete=True)
    return True


def _files(out: Path, name: str) -> tuple[Path, Path]:
    return out / "JPEGImages" / f"{name}.jpg", out / "Annotations" / f"{name}.xml"


def _split_file(out: Path, split: str) -> Path:
    return out / "ImageSets" / "Main" / f"{split}.txt"


def _write_state(out: Path, parameters: dict, complete: bool) -> None:
    state = json.dumps({**parameters, "complete": complete}, indent=1)
    write_text_atomically(out / "shapes.json", state + "\n")


def _is_complete(out: Path, parameters: dict, names: dict[str, list[str]]) -> bool:
    """True if `out` holds exactly this set; False if it may be (re)written. Raises UserError if neither."""
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / "shapes.json").is_file():
        raise UserError(
            f"{out} has files but no shapes.json, so it is not a shapes set: choose another folder."
        )
    try:
        state = json.loads((out / "shapes.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or {**parameters, "complete": state.get("complete", False)} != state:
        raise UserError(
            f"{out} holds a shapes set with other parameters ({json.dumps(state)}): "
            "remove the folder or choose another."
        )
    return state["complete"] and all(
        _split_file(out, split).is_file()
        and split_members(out, split) == stems
        and all(path.is_file() for name in stems for path in _files(out, name))
        for split, stems in names.items()
    )


def _scene_xml(name: str, scene: Scene) -> str:
    """The annotation in VOC's convention: pixels from 1, xmax and ymax inside the box."""
    height, width = scene.pixels.shape[:2]
    objects = "".join(
        f"<object><name>{SHAPE_CLASSES[label]}</name><truncated>{int(hidden > 0.05)}</truncated>"
        f"<difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>\n"
        for label, (x0, y0, x1, y1), hidden in zip(scene.labels, scene.boxes_xyxy, scene.hidden)
    )
    return (
        f"<annotation>\n<folder>JPEGImages</folder><filename>{name}.jpg</filename>\n"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
        f"{objects}</annotation>\n"
    )
