"""The data sets that a config names, read, checked and registered in DatasetCatalog and MetadataCatalog.

Names: voc_root_<split>, voc_2007_*, voc_2012_*, coco_json_train|val, coco_2017_train|val. They are ours on
both providers: Detectron2 registers some of them by itself, and its dicts lack our checks and `difficult`.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dfm_d2.data.problems import ProblemReport, check_on_error, decode_limit
from dfm_d2.detection.data.coco import read_coco
from dfm_d2.detection.data.voc import VOC_CLASSES, ImageRecord, read_voc_split
from dfm_d2.framework import CfgNode, DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)

_VOC_NAME = re.compile(r"voc_(2007)_(train|val|trainval|test)|voc_(2012)_(train|val|trainval)")
_KNOWN_FORMS = (
    "voc_root_<split> (with DATASETS.VOC_ROOT), voc_2007_{train,val,trainval,test}, "
    "voc_2012_{train,val,trainval}, coco_json_{train,val} (with DATASETS.COCO_*), coco_2017_{train,val}"
)


@dataclass
class _Source:
    """Where one data set lies. kind "voc": root and split; "coco": json file and image root."""

    name: str
    kind: str
    root: Path
    split: str = ""
    json_file: Path | None = None
    official_classes: bool = False
    year: int = 2012  # VOC 2007 has its own AP in Detectron2's evaluator


@dataclass
class _Loaded:
    source: _Source
    records: list[ImageRecord]
    report: ProblemReport
    classes: list[str]
    category_ids: dict[int, str] | None = None  # COCO's own ids


def register_datasets(cfg: CfgNode) -> dict[str, ProblemReport]:
    """Read and register every data set in cfg.DATASETS.TRAIN and TEST, replacing earlier ones of that name.

    Classes are cfg.DATASETS.CLASSES if given, else those of the training sets (of the test sets if there are
    no training sets): VOC's 20 for voc_20xx, the categories of a COCO json by id, the sorted names found in
    the annotations for voc_root_*. Test sets use the training classes.
    The metadata of a name holds thing_classes, data_problems (its ProblemReport) and what Detectron2's own
    evaluators look for (dirname, split, year; json_file, thing_dataset_id_to_contiguous_id).

    Returns {name: its ProblemReport}.
    Raises FileNotFoundError for a missing folder, split or json; ValueError for an unknown name or bad key,
    for training sets whose classes differ, for a set without any usable image; DataProblemError (a
    ValueError) for any problem under DATASETS.ON_ERROR "fatal".
    """
    train, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    names = list(dict.fromkeys(train + test))
    sources = {name: _locate(name, cfg) for name in names}
    check_on_error(cfg.DATASETS.ON_ERROR)
    limit = decode_limit(cfg.DATASETS.VERIFY_IMAGES)
    loaded = {name: _load(source, limit) for name, source in sources.items()}
    classes = list(cfg.DATASETS.CLASSES) or _common_classes([loaded[name] for name in train or test])
    if len(set(classes)) != len(classes):
        raise ValueError(f"DATASETS.CLASSES names a class twice: {classes}.")
    for name in names:
        _register(loaded[name], classes, cfg.DATASETS.ON_ERROR)
    return {name: loaded[name].report for name in names}


def _locate(name: str, cfg: CfgNode) -> _Source:
    """Find the files of a data set name; FileNotFoundError names the path and what to set."""
    if name.startswith("voc_root_"):
        if not cfg.DATASETS.VOC_ROOT:
            raise ValueError(
                f"The data set {name} needs DATASETS.VOC_ROOT: set it to a folder in VOC layout."
            )
        return _voc_source(name, Path(cfg.DATASETS.VOC_ROOT), name[len("voc_root_") :], "DATASETS.VOC_ROOT")
    base = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    variable = "the environment variable DETECTRON2_DATASETS"
    voc = _VOC_NAME.fullmatch(name)
    if voc:
        year, split = [group for group in voc.groups() if group]
        source = _voc_source(name, base / f"VOC{year}", split, variable)
        source.official_classes, source.year = True, int(year)
        return source
    if name in ("coco_2017_train", "coco_2017_val"):
        split = f"{name[len('coco_2017_') :]}2017"
        json_file = base / "coco" / "annotations" / f"instances_{split}.json"
        return _coco_source(name, json_file, base / "coco" / split, variable, variable)
    if name in ("coco_json_train", "coco_json_val"):
        part = name[len("coco_json_") :].upper()
        json_key, root_key = f"DATASETS.COCO_{part}_JSON", f"DATASETS.COCO_{part}_IMAGES"
        json_file = cfg.DATASETS[f"COCO_{part}_JSON"]
        image_root = cfg.DATASETS[f"COCO_{part}_IMAGES"]
        if not json_file or not image_root:
            raise ValueError(f"The data set {name} needs {json_key} and {root_key}: set both.")
        return _coco_source(name, Path(json_file), Path(image_root), json_key, root_key)
    raise ValueError(f"Unknown data set {name!r} in DATASETS: known are {_KNOWN_FORMS}.")


def _voc_source(name: str, root: Path, split: str, setting: str) -> _Source:
    for path in (root, root / "Annotations", root / "JPEGImages", root / "ImageSets" / "Main"):
        if not path.is_dir():
            raise FileNotFoundError(
                f"The data set {name} needs the folder {path}, which is missing: point {setting} to the data."
            )
    split_file = root / "ImageSets" / "Main" / f"{split}.txt"
    if not split_file.is_file():
        there = ", ".join(sorted(path.stem for path in split_file.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(
            f"The data set {name} needs {split_file}, which is missing: name a split that is there ({there}) "
            f"or point {setting} to other data."
        )
    return _Source(name, "voc", root, split)


def _coco_source(name: str, json_file: Path, root: Path, json_setting: str, root_setting: str) -> _Source:
    if not json_file.is_file():
        raise FileNotFoundError(
            f"The data set {name} needs {json_file}, which is missing: set {json_setting} to the right place."
        )
    if not root.is_dir():
        raise FileNotFoundError(
            f"The data set {name} needs the folder {root}, which is missing: "
            f"set {root_setting} to the right place."
        )
    return _Source(name, "coco", root, json_file=json_file)


def locate_datasets(cfg: CfgNode) -> None:
    """UserError for a data set of cfg.DATASETS that is not known or whose files are not there; reads none."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        _locate(name, cfg)


def _load(source: _Source, decode_up_to: int) -> _Loaded:
    report = ProblemReport(source.name)
    if source.kind == "coco":
        records, categories = read_coco(source.json_file, source.root, report, decode_up_to)
        return _Loaded(source, records, report, list(categories.values()), categories)
    records = read_voc_split(source.root, source.split, report, decode_up_to)
    found = sorted({item.name for record in records for item in record.objects})
    return _Loaded(source, records, report, list(VOC_CLASSES) if source.official_classes else found)


def _common_classes(loaded: list[_Loaded]) -> list[str]:
    """The class list that these data sets share; the union if all are voc_root splits."""
    if all(item.source.kind == "voc" and not item.source.official_classes for item in loaded):
        return sorted({name for item in loaded for name in item.classes})
    first = loaded[0]
    for item in loaded[1:]:
        if item.classes != first.classes:
            raise ValueError(
                f"The data sets {first.source.name} and {item.source.name} have different classes: "
                "set DATASETS.CLASSES to the list that you want."
            )
    return first.classes


def _register(item: _Loaded, classes: list[str], on_error: str) -> None:
    source, name = item.source, item.source.name
    dicts = [dataset_dict(record, classes, item.report) for record in item.records]
    item.report.conclude(on_error, logger)
    if not dicts:
        raise ValueError(f"The data set {name} in {source.root} has no usable image: check its files.")
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: dicts)
    metadata = MetadataCatalog.get(name)
    metadata.set(thing_classes=list(classes), data_problems=item.report, split=source.split)
    if source.kind == "voc":
        metadata.set(dirname=str(source.root), year=source.year, evaluator_type="pascal_voc")
    else:
        index = {label: number for number, label in enumerate(classes)}
        mapping = {key: index[label] for key, label in item.category_ids.items() if label in index}
        metadata.set(
            json_file=str(source.json_file),
            image_root=str(source.root),
            evaluator_type="coco",
            thing_dataset_id_to_contiguous_id=mapping,
        )
    boxes = sum(len(entry["annotations"]) for entry in dicts)
    logger.info("data set %s: %d images, %d boxes, %d classes", name, len(dicts), boxes, len(classes))


def dataset_dict(record: ImageRecord, classes: list[str], report: ProblemReport) -> dict:
    """Detectron2's dict of one image; an object of an unknown class is reported and left out."""
    from dfm_d2.framework import BoxMode  # a class of torch, which comes late

    annotations = []
    for item in record.objects:
        if item.name not in classes:
            source = Path(record.file_name).name
            report.add(
                source, "unknown_class", f"an object is of the class {item.name!r}, which is not known"
            )
            continue
        annotation = {
            "bbox": list(item.box_xyxy),
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": classes.index(item.name),
            "difficult": int(item.difficult),
            "iscrowd": int(item.crowd),
        }
        if item.area is not None:
            annotation["area"] = item.area
        annotations.append(annotation)
    return {
        "file_name": record.file_name,
        "image_id": record.image_id,
        "height": record.height,
        "width": record.width,
        "annotations": annotations,
    }
