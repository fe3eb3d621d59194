"""Data sets in Detectron2's catalogs, with the classes that the sets of a run share."""

import logging
from collections.abc import Sequence
from typing import Any

from dfm_d2.errors import UserError
from dfm_d2.framework import DatasetCatalog, MetadataCatalog

_LONGEST = 200  # characters of the name of a class

logger = logging.getLogger(__name__)


def distinct(classes: list[str]) -> list[str]:
    """The classes; raises UserError if one comes twice, is too long or cannot be printed."""
    if wrong := [name for name in classes if not 0 < len(name) <= _LONGEST or not name.isprintable()]:
        raise UserError(
            f"A class has the name {ascii(wrong[0])[:60]}: it needs 1 to {_LONGEST} printable characters; "
            "rename it in the data, or set DATASETS.CLASSES to the classes that are meant."
        )
    if len(set(classes)) != len(classes):
        raise UserError(f"DATASETS.CLASSES names a class twice: {classes}.")
    return classes


def register(name: str, dicts: list[dict], classes: Sequence[str], **metadata: Any) -> None:
    """Register data set dicts, and their classes as thing_classes, replacing an earlier set of that name."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(thing_classes=list(classes), **metadata)
    boxes = sum(len(entry.get("annotations", ())) for entry in dicts)
    with_boxes = f"{boxes} boxes, " if boxes else ""
    logger.info("data set %s: %d images, %s%d classes", name, len(dicts), with_boxes, len(classes))
