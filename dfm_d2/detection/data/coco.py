"""Reader of COCO detection json, by path. Boxes are XYWH there, xyxy (pixels, half-open) here."""

import json
import math
from pathlib import Path

from dfm_d2.data.problems import ProblemReport
from dfm_d2.detection.data.voc import BoxRecord, ImageRecord, clip_object, usable_image_size


def read_coco(
    json_path: str | Path, image_root: str | Path, report: ProblemReport, decode_up_to: int
) -> tuple[list[ImageRecord], dict[int, str]]:
    """Read a COCO json; what is broken goes to `report` and is left out.

    Sets of at most `decode_up_to` images have every image decoded, larger ones only its header read.
    Returns (records in the order of their image ids, {category id: name} in the order of the ids).
    Raises FileNotFoundError if the json is missing, ValueError if it is not COCO detection json.
    """
    json_path = Path(json_path)
    images, annotations, categories = _load(json_path)
    names = {category["id"]: category["name"] for category in sorted(categories, key=lambda c: c["id"])}
    if len(set(names.values())) != len(categories):
        raise ValueError(f"{json_path} has two categories of one id or name: give each its own.")
    records = {}
    verify = len(images) <= decode_up_to
    seen = set()
    for image in sorted(images, key=lambda i: i["id"]):
        path = Path(image_root) / image["file_name"]
        if image["id"] in seen:
            report.add(image["file_name"], "duplicate", f"has the image id {image['id']} of another image")
            continue
        seen.add(image["id"])
        if not path.is_file():
            report.add(image["file_name"], "missing_image", f"is listed in {json_path.name} but missing")
            continue
        size = usable_image_size(path, report, verify)
        if size is None:
            continue
        stated = (image.get("width", size[0]), image.get("height", size[1]))
        if stated != size:
            report.add(
                image["file_name"],
                "size_mismatch",
                f"has {size[0]} x {size[1]} pixels but {json_path.name} says {stated[0]} x {stated[1]}",
            )
            continue
        records[image["id"]] = ImageRecord(str(path), image["id"], *size)
    for annotation in annotations:
        _add_object(annotation, records, seen, names, json_path.name, report)
    return list(records.values()), names


def _load(json_path: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """The three lists of the file, each entry holding the fields that we index by, of the right type."""
    try:
        content = json.loads(json_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{json_path} is not json ({error}).") from error
    required = {
        "images": {"id": int, "file_name": str},
        "annotations": {"image_id": int, "category_id": int},
        "categories": {"id": int, "name": str},
    }
    lists = []
    for key, fields in required.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f'{json_path} is not COCO detection json: it has no list "{key}".')
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or any(
                not isinstance(entry.get(field), kind) for field, kind in fields.items()
            ):
                wanted = " and ".join(f"{field} ({kind.__name__})" for field, kind in fields.items())
                raise ValueError(f"{json_path} is not COCO detection json: {key}[{number}] needs {wanted}.")
        lists.append(entries)
    return lists[0], lists[1], lists[2]


def _add_object(
    annotation: dict,
    records: dict[int, ImageRecord],
    known: set[int],
    names: dict[int, str],
    source: str,
    report: ProblemReport,
) -> None:
    """Append one annotation to its image's record, or report why it cannot be used."""
    image_id, label = annotation["image_id"], annotation.get("id", "without id")
    if image_id not in known:
        report.add(source, "missing_image", f"annotation {label} names the unknown image {image_id}")
        return
    if image_id not in records:  # its image is broken and reported already
        return
    record = records[image_id]
    where = Path(record.file_name).name
    name = names.get(annotation["category_id"])
    if name is None:
        category = annotation["category_id"]
        report.add(where, "unknown_class", f"annotation {label} has the unknown category {category}")
        return
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
        report.add(where, "bad_coordinates", f"annotation {label} has no bbox of four finite numbers")
        return
    x, y, width, height = (float(value) for value in box)
    if width <= 0 or height <= 0:
        report.add(where, "zero_area", f"annotation {label}, a {name} box {box}, has zero area")
        return
    area = float(annotation["area"]) if _is_finite(annotation.get("area")) else None
    item = BoxRecord(
        name,
        (x, y, x + width, y + height),
        difficult=bool(annotation.get("difficult", 0)),
        crowd=bool(annotation.get("iscrowd", 0)),
        area=area,
    )
    item = clip_object(item, (record.width, record.height), where, report)
    if item is not None:
        record.objects.append(item)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
