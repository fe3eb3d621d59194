"""The data sets that a config names, read, checked and registered in DatasetCatalog and MetadataCatalog.

Names: voc_root_<split>, voc_2007_*, voc_2012_*, coco_json_train|val, coco_2017_train|val. They are ours on
both providers: Detectron2 registers some of them by itself, and its dicts lack our checks and `difficult`.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dfm_d2.data.catalog import distinct, register
from dfm_d2.data.problems import DECODE_UP_TO, Problem, ProblemReport
from dfm_d2.detection.data.readers import read_coco, read_voc_split
from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode

# The 20 classes in the order of the VOC development kit.
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()

_VOC_NAME = re.compile(r"voc_(2007)_(train|val|trainval|test)|voc_(2012)_(train|val|trainval)")
_KNOWN_FORMS = (
    "voc_root_<split> (with DATASETS.VOC_ROOT), voc_2007_{train,val,trainval,test}, "
    "voc_2012_{train,val,trainval}, coco_json_{train,val} (with DATASETS.COCO_*), coco_2017_{train,val}"
)


class _Found(NamedTuple):
    """What was read of one data set. classes: in the order of its format, None where it gives none. ids:
    COCO's own, {id: class}. metadata: what Detectron2's evaluators look for.
    """

    entries: list[dict]
    classes: list[str] | None
    ids: dict[int, str] | None
    metadata: dict

    def class_names(self) -> list[str]:
        names = {target["category"] for entry in self.entries for target in entry["annotations"]}
        return sorted(names) if self.classes is None else self.classes


def register_datasets(cfg: CfgNode) -> dict[str, ProblemReport]:
    """Read and register every data set in cfg.DATASETS.TRAIN and TEST, replacing earlier ones of that name.

    Classes are cfg.DATASETS.CLASSES if given, else those of the training sets (of the test sets if there are
    no training sets): VOC's 20 for voc_20xx, the categories of a COCO json by id, the sorted names found in
    the annotations for voc_root_*. The metadata of a name holds thing_classes and what
    Detectron2's own evaluators look for.

    Returns {name: its ProblemReport}. Raises UserError for a missing folder, split or json, an unknown name,
    training sets whose classes differ, a set without any usable image, and, under DATASETS.ON_ERROR "fatal",
    any problem.
    """
    readers = locate_datasets(cfg)
    reports = {name: ProblemReport(name) for name in readers}
    decode_up_to = DECODE_UP_TO[cfg.DATASETS.VERIFY_IMAGES]
    found = {name: read(reports[name], decode_up_to) for name, read in readers.items()}
    shared = {name: found[name] for name in cfg.DATASETS.TRAIN or cfg.DATASETS.TEST}
    classes = distinct(list(cfg.DATASETS.CLASSES) or _shared_classes(shared))
    for name, (entries, _, ids, metadata) in found.items():
        dicts = [dataset_dict(entry, classes, reports[name]) for entry in entries]
        reports[name].conclude(len(dicts), cfg.DATASETS.ON_ERROR)
        if ids is not None:
            contiguous = {key: classes.index(label) for key, label in ids.items() if label in classes}
            metadata = {**metadata, "thing_dataset_id_to_contiguous_id": contiguous}
        register(name, dicts, classes, **metadata)
    return reports


def locate_datasets(cfg: CfgNode) -> dict[str, Callable[[ProblemReport, int], _Found]]:
    """What reads each data set of a config. Raises UserError for one that is not known or not there."""
    return {name: _locate(name, cfg) for name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]}


def dataset_dict(entry: dict, classes: list[str], report: ProblemReport) -> dict:
    """Detectron2's dict of what a reader returns; an object of an unknown class is reported and left out."""
    from dfm_d2.framework import BoxMode  # a class of torch, which a missing file should not wait for

    def with_index(annotation: dict) -> dict:
        found = {**annotation, "bbox_mode": BoxMode.XYXY_ABS}
        name = found.pop("category")
        if name not in classes:
            says = f"an object is of the class {name!r}, which is not known"
            raise Problem(Path(entry["file_name"]).name, "unknown_class", says)
        return {**found, "category_id": classes.index(name)}

    return {**entry, "annotations": report.keep(with_index, entry["annotations"])}


def _shared_classes(found: dict[str, _Found]) -> list[str]:
    """The classes that these data sets have in common; of those that give none, all that occur."""
    if all(item.classes is None for item in found.values()):
        return sorted({name for item in found.values() for name in item.class_names()})
    first, classes = next((name, item.class_names()) for name, item in found.items())
    for name, item in found.items():
        if item.class_names() != classes:
            raise UserError(
                f"The data sets {first} and {name} have different classes: "
                "set DATASETS.CLASSES to the list that you want."
            )
    return classes


def _locate(name: str, cfg: CfgNode) -> Callable[[ProblemReport, int], _Found]:
    keys = cfg.DATASETS
    base = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    variable = "the environment variable DETECTRON2_DATASETS"
    if match := re.fullmatch("voc_root_(.+)", name):
        if not keys.VOC_ROOT:
            raise UserError(f"The data set {name} needs DATASETS.VOC_ROOT: set it to a folder in VOC layout.")
        return _locate_voc(name, Path(keys.VOC_ROOT), match[1], "DATASETS.VOC_ROOT")
    if match := _VOC_NAME.fullmatch(name):
        year, split = filter(None, match.groups())
        return _locate_voc(name, base / f"VOC{year}", split, variable, int(year))
    if match := re.fullmatch("coco_2017_(train|val)", name):
        split = f"{match[1]}2017"
        json_file = base / "coco" / "annotations" / f"instances_{split}.json"
        return _locate_coco(name, json_file, base / "coco" / split, variable, variable)
    if match := re.fullmatch("coco_json_(train|val)", name):
        json_key, images_key = f"COCO_{match[1].upper()}_JSON", f"COCO_{match[1].upper()}_IMAGES"
        settings = f"DATASETS.{json_key}", f"DATASETS.{images_key}"
        if not keys[json_key] or not keys[images_key]:
            raise UserError(f"The data set {name} needs {' and '.join(settings)}: set both.")
        return _locate_coco(name, Path(keys[json_key]), Path(keys[images_key]), *settings)
    raise UserError(f"Unknown data set {name!r} in DATASETS: known are {_KNOWN_FORMS}.")


def _locate_voc(name: str, root: Path, split: str, setting: str, year: int | None = None):
    """year: of an official set, which has the 20 classes; AP differs by it in Detectron2's evaluator."""
    splits = root / "ImageSets" / "Main"
    for path in (root, root / "Annotations", root / "JPEGImages", splits):
        _require(path.is_dir(), name, f"the folder {path}", f"point {setting} to the data")
    path = splits / f"{split}.txt"
    there = ", ".join(sorted(path.stem for path in splits.glob("*.txt"))) or "none"
    remedy = f"name a split that is there ({there}) or point {setting} to other data"
    _require(path.is_file(), name, str(path), remedy)
    metadata = {"dirname": str(root), "split": split, "year": year or 2012, "evaluator_type": "pascal_voc"}
    classes = None if year is None else VOC_CLASSES
    return lambda report, up_to: _Found(read_voc_split(root, split, report, up_to), classes, None, metadata)


def _locate_coco(name: str, json_file: Path, images: Path, json_setting: str, images_setting: str):
    _require(json_file.is_file(), name, str(json_file), f"set {json_setting} to the right place")
    _require(images.is_dir(), name, f"the folder {images}", f"set {images_setting} to the right place")
    metadata = {"json_file": str(json_file), "image_root": str(images), "evaluator_type": "coco"}

    def read(report: ProblemReport, decode_up_to: int) -> _Found:
        entries, ids = read_coco(json_file, images, report, decode_up_to)
        return _Found(entries, list(ids.values()), ids, metadata)

    return read


def _require(is_there: bool, name: str, needed: str, remedy: str) -> None:
    if not is_there:
        raise UserError(f"The data set {name} needs {needed}, which is missing: {remedy}.")
