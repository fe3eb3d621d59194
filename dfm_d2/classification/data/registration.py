"""The image sets of a classification config, read, checked and registered in DatasetCatalog.

Names: root_<split> (DATASETS.ROOT), digits_{train,test}, cifar10_{train,test}, cifar100_{train,test}.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dfm_d2.classification.data.sources import ClassSample, read_digits, read_root, read_torchvision
from dfm_d2.data.catalog import distinct, register
from dfm_d2.data.images import ImageError
from dfm_d2.data.problems import DECODE_UP_TO, Problem, ProblemReport
from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode

HELD_OUT = "held_out"  # the part of the training images that DATASETS.HOLD_OUT sets aside
_HOLD_OUT_KEY = 3
_KNOWN = "root_<split> (with DATASETS.ROOT), digits_{train,test}, cifar10_{train,test}, cifar100_{train,test}"


def register_class_sets(cfg: CfgNode) -> dict[str, ProblemReport]:
    """Read and register every set in cfg.DATASETS.TRAIN and TEST, and HELD_OUT. {name: its ProblemReport}.

    An entry has file_name, image_id, label and read, which returns the pixels. Classes are DATASETS.CLASSES
    if given, else those of the training sets (of the test sets where there are none); the metadata of a name
    holds them as thing_classes. Images are decoded as DATASETS.VERIFY_IMAGES says.

    Raises UserError as the sources do, for an unknown name, for a set without any image, and for any problem
    under DATASETS.ON_ERROR "fatal".
    """
    train, decode_up_to = list(cfg.DATASETS.TRAIN), DECODE_UP_TO[cfg.DATASETS.VERIFY_IMAGES]
    reports = {name: ProblemReport(name) for name in [*train, *cfg.DATASETS.TEST]}
    samples = {name: read() for name, read in locate_class_sets(cfg).items()}
    for name, of_set in samples.items():
        if len(of_set) <= decode_up_to:
            samples[name] = reports[name].keep(_decoded, of_set)
    found = {sample.class_name for name in train or samples for sample in samples[name]}
    classes = distinct(list(cfg.DATASETS.CLASSES) or sorted(found, key=_natural))
    index = {name: number for number, name in enumerate(classes)}
    entries = {}
    for name, report in reports.items():
        entries[name] = report.keep(partial(_entry, index=index), samples[name])
        report.conclude(len(entries[name]), cfg.DATASETS.ON_ERROR)
    share, held_out = cfg.DATASETS.HOLD_OUT, []
    if share > 0:
        for name in train:
            entries[name], of_set = _divide(entries[name], share, max(cfg.SEED, 0))
            held_out += of_set
        if not held_out or not all(entries[name] for name in train):
            raise UserError(
                f"DATASETS.HOLD_OUT {share} leaves no image to train on or none to set aside: set it to a "
                "share between them, or to 0."
            )
        entries[HELD_OUT] = held_out
    for name, of_set in entries.items():
        register(name, of_set, classes)
    return reports


def locate_class_sets(cfg: CfgNode) -> dict[str, Callable[[], list[ClassSample]]]:
    """What reads each data set of a config. Raises UserError for one that is not known or not there."""
    return {name: _locate(name, cfg.DATASETS.ROOT) for name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]}


def _locate(name: str, root: str) -> Callable[[], list[ClassSample]]:
    if match := re.fullmatch("root_(.+)", name):
        if not root:
            raise UserError(f"The data set {name} needs DATASETS.ROOT: set it to a folder or a tar.")
        if not Path(root).exists():
            raise UserError(f"DATASETS.ROOT is {root}, which is missing: point it to the data.")
        return partial(read_root, Path(root), match[1])
    match = re.fullmatch("(digits|cifar10|cifar100)_(train|test)", name)
    if not match:
        raise UserError(f"Unknown data set {name!r} in DATASETS: known are {_KNOWN}.")
    source, split = match.groups()
    if source == "digits":
        return partial(read_digits, split)
    return partial(read_torchvision, source, Path(root or "data"), split)


def _decoded(sample: ClassSample) -> ClassSample:
    try:
        sample.read()
    except ImageError as error:
        raise Problem(sample.file_name, "image", str(error)) from error
    return sample


def _entry(sample: ClassSample, index: dict[str, int]) -> dict:
    entry = sample._asdict()
    name = entry.pop("class_name")
    if name not in index:
        raise Problem(sample.file_name, "unknown_class", f"its class {name!r} is not known")
    return {**entry, "label": index[name]}


def _divide(entries: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """All but a share of the entries, and that share; by the seed."""
    order = np.random.default_rng([seed, _HOLD_OUT_KEY]).permutation(len(entries))
    number = round(share * len(entries))
    return [entries[i] for i in np.sort(order[number:])], [entries[i] for i in np.sort(order[:number])]


def _natural(text: str) -> list:
    """A key that puts 9 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]
