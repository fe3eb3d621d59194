"""The data sets that a config names, read, checked and registered in DatasetCatalog and MetadataCatalog.

Names: root_<split> (a folder in any layout), voc_root_<split>, voc_2007_*, voc_2012_*, coco_json_train|val,
coco_2017_train|val. They are ours on both providers: Detectron2 registers some of them by itself, and its
dicts lack our checks and `difficult`.
"""

import os
import re
from pathlib import Path

from dfm_d2.data.catalog import distinct, register, set_aside
from dfm_d2.data.problems import DECODE_UP_TO, Problem, ProblemReport
from dfm_d2.detection.data.layouts import Found, Reader, coco_reader, locate_root, voc_reader
from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode

# The 20 classes in the order of the VOC development kit.
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()

ROOT_PREFIX = "root_"
_VOC_NAME = re.compile(r"voc_(2007)_(train|val|trainval|test)|voc_(2012)_(train|val|trainval)")
_KNOWN_FORMS = (
    "root_<split> and voc_root_<split> (with DATASETS.ROOT), voc_2007_{train,val,trainval,test}, "
    "voc_2012_{train,val,trainval}, coco_json_{train,val} (with DATASETS.COCO_*), coco_2017_{train,val}"
)


def register_datasets(cfg: CfgNode) -> dict[str, ProblemReport]:
    """Read and register every data set in cfg.DATASETS.TRAIN and TEST, and HELD_OUT, replacing earlier ones.

    Classes are cfg.DATASETS.CLASSES if given, else those of the training sets (of the test sets if there are
    no training sets): VOC's 20 for voc_20xx, the categories of a COCO json by id, the names of data.yaml for
    YOLO, else the sorted names found in the annotations. The metadata of a name holds thing_classes and what
    Detectron2's own evaluators look for.

    Returns {name: its ProblemReport}. Raises UserError for a missing folder, split or json, an unknown name,
    training sets whose classes differ, a set without any usable image or a training set without any usable
    box, and, under DATASETS.ON_ERROR "fatal",
    any problem.
    """
    readers = locate_datasets(cfg)
    reports = {name: ProblemReport(name) for name in readers}
    decode_up_to = DECODE_UP_TO[cfg.DATASETS.VERIFY_IMAGES]
    found = {name: read(reports[name], decode_up_to) for name, read in readers.items()}
    shared = {name: found[name] for name in cfg.DATASETS.TRAIN or cfg.DATASETS.TEST}
    classes = distinct(list(cfg.DATASETS.CLASSES) or _shared_classes(shared))
    all_dicts, all_metadata = {}, {}
    for name, (entries, _, ids, metadata) in found.items():
        dicts = all_dicts[name] = [dataset_dict(entry, classes, reports[name]) for entry in entries]
        reports[name].conclude(len(dicts), cfg.DATASETS.ON_ERROR)
        if name in cfg.DATASETS.TRAIN and reports[name].problems and not any(e["annotations"] for e in dicts):
            raise UserError(f"The data set {name} has no usable box. First: {reports[name].problems[0]}.")
        if ids is not None:
            contiguous = {key: classes.index(label) for key, label in ids.items() if label in classes}
            metadata = {**metadata, "thing_dataset_id_to_contiguous_id": contiguous}
        all_metadata[name] = metadata
    set_aside(cfg, all_dicts)
    for name, dicts in all_dicts.items():
        register(name, dicts, classes, **all_metadata.get(name, {}))
    return reports


def locate_datasets(cfg: CfgNode) -> dict[str, Reader]:
    """What reads each data set of a config. Raises UserError for one that is not known or not there."""
    keys, names = cfg.DATASETS, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    root = keys.ROOT or keys.VOC_ROOT
    if keys.VOC_ROOT not in ("", root):
        raise UserError(
            f"DATASETS.ROOT {root} and its alias DATASETS.VOC_ROOT {keys.VOC_ROOT} differ: set one."
        )
    splits = [name.removeprefix(ROOT_PREFIX) for name in names if name.startswith(ROOT_PREFIX)]
    if not root and (needs := [name for name in names if re.match("(voc_)?root_", name)]):
        raise UserError(f"The data set {needs[0]} needs DATASETS.ROOT: set it to the folder of your images.")
    record = Path(cfg.OUTPUT_DIR) / "split.json"
    found = locate_root(Path(root), splits, max(cfg.SEED, 0), record) if splits else {}
    of_root = {ROOT_PREFIX + split: reader for split, reader in found.items()}
    return {name: of_root.get(name) or _locate(name, cfg, root) for name in names}


def dataset_dict(entry: dict, classes: list[str], report: ProblemReport) -> dict:
    """Detectron2's dict of what a reader returns; an object of an unknown class is reported and left out."""
    from dfm_d2.framework import BoxMode  # a class of torch, which a missing file should not wait for

    def with_index(annotation: dict) -> dict:
        found = {**annotation, "bbox_mode": BoxMode.XYXY_ABS}
        name = found.pop("category")
        if name not in classes:
            says = f"an object is of the class {ascii(name)[:60]}, which is not known"
            raise Problem(Path(entry["file_name"]).name, "unknown_class", says)
        return {**found, "category_id": classes.index(name)}

    return {**entry, "annotations": report.keep(with_index, entry["annotations"])}


def _shared_classes(found: dict[str, Found]) -> list[str]:
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


def _locate(name: str, cfg: CfgNode, root: str) -> Reader:
    keys = cfg.DATASETS
    base = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    variable = "the environment variable DETECTRON2_DATASETS"
    if match := re.fullmatch("voc_root_(.+)", name):
        return _locate_voc(name, Path(root), match[1], "DATASETS.ROOT")
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


def _locate_voc(name: str, root: Path, split: str, setting: str, year: int | None = None) -> Reader:
    """year: of an official set, which has the 20 classes."""
    splits = root / "ImageSets" / "Main"
    for path in (root, root / "Annotations", root / "JPEGImages", splits):
        _require(path.is_dir(), name, f"the folder {path}", f"point {setting} to the data")
    path = splits / f"{split}.txt"
    there = ", ".join(sorted(path.stem for path in splits.glob("*.txt"))) or "none"
    remedy = f"name a split that is there ({there}) or point {setting} to other data"
    _require(path.is_file(), name, str(path), remedy)
    return voc_reader(root, split) if year is None else voc_reader(root, split, year, VOC_CLASSES)


def _locate_coco(name: str, json_file: Path, images: Path, json_setting: str, images_setting: str) -> Reader:
    _require(json_file.is_file(), name, str(json_file), f"set {json_setting} to the right place")
    _require(images.is_dir(), name, f"the folder {images}", f"set {images_setting} to the right place")
    return coco_reader(json_file, [images])


def _require(is_there: bool, name: str, needed: str, remedy: str) -> None:
    if not is_there:
        raise UserError(f"The data set {name} needs {needed}, which is missing: {remedy}.")
