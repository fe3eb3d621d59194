"""Reader of the PASCAL VOC layout: Annotations/*.xml, ImageSets/Main/<split>.txt, JPEGImages/.

Box convention: the XML counts pixels from 1 and its xmax, ymax are inside the box; ours count from 0 and
x1, y1 are outside, so x0 = xmin - 1, y0 = ymin - 1, x1 = xmax, y1 = ymax (as Detectron2 reads it).
A box with xmin >= xmax or ymin >= ymax has zero area *as written* and is a problem, although the inclusive
reading would make a box of one pixel of it.
"""

import math
import re
import xml.etree.ElementTree as StandardElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from dfm_d2.data.images import ImageError, image_size, read_image
from dfm_d2.data.problems import ProblemReport

# The 20 classes in the order of the VOC development kit.
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()

CLIP_TOLERANCE = 1.0  # pixels by which a box may pass the border without being a problem (rounding of tools)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp")
_MEMBER_LINE = re.compile(r"(\S+)\s+(?:-1|0|1)")  # "<name> <flag>" of the per-class split files


class AnnotationError(ValueError):
    """An annotation file that cannot be used at all; the message names it."""


@dataclass
class BoxRecord:
    """One object: class name, box xyxy (pixels, 0-based, half-open), difficult and crowd flags."""

    name: str
    box_xyxy: tuple[float, float, float, float]
    difficult: bool = False
    crowd: bool = False
    area: float | None = None  # of the segmentation, where the source gives one


@dataclass
class ImageRecord:
    """One image whose objects still carry class names: what every reader answers."""

    file_name: str
    image_id: str | int
    width: int
    height: int
    objects: list[BoxRecord] = field(default_factory=list)


def read_voc_split(
    root: str | Path, split: str, report: ProblemReport, decode_up_to: int
) -> list[ImageRecord]:
    """Read one split; what is broken goes to `report` and is left out.

    Args:
        root: folder with Annotations/, ImageSets/Main/, JPEGImages/.
        split: reads ImageSets/Main/<split>.txt.
        decode_up_to: decode every image of a split of at most so many, else read its header only.

    Raises FileNotFoundError if the split file is missing.
    """
    root = Path(root)
    records, seen = [], set()
    members = list(split_members(root, split))
    verify = len(members) <= decode_up_to
    for image_id in members:
        if image_id in seen:
            report.add(f"ImageSets/Main/{split}.txt", "duplicate", f"lists {image_id} more than once")
            continue
        seen.add(image_id)
        record = _read_member(root, image_id, report, verify)
        if record is not None:
            records.append(record)
    return records


def split_members(root: str | Path, split: str) -> Iterator[str]:
    """Image names listed in ImageSets/Main/<split>.txt, in its order."""
    path = Path(root) / "ImageSets" / "Main" / f"{split}.txt"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = line.strip()
        flagged = _MEMBER_LINE.fullmatch(line)
        if line:
            yield flagged.group(1) if flagged else line


def _read_member(root: Path, image_id: str, report: ProblemReport, verify: bool) -> ImageRecord | None:
    xml_path = root / "Annotations" / f"{image_id}.xml"
    if not xml_path.is_file():
        report.add(
            f"{image_id}.xml", "missing_annotation", "is listed in the split but missing in Annotations/"
        )
        return None
    try:
        size, objects = parse_voc_xml(xml_path.read_bytes(), xml_path.name, report)
    except AnnotationError as error:
        report.add(xml_path.name, "broken_xml", str(error))
        return None
    image_path = find_image(root / "JPEGImages", image_id)
    if image_path is None:
        report.add(f"{image_id}.jpg", "missing_image", "is listed in the split but missing in JPEGImages/")
        return None
    actual = usable_image_size(image_path, report, verify)
    if actual is None:
        return None
    if size is not None and size != actual:
        report.add(
            xml_path.name,
            "size_mismatch",
            f"says {size[0]} x {size[1]} but {image_path.name} has {actual[0]} x {actual[1]} pixels",
        )
        return None
    objects = [clip_object(item, actual, xml_path.name, report) for item in objects]
    kept = [item for item in objects if item is not None]
    return ImageRecord(str(image_path), image_id, actual[0], actual[1], kept)


def find_image(folder: Path, stem: str) -> Path | None:
    """The image file of that name in `folder`, whatever its suffix, or None."""
    for suffix in _IMAGE_SUFFIXES:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    return None


def usable_image_size(path: Path, report: ProblemReport, verify: bool) -> tuple[int, int] | None:
    """(width, height) of a readable image; else the problem is reported and None returned."""
    try:
        if verify:
            height, width = read_image(path).shape[:2]
            return width, height
        return image_size(path)
    except ImageError as error:
        report.add(path.name, "broken_image", str(error))
        return None


def clip_object(
    item: BoxRecord, size: tuple[int, int], source: str, report: ProblemReport
) -> BoxRecord | None:
    """Clip the box to the image of `size` (width, height); report what stuck out, None if nothing is left."""
    x0, y0, x1, y1 = item.box_xyxy
    width, height = size
    clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        report.add(source, "box_outside", f"{item.name} box {item.box_xyxy} is outside the image, {size}")
        return None
    if max(abs(a - b) for a, b in zip(clipped, item.box_xyxy)) > CLIP_TOLERANCE:
        report.add(source, "box_clipped", f"{item.name} box {item.box_xyxy} is cut to the image, {size}")
    item.box_xyxy = clipped
    return item


def parse_voc_xml(
    data: bytes, source: str, report: ProblemReport
) -> tuple[tuple[int, int] | None, list[BoxRecord]]:
    """Parse one annotation; broken objects are reported under the name `source` and left out.

    Returns ((width, height) or None where the file states no usable size, objects with unclipped boxes).
    Raises AnnotationError if the XML is broken or carries a DTD (entity bombs need one), never anything else.
    """
    try:
        root = defusedxml.ElementTree.fromstring(data, forbid_dtd=True)
    except DefusedXmlException as error:
        raise AnnotationError(
            f"{source} is refused: it declares a DTD or entities, which no annotation needs"
        ) from error
    except (StandardElementTree.ParseError, ValueError, LookupError) as error:
        raise AnnotationError(f"{source} is not well-formed XML ({error})") from error
    objects = []
    for node in root.findall("object"):
        item = _parse_object(node, source, report)
        if item is not None:
            objects.append(item)
    width, height = _number(root, "size/width"), _number(root, "size/height")
    stated = width is not None and height is not None and width >= 1 and height >= 1
    return ((int(width), int(height)) if stated else None), objects


def _parse_object(node: Element, source: str, report: ProblemReport) -> BoxRecord | None:
    name = (node.findtext("name") or "").strip()
    if not name:
        report.add(source, "unknown_class", "an object has no name")
        return None
    corners = [_number(node, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    if None in corners:
        report.add(source, "bad_coordinates", f"a {name} box has missing or non-finite coordinates")
        return None
    xmin, ymin, xmax, ymax = corners
    if xmin >= xmax or ymin >= ymax:
        written = f"({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})"
        report.add(source, "zero_area", f"{name} box {written} has zero area")
        return None
    difficult = (_number(node, "difficult") or 0) > 0
    return BoxRecord(name, (xmin - 1, ymin - 1, xmax, ymax), difficult)


def _number(node: Element, path: str) -> float | None:
    """The finite number written in that child, or None."""
    text = node.findtext(path)
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
