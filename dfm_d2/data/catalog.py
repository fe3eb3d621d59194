"""Data sets in Detectron2's catalogs, with the classes that the sets of a run share."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode, DatasetCatalog, MetadataCatalog

_LONGEST = 200  # characters of the name of a class

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"  # the part of the training images that DATASETS.HOLD_OUT sets aside
_HOLD_OUT_KEY = 3


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


def set_aside(cfg: CfgNode, entries: dict[str, list[dict]]) -> None:
    """Move the share DATASETS.HOLD_OUT of each training set, chosen by the seed, to HELD_OUT; in place.

    Raises UserError where that leaves no image to train on or none to set aside.
    """
    share, held_out = cfg.DATASETS.HOLD_OUT, []
    if share == 0:
        return
    for name in cfg.DATASETS.TRAIN:
        of_set = entries[name]
        order = np.random.default_rng([max(cfg.SEED, 0), _HOLD_OUT_KEY]).permutation(len(of_set))
        number = round(share * len(of_set))
        entries[name] = [of_set[i] for i in np.sort(order[number:])]
        held_out += [of_set[i] for i in np.sort(order[:number])]
    if not held_out or not all(entries[name] for name in cfg.DATASETS.TRAIN):
        raise UserError(
            f"DATASETS.HOLD_OUT {share} leaves no image to train on or none to set aside: set it to a "
            "share between them, or to 0."
        )
    entries[HELD_OUT] = held_out


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
