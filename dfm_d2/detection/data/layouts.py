"""Which layout a folder of images with boxes has, and which of them are trained on."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfm_d2.data.files import write_text_atomically
from dfm_d2.data.problems import ProblemReport
from dfm_d2.detection.data.readers import read_coco, read_voc_split
from dfm_d2.detection.data.yolo import find_yolo, read_yolo
from dfm_d2.errors import UserError

logger = logging.getLogger(__name__)

_VAL, _TEST = ("val", "valid", "validation"), ("test", "testing")
# What folders call the splits of a config. Of val and test one stands in for the other.
SYNONYMS = {"train": ("train", "training"), "val": (*_VAL, *_TEST), "test": (*_TEST, *_VAL)}
_HELD_OUT = 0.2  # share of the images that is not trained on where the folder has one split or none
_HOLD_OUT_KEY = 4
_ROBOFLOW = "_annotations.coco.json"


class Found(NamedTuple):
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


Reader = Callable[[ProblemReport, int], Found]  # of a report to fill and decode_up_to
Splits = dict[str, Reader]  # by the name that the folder gives; "" where it has no splits


def voc_reader(root: Path, split: str, year: int = 2012, classes: list[str] | None = None) -> Reader:
    """year: AP differs by it in Detectron2's evaluator. classes: of an official set."""
    metadata = {"dirname": str(root), "split": split, "year": year, "evaluator_type": "pascal_voc"}
    return lambda report, up_to: Found(read_voc_split(root, split, report, up_to), classes, None, metadata)


def coco_reader(json_file: Path, folders: Sequence[Path]) -> Reader:
    """folders: each image is in the first of them that has it."""
    root = str(next(filter(Path.is_dir, folders), folders[0]))
    metadata = {"json_file": str(json_file), "image_root": root, "evaluator_type": "coco"}

    def read(report: ProblemReport, decode_up_to: int) -> Found:
        entries, ids = read_coco(json_file, folders, report, decode_up_to)
        used = {target["category"] for entry in entries for target in entry["annotations"]}
        if json_file.name == _ROBOFLOW and ids.get(0) not in used:  # its category 0 is the set's own name
            ids.pop(0, None)
        return Found(entries, list(ids.values()), ids, metadata)

    return read


def _voc(root: Path) -> Splits:
    if not (root / "Annotations").is_dir() or not (root / "JPEGImages").is_dir():
        return {}
    lists = [path.stem for path in sorted((root / "ImageSets" / "Main").glob("*.txt")) if path.is_file()]
    return {split: voc_reader(root, split) for split in lists or [""]}


def _roboflow(root: Path) -> Splits:
    return {
        f.parent.name: coco_reader(f, [f.parent]) for f in sorted(root.glob(f"*/{_ROBOFLOW}")) if f.is_file()
    }


def _coco(root: Path) -> Splits:
    files = sorted(root.glob("annotations/instances_*.json")) or sorted(root.glob("annotations/*.json"))
    named = [(file.stem.removeprefix("instances_"), file) for file in files if file.is_file()]
    return {s: coco_reader(f, [root / s, root / "images" / s, root / "images", root]) for s, f in named}


def _yolo(root: Path) -> Splits:
    folders, names = find_yolo(root, [*SYNONYMS["train"], *SYNONYMS["val"]])

    def read(folder: Path, report: ProblemReport, decode_up_to: int) -> Found:
        return Found(read_yolo(root, folder, names, report, decode_up_to), names, None, {})

    return {split: partial(read, folder) for split, folder in folders.items()}


_LAYOUTS = {"VOC": _voc, "Roboflow's COCO": _roboflow, "COCO": _coco, "YOLO": _yolo}


def locate_root(root: Path, wanted: Sequence[str], seed: int, record: Path) -> Splits:
    """What reads the wanted splits of a folder: its own, or where it has only one, parts of that by the seed.

    record: file of the images that are held out then; where it is there, it rules: a resume has that split.
    Raises UserError for an unknown layout and a split that is not there.
    """
    if not root.is_dir():
        raise UserError(f"DATASETS.ROOT is {root}, which is missing or no folder: point it to the data.")
    layout, splits = next(((name, s) for name, find in _LAYOUTS.items() if (s := find(root))), ("", {}))
    if not splits:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{root} has none of the layouts that are read: VOC (Annotations/, JPEGImages/), COCO "
            f"(annotations/, <split>/{_ROBOFLOW}), YOLO (data.yaml, images/, labels/). It holds {there}."
        )
    source = _named(splits, "train") or (next(iter(splits)) if len(splits) == 1 else None)
    if source is not None and _named(splits, "test") in (None, source):
        splits = {**splits, **_divided(splits[source], root, seed, record)}
        layout += f", of which {_HELD_OUT:.0%} are held out ({record})"
    named = {split: _named(splits, split) for split in wanted}
    if missing := [split for split, name in named.items() if name is None]:
        there = ", ".join(splits)
        raise UserError(f"{root} has no split {missing[0]} but {there}: name one of them, as root_<split>.")
    logger.info("%s: layout %s; %s", root, layout, ", ".join(f"{s} is {n!r}" for s, n in named.items()))
    return {split: splits[name] for split, name in named.items()}


def _named(splits: Splits, split: str) -> str | None:
    """The folder's name of a split, such as train2017 for train."""
    plain = {re.sub(r"[-_.]?\d*$", "", name.lower()): name for name in splits}
    names = (plain.get(synonym) for synonym in SYNONYMS.get(split, ()))
    return split if split in splits else next(filter(None, names), None)


def _divided(reader: Reader, root: Path, seed: int, record: Path) -> Splits:
    """What reads the part that is trained on and the one that is not; the whole is reported once."""
    memory: list[tuple[Found, set]] = []

    def read(held_out: bool, report: ProblemReport, decode_up_to: int) -> Found:
        if not memory:
            found = reader(report, decode_up_to)
            ids = [entry["image_id"] for entry in found.entries]
            memory.append((found, _held_out(ids, str(root.resolve()), seed, record)))
        found, held = memory[0]
        part = [entry for entry in found.entries if (entry["image_id"] in held) == held_out]
        return found._replace(entries=part, classes=found.class_names())

    return {"train": partial(read, False), "test": partial(read, True)}


def _held_out(ids: list, root: str, seed: int, record: Path) -> set:
    """The ids of the images that are not trained on."""
    from dfm_d2.framework import comm  # torch, which a missing file should not wait for

    try:
        saved = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {"root": None}
        if saved["root"] == root and {*saved["held_out"]} & {*ids}:
            return set(saved["held_out"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{record} is damaged: remove it, and the images are divided anew.") from error
    order = np.random.default_rng([seed, _HOLD_OUT_KEY]).permutation(len(ids)).tolist()
    held = [ids[place] for place in sorted(order[: max(round(_HELD_OUT * len(ids)), 1)])]
    if comm.is_main_process():
        content = json.dumps({"root": root, "seed": seed, "held_out": held}, indent=1)
        write_text_atomically(record, content + "\n")
    return set(held)
