"""The image sets of a classification config, read, checked and registered in DatasetCatalog.

Names: root_<split> (DATASETS.ROOT), digits_{train,test}, cifar10_{train,test}, cifar100_{train,test}.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dfm_d2.classification.data.sources import ClassSample, read_digits, read_root, read_torchvision
from dfm_d2.data.images import ImageError
from dfm_d2.data.problems import ProblemReport, check_on_error, decode_limit
from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode, DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)

# The part of the training images that DATASETS.HOLD_OUT sets aside.
HELD_OUT = "held_out"
_HOLD_OUT_KEY = 3
_KNOWN = "root_<split> (with DATASETS.ROOT), digits_{train,test}, cifar10_{train,test}, cifar100_{train,test}"


def register_class_sets(cfg: CfgNode) -> dict[str, ProblemReport]:
    """Read and register every set in cfg.DATASETS.TRAIN and TEST, and HELD_OUT, replacing earlier ones.

    An entry has file_name, image_id, label and read, which answers the pixels. Classes are DATASETS.CLASSES
    if given, else those of the training sets (of the test sets where there are none); the metadata of a name
    holds them as thing_classes. Images in files are decoded as DATASETS.VERIFY_IMAGES says.

    Returns {name: its ProblemReport}.
    Raises FileNotFoundError or ValueError as the sources do, for an unknown name, for a set without any
    image; DataProblemError (a ValueError) for any problem under DATASETS.ON_ERROR "fatal".
    """
    check_on_error(cfg.DATASETS.ON_ERROR)
    train = list(cfg.DATASETS.TRAIN)
    names = list(dict.fromkeys([*train, *cfg.DATASETS.TEST]))
    reports = {name: ProblemReport(name) for name in names}
    limit = decode_limit(cfg.DATASETS.VERIFY_IMAGES)
    samples = {name: _usable(*_locate(name, cfg)(), reports[name], limit) for name in names}
    found = {sample.class_name for name in train or names for sample in samples[name]}
    classes = list(cfg.DATASETS.CLASSES) or sorted(found, key=_natural)
    if len(set(classes)) != len(classes):
        raise ValueError(f"DATASETS.CLASSES names a class twice: {classes}.")
    entries = {name: _entries(samples[name], classes, reports[name]) for name in names}
    for name in names:
        reports[name].conclude(cfg.DATASETS.ON_ERROR, logger)
        if not entries[name]:
            raise ValueError(f"The data set {name} has no usable image: check its files.")
    if cfg.DATASETS.HOLD_OUT > 0:
        entries[HELD_OUT] = []
        for name in train:
            entries[name], held_out = _divide(entries[name], cfg.DATASETS.HOLD_OUT, max(cfg.SEED, 0))
            entries[HELD_OUT] += held_out
        if not entries[HELD_OUT] or not all(entries[name] for name in train):
            raise ValueError(
                f"DATASETS.HOLD_OUT {cfg.DATASETS.HOLD_OUT} leaves no image to train on or none to fit the "
                "temperature on: set it to a share between them, or to 0."
            )
    for name, of_set in entries.items():
        _register(name, of_set, classes)
    return reports


def locate_class_sets(cfg: CfgNode) -> None:
    """UserError for a data set of cfg.DATASETS that is not known or is not there; reads none."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        _locate(name, cfg)


def _locate(name: str, cfg: CfgNode) -> Callable[[], tuple[list[ClassSample], bool]]:
    """What answers the samples of a name, and whether they lie in files of their own, which may be broken."""
    source, _, split = name.partition("_")
    root = cfg.DATASETS.ROOT
    if source == "root" and split:
        if not root:
            raise UserError(f"The data set {name} needs DATASETS.ROOT: set it to a folder or a tar.")
        if not Path(root).exists():
            raise UserError(f"DATASETS.ROOT is {root}, which is missing: point it to the data.")
        return lambda: read_root(Path(root), split)
    if source == "digits":
        return lambda: (read_digits(split), False)
    if source in ("cifar10", "cifar100"):
        return lambda: (read_torchvision(source, Path(root or "data"), split), False)
    raise UserError(f"Unknown data set {name!r} in DATASETS: known are {_KNOWN}.")


def _usable(
    samples: list[ClassSample], in_files: bool, report: ProblemReport, limit: int
) -> list[ClassSample]:
    """Those that can be decoded, where they are few enough to try it."""
    if not in_files or len(samples) > limit:
        return samples
    kept = []
    for sample in samples:
        try:
            sample.read()
            kept.append(sample)
        except ImageError as error:
            report.add(sample.name, "image", str(error))
    return kept


def _entries(samples: list[ClassSample], classes: list[str], report: ProblemReport) -> list[dict]:
    index = {name: number for number, name in enumerate(classes)}
    entries = []
    for sample in samples:
        if sample.class_name not in index:
            report.add(sample.name, "unknown_class", f"its class {sample.class_name!r} is not known")
            continue
        entries.append(
            {
                "file_name": sample.name,
                "image_id": sample.image_id,
                "label": index[sample.class_name],
                "read": sample.read,
            }
        )
    return entries


def _divide(entries: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """All but a share of the entries, and that share; by the seed."""
    order = np.random.default_rng([seed, _HOLD_OUT_KEY]).permutation(len(entries))
    number = round(share * len(entries))
    return [entries[i] for i in np.sort(order[number:])], [entries[i] for i in np.sort(order[:number])]


def _register(name: str, entries: list[dict], classes: list[str]) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: entries)
    MetadataCatalog.get(name).set(thing_classes=list(classes))
    logger.info("data set %s: %d images, %d classes", name, len(entries), len(classes))


def _natural(text: str) -> list:
    """A key that puts 9 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]
