"""Reader of YOLO folders: data.yaml has the names of the classes, a text file the boxes of each image.

A line is "class cx cy width height" in shares of the image's sides, or "class x y x y x y ...", a polygon
whose extent is taken. An image without a text file has no objects. Paths of data.yaml are looked for inside
of the folder only: they are those of another machine as often as not.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dfm_d2.data.problems import Problem, ProblemReport
from dfm_d2.detection.data.readers import IMAGE_SUFFIXES, clipped_object, image_entry
from dfm_d2.errors import UserError
from dfm_d2.safe_yaml import read_yaml

_MOST_BYTES = 10_000_000  # of a text file; a label file has less than 100 bytes an object
_ROUNDING = 1e-3  # by which a share of a side may pass 0 or 1
_FORMAT = "'class cx cy width height' with shares of the image's sides"


def find_yolo(root: Path, splits: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """({split: its folder of images}, class names); a folder without splits has "", one that is no YOLO none.

    splits: the names that a split may have. Raises UserError for one without class names or without images.
    """
    file = next(filter(Path.is_file, sorted(root.glob("data.y*ml"))), None)
    if file is None and not [*root.glob("labels"), *root.glob("*/labels")]:
        return {}, []
    try:
        settings = read_yaml(_text(file)) if file else {}
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}.") from error
    settings, found = settings if isinstance(settings, dict) else {}, {}
    base = _inside(settings.get("path"))
    for split in splits:
        path = _inside(settings.get(split))
        given = (root / base / path, root / path) if path else ()
        for folder in (*given, root / split / "images", root / "images" / split):
            if folder.is_dir() and folder not in found.values():  # the val of an example is its train
                found.setdefault(split, folder)
    if not found and not (root / "images").is_dir():
        raise UserError(f"{root} has labels or a data.yaml but no images: put them into its images/.")
    names = settings.get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(n, str | int | float) for n in names):
        raise UserError(f"{root} has no data.yaml with names: write one with, say, 'names: [cat, dog]'.")
    return found or {"": root / "images"}, [str(name) for name in names]


def _inside(path: Any) -> str:
    """A path of data.yaml as one below the folder, without its "..", which exporters write; "" for none."""
    parts = Path(path).parts if isinstance(path, str) else ()
    return "/".join(part for part in parts if part not in ("..", "/"))


def read_yolo(
    root: Path, folder: Path, names: list[str], report: ProblemReport, decode_up_to: int
) -> list[dict]:
    """Read the images in and below a folder of a YOLO set; the rest is as for read_voc_split.

    Raises UserError where there is no image, or where none of them has a label file.
    """
    files = sorted(filter(Path.is_file, folder.rglob("*")))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    labels = {image: _label_of(root, image) for image in images}
    if not any(map(Path.is_file, labels.values())):
        wanted = f": {labels[images[0]]}, for one, is missing" if images else ""
        raise UserError(f"{folder} has {len(images)} images, none of them with labels{wanted}.")
    known = {*labels.values()}
    for other in sorted({path for label in known for path in label.parent.glob("*.txt")} - known):
        report.add(other.name, "missing_image", f"has labels of no image in {folder}")

    def entry_of(image: Path) -> dict:
        label, image_id = labels[image], image.relative_to(folder).as_posix()
        entry = image_entry(image, image_id, (None, None), label.name, len(images) <= decode_up_to)
        lines = _text(label).splitlines() if label.is_file() else []

        def add(line: str) -> dict:
            return clipped_object(_object(line, label.name, names, entry), entry, label.name, report)

        return {**entry, "annotations": report.keep(add, filter(str.strip, lines))}

    return report.keep(entry_of, images)


def _label_of(root: Path, image: Path) -> Path:
    """Its text file: in labels/ in the place of the last images/, else beside the image."""
    before, images, after = f"/{image.relative_to(root).with_suffix('.txt')}".rpartition("/images/")
    return root / f"{before}/labels/{after}".lstrip("/") if images else image.with_suffix(".txt")


def _object(line: str, source: str, names: list[str], entry: dict) -> dict:
    try:
        label, *numbers = map(float, line.split())
    except ValueError:
        label, numbers = math.nan, []
    kind, says = "bad_coordinates", ""
    if not all(map(math.isfinite, (label, *numbers))):
        says = "is not numbers"
    elif len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        says = f"has {len(numbers) + 1} numbers"
    elif label not in range(len(names)):
        kind, says = "unknown_class", f"has a class beyond the {len(names)} names of data.yaml"
    elif min(numbers) < -_ROUNDING or max(numbers) > 1 + _ROUNDING:
        says = "goes beyond 0 to 1"
    else:
        xs, ys = numbers[0::2], numbers[1::2]
        if len(numbers) == 4:
            (cx, w), (cy, h) = xs, ys
            xs, ys = (cx - w / 2, cx + w / 2), (cy - h / 2, cy + h / 2)
        if min(xs) >= max(xs) or min(ys) >= max(ys):
            kind, says = "zero_area", "is a box of zero area"
    if says:
        raise Problem(source, kind, f"the line {line[:60]!r} {says}: it must be {_FORMAT}")
    width, height = entry["width"], entry["height"]
    box = (min(xs) * width, min(ys) * height, max(xs) * width, max(ys) * height)
    return {"bbox": box, "category": names[int(label)], "difficult": 0, "iscrowd": 0}


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path} has more than {_MOST_BYTES} bytes, which no such file needs: remove it.")
    return path.read_text(encoding="utf-8-sig", errors="replace")
