"""What a run is about to train on: its numbers and nine pictures, and what the config leaves to be chosen."""

import contextlib
import logging
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from dfm_d2.data.images import ImageError, read_image
from dfm_d2.detection.data.loader import resize_shortest_edge
from dfm_d2.detection.data.registration import ROOT_PREFIX, register_datasets
from dfm_d2.framework import CfgNode, DatasetCatalog, MetadataCatalog, comm

logger = logging.getLogger(__name__)

# N is so many times the most boxes in an image, within bounds; and that so many times again at inference,
# where each box has to be found by noise that begins near it.
_PROPOSALS_A_BOX, _LEAST_PROPOSALS, _MOST_PROPOSALS, _AT_INFERENCE = 4, 40, 300, 3
# The short side of images is the multiple of _STEP at which nine boxes in ten, and half of every class, have
# at least the root of the area _SMALL_BOX, in pixels, within bounds. The finest level has a stride of 4.
_SMALL_BOX, _STEP, _LEAST_SIDE, _MOST_SIDE = 24, 32, 192, 480


def register_and_show(cfg: CfgNode) -> None:
    """``register_datasets`` and ``choose``. Of ``root_<split>``, whose layout is recognised, also a line each
    and, in OUTPUT_DIR, ``dataset.png``: nine images with their boxes."""
    reports = register_datasets(cfg)
    of_root = [name for name in reports if name.startswith(ROOT_PREFIX)]
    for name in of_root:
        logger.info("%s: %s; %d problems", name, described(name), len(reports[name].problems))
    if chosen := choose(cfg, [e for name in cfg.DATASETS.TRAIN for e in DatasetCatalog.get(name)]):
        logger.info("chosen from the training set: %s", chosen)
    if of_root and comm.is_main_process():
        logger.info("%s: look whether boxes and classes are right", _write_sheet(cfg, of_root[0]))


def described(name: str) -> str:
    """The boxes of each class of a registered set, the smallest and the largest, how many an image has."""
    entries, classes = DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes
    boxes = [(*_sides(a), Path(e["file_name"]).name, a) for e in entries for a in e["annotations"]]
    boxes.sort(key=lambda box: box[0] * box[1])
    ends = [f"{width:.0f} x {height:.0f} px ({file})" for width, height, file, _ in boxes[:1] + boxes[-1:]]
    counts, numbers = Counter(a["category_id"] for *_, a in boxes), [len(e["annotations"]) for e in entries]
    each = ", ".join(f"{label} {counts[k]}" for k, label in enumerate(classes))
    none_or_most = f"{numbers.count(0)} images without boxes, none with more than {max(numbers)}"
    return f"{none_or_most}; {each}; the smallest and the largest box: {', '.join(ends)}"


def _sides(annotation: dict) -> tuple[float, float]:
    x0, y0, x1, y1 = annotation["bbox"]
    return x1 - x0, y1 - y0


def choose(cfg: CfgNode, entries: list[dict]) -> str:
    """Set, in place, NUM_PROPOSALS where it is 0 (then the SAMPLER's too) and the four sizes of images where
    MIN_SIZE_TRAIN is empty.

    entries: data set dicts. Returns what was set, as text; empty where the config leaves nothing.
    """
    chosen, dfm, inputs = [], cfg.MODEL.DFM, cfg.INPUT
    if not dfm.NUM_PROPOSALS:
        most = max((len(entry["annotations"]) for entry in entries), default=0)
        wanted = -(-most * _PROPOSALS_A_BOX // 10) * 10
        dfm.NUM_PROPOSALS = max(min(max(wanted, _LEAST_PROPOSALS), _MOST_PROPOSALS), most)
        dfm.SAMPLER.NUM_PROPOSALS = dfm.SAMPLER.NUM_PROPOSALS or _AT_INFERENCE * dfm.NUM_PROPOSALS
        chosen.append(
            f"NUM_PROPOSALS of MODEL.DFM {dfm.NUM_PROPOSALS}, its SAMPLER {dfm.SAMPLER.NUM_PROPOSALS}"
        )
    if not inputs.MIN_SIZE_TRAIN:
        shorts = [min(e["height"], e["width"]) for e in entries] or [_LEAST_SIDE]
        shares = defaultdict(list)  # of the short side, for each class
        for annotation, short in [(a, short) for e, short in zip(entries, shorts) for a in e["annotations"]]:
            shares[annotation["category_id"]].append(math.sqrt(math.prod(_sides(annotation))) / short)
        shares = shares or {0: [1.0]}
        small = min(np.quantile(sum(shares.values(), []), 0.1), *map(np.median, shares.values()))
        wanted = np.clip(_SMALL_BOX / small, _LEAST_SIDE, _MOST_SIDE)
        side = int(-(-min(wanted, np.median(shorts)) // _STEP)) * _STEP  # most images are not enlarged
        inputs.MIN_SIZE_TRAIN = (max(side - _STEP, _STEP), side, side + _STEP)
        # The largest of them: what it gives to small boxes was seen on photographs that were not trained on.
        inputs.MIN_SIZE_TEST = side + _STEP
        inputs.MAX_SIZE_TRAIN = inputs.MAX_SIZE_TEST = 2 * inputs.MIN_SIZE_TEST
        test = f"MIN_SIZE_TEST {inputs.MIN_SIZE_TEST}, MAX {inputs.MAX_SIZE_TEST}"
        chosen.append(f"INPUT.MIN_SIZE_TRAIN {inputs.MIN_SIZE_TRAIN}, {test}")
    return ", ".join(chosen)


def _write_sheet(cfg: CfgNode, name: str) -> Path:
    """Nine images of a set, evenly spaced over those with boxes. Returns the path written."""
    from dfm_d2.visualize.boxes import draw_sheet

    shown, pictures = [entry for entry in DatasetCatalog.get(name) if entry["annotations"]], []
    for entry in (shown[place] for place in sorted({k * len(shown) // 9 for k in range(9 if shown else 0)})):
        boxes = np.array([a["bbox"] for a in entry["annotations"]])
        with contextlib.suppress(ImageError):  # the loader reports it
            image, boxes = resize_shortest_edge(read_image(entry["file_name"]), boxes, 320, 640)
            pictures.append((image, [(box, a["category_id"]) for box, a in zip(boxes, entry["annotations"])]))
    classes = MetadataCatalog.get(name).thing_classes
    return draw_sheet(Path(cfg.OUTPUT_DIR) / "dataset.png", pictures, classes)
