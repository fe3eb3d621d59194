"""Readers of images with boxes: the PASCAL VOC layout and COCO detection json (yolo.py has the third).

They return Detectron2's data set dicts, except that an annotation has the name of its class, "category",
instead of "category_id" and "bbox_mode". What is broken goes to a ProblemReport and is left out.

Boxes are xyxy in pixels, counted from 0, half-open. A VOC file counts pixels from 1 and its xmax, ymax are
inside the box, so x0 = xmin - 1, y0 = ymin - 1, x1 = xmax, y1 = ymax (as Detectron2 reads it). A VOC box with
xmin >= xmax or ymin >= ymax has zero area *as written* and is a problem, although the inclusive reading
would make a box of one pixel of it. A COCO file has x0, y0, width, height.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from dfm_d2.data.images import ImageError, image_size, read_image
from dfm_d2.data.problems import Problem, ProblemReport
from dfm_d2.errors import UserError

CLIP_TOLERANCE = 1.0  # pixels by which a box may pass the border without being a problem (rounding of tools)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp")
_MEMBER_LINE = re.compile(r"(\S+)\s+(?:-1|0|1)")  # "<name> <flag>" of the per-class split files
_LISTED = "is listed in the split but missing in"
# The lists of a COCO json, and the fields that we index by.
_COCO_FIELDS = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}


def read_voc_split(root: str | Path, split: str, report: ProblemReport, decode_up_to: int) -> list[dict]:
    """Read ImageSets/Main/<split>.txt, and the files of Annotations/ and JPEGImages/ that it names.

    decode_up_to: decode every image of a split of at most so many, else read its header only.
    """
    root = Path(root)
    members, seen = split_members(root, split), set()

    def entry_of(image_id: str) -> dict:
        if image_id in seen:
            raise Problem(f"ImageSets/Main/{split}.txt", "duplicate", f"lists {image_id} more than once")
        seen.add(image_id)
        path = root / "Annotations" / f"{image_id}.xml"
        if not path.is_file():
            raise Problem(f"{image_id}.xml", "missing_annotation", f"{_LISTED} Annotations/")
        stated, objects = parse_voc_xml(path.read_bytes(), path.name, report)
        images = (root / "JPEGImages" / f"{image_id}{suffix}" for suffix in IMAGE_SUFFIXES)
        image = next((image for image in images if image.is_file()), None)
        if image is None:
            raise Problem(f"{image_id}.jpg", "missing_image", f"{_LISTED} JPEGImages/")
        entry = image_entry(image, image_id, stated, path.name, verify=len(members) <= decode_up_to)
        add = partial(clipped_object, entry=entry, source=path.name, report=report)
        return {**entry, "annotations": report.keep(add, objects)}

    return report.keep(entry_of, members)


def split_members(root: str | Path, split: str) -> list[str]:
    """Image names listed in ImageSets/Main/<split>.txt, in its order; of the split "" all there are."""
    if not split:
        return sorted(path.stem for path in Path(root).glob("Annotations/*.xml"))
    path = Path(root) / "ImageSets" / "Main" / f"{split}.txt"
    lines = map(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [match[1] if (match := _MEMBER_LINE.fullmatch(line)) else line for line in lines if line]


def parse_voc_xml(
    data: bytes, source: str, report: ProblemReport
) -> tuple[tuple[int | None, int | None], list[dict]]:
    """Parse one annotation; broken objects are reported under the name `source` and left out.

    Returns ((width, height), each None where the file states none, and annotations with unclipped boxes).
    Raises Problem if the XML is broken or carries a DTD (entity bombs need one), never anything else.
    """
    try:
        root = defusedxml.ElementTree.fromstring(data, forbid_dtd=True)
    except DefusedXmlException as error:
        says = f"{source} is refused: it declares a DTD or entities, which no annotation needs"
        raise Problem(source, "broken_xml", says) from error
    except (ParseError, ValueError, LookupError) as error:
        raise Problem(source, "broken_xml", f"{source} is not well-formed XML ({error})") from error
    objects = report.keep(lambda node: _voc_object(node, source), root.findall("object"))
    width, height = _number(root, "size/width") or 0, _number(root, "size/height") or 0
    return ((int(width), int(height)) if min(width, height) >= 1 else (None, None)), objects


def _voc_object(node: Element, source: str) -> dict:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise Problem(source, "unknown_class", "an object has no name")
    corners = [_number(node, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    if None in corners:
        raise Problem(source, "bad_coordinates", f"a {name} box has missing or non-finite coordinates")
    xmin, ymin, xmax, ymax = corners
    if xmin >= xmax or ymin >= ymax:
        written = f"({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})"
        raise Problem(source, "zero_area", f"{name} box {written} has zero area")
    flags = {"difficult": int((_number(node, "difficult") or 0) > 0), "iscrowd": 0}
    return {"bbox": (xmin - 1, ymin - 1, xmax, ymax), "category": name, **flags}


def _number(node: Element, path: str) -> float | None:
    """The finite number written in that child, or None."""
    try:
        value = float(node.findtext(path) or math.nan)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_coco(
    json_path: str | Path, folders: Sequence[Path], report: ProblemReport, decode_up_to: int
) -> tuple[list[dict], dict[int, str]]:
    """Read a COCO json whose images are in the first of these folders that has them.

    decode_up_to: as for read_voc_split.

    Returns (entries in the order of their image ids, {category id: name} in the order of the ids).
    Raises UserError if it is not COCO detection json.
    """
    json_path = Path(json_path)
    images, annotations, categories = _coco_lists(json_path)
    names = {category["id"]: category["name"] for category in sorted(categories, key=itemgetter("id"))}
    if len(set(names.values())) != len(categories):
        raise UserError(f"{json_path} has two categories of one id or name: give each its own.")
    verify, seen = len(images) <= decode_up_to, set()

    def entry_of(image: dict) -> dict:
        name = image["file_name"]
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if image["id"] in seen:
            raise Problem(name, "duplicate", f"has the image id {image['id']} of another image")
        seen.add(image["id"])
        if path is None:
            raise Problem(name, "missing_image", f"is listed in {json_path.name} but missing")
        stated = image.get("width"), image.get("height")
        return image_entry(path, image["id"], stated, json_path.name, verify)

    entries = {e["image_id"]: e for e in report.keep(entry_of, sorted(images, key=itemgetter("id")))}

    def add_object(annotation: dict) -> None:
        image_id, label = annotation["image_id"], annotation.get("id", "without id")
        if image_id not in seen:
            says = f"annotation {label} names the unknown image {image_id}"
            raise Problem(json_path.name, "missing_image", says)
        if image_id in entries:  # else its image is broken, which is reported already
            entry = entries[image_id]
            source = Path(entry["file_name"]).name
            found = _coco_object(annotation, f"annotation {label}", source, names)
            entry["annotations"].append(clipped_object(found, entry, source, report))

    report.keep(add_object, annotations)
    return list(entries.values()), names


def _coco_lists(json_path: Path) -> list[list[dict]]:
    """The lists of _COCO_FIELDS, in its order, each entry with these fields of the right type."""
    try:
        content = json.loads(json_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_path} is not json that can be read ({error}).") from error
    lists = []
    for key, fields in _COCO_FIELDS.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f'{json_path} is not COCO detection json: it has no list "{key}".')
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(f), t) for f, t in fields.items()):
                wanted = " and ".join(f"{field} ({kind.__name__})" for field, kind in fields.items())
                raise UserError(f"{json_path} is not COCO detection json: {key}[{number}] needs {wanted}.")
        lists.append(entries)
    return lists


def _coco_object(annotation: dict, label: str, source: str, names: dict[int, str]) -> dict:
    name = names.get(annotation["category_id"])
    if name is None:
        says = f"{label} has the unknown category {annotation['category_id']}"
        raise Problem(source, "unknown_class", says)
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise Problem(source, "bad_coordinates", f"{label} has no bbox of four finite numbers")
    x, y, width, height = map(float, box)
    if width <= 0 or height <= 0:
        raise Problem(source, "zero_area", f"{label}, a {name} box {box}, has zero area")
    flags = {key: int(bool(annotation.get(key, 0))) for key in ("difficult", "iscrowd")}
    found = {"bbox": (x, y, x + width, y + height), "category": name, **flags}
    area = annotation.get("area")  # of the segmentation
    return {**found, "area": float(area)} if _is_finite(area) else found


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def image_entry(
    path: Path, image_id: str | int, stated: tuple[int | None, int | None], source: str, verify: bool
) -> dict:
    """The entry of an image without annotations; not `verify`: only its header is read.

    stated: (width, height) as `source` says, None for what it does not say.
    Raises Problem for an image that is broken or of another size.
    """
    try:
        width, height = read_image(path).shape[1::-1] if verify else image_size(path)
    except ImageError as error:
        raise Problem(path.name, "broken_image", str(error)) from error
    if stated[0] not in (None, width) or stated[1] not in (None, height):
        says = f"has {width} x {height} pixels but {source} says {stated[0]} x {stated[1]}"
        raise Problem(path.name, "size_mismatch", says)
    image = {"file_name": str(path), "image_id": image_id, "height": height, "width": width}
    return {**image, "annotations": []}


def clipped_object(annotation: dict, entry: dict, source: str, report: ProblemReport) -> dict:
    """With the box clipped to the image. One that is cut is reported; Problem where nothing is left of it."""
    box, name, size = annotation["bbox"], annotation["category"], (entry["width"], entry["height"])
    (x0, y0, x1, y1), (width, height) = box, size
    clipped = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise Problem(source, "box_outside", f"{name} box {box} is outside the image, {size}")
    if max(abs(a - b) for a, b in zip(clipped, box)) > CLIP_TOLERANCE:
        report.add(source, "box_clipped", f"{name} box {box} is cut to the image, {size}")
    return {**annotation, "bbox": clipped}
