"""Batches of images with boxes, of the streams of dfm_d2.data.stream."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from dfm_d2.data.images import read_image
from dfm_d2.data.stream import SampleStream, TestLoader, train_batches
from dfm_d2.detection.data.augment import augment, resize_shortest_edge
from dfm_d2.errors import UserError
from dfm_d2.framework import Boxes, CfgNode, DatasetCatalog, Instances


def build_train_loader(cfg: CfgNode, start_position: int) -> Iterator[list[dict]]:
    """Infinite iterator of training batches, beginning at sample `start_position` of the global stream.

    Batch k is the positions [start + k B, start + (k + 1) B), B = SOLVER.IMS_PER_BATCH; rank r of W takes the
    r-th slice of B / W of them. Items have file_name, image_id, height, width (of the file), image (uint8
    tensor (3, H, W)), instances (gt_boxes, gt_classes; without difficult and crowd objects).
    A file that cannot be decoded is reported once and replaced by the image of the next good position
    (ON_ERROR "skip") or raises DataProblemError ("fatal"). Call register_datasets before.

    Raises UserError for a batch that the ranks cannot share, and if no training image is left.
    """
    dicts = [entry for name in cfg.DATASETS.TRAIN for entry in DatasetCatalog.get(name)]
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dicts = [entry for entry in dicts if _usable_annotations(entry)]
    if not dicts:
        raise UserError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no image to train on: "
            "name a data set with boxes that are not all difficult."
        )
    make = partial(_training_item, inputs=cfg.INPUT)
    return train_batches(SampleStream(dicts, max(cfg.SEED, 0), make), cfg, start_position)


def _usable_annotations(entry: dict) -> list[dict]:
    """The annotations that training may use: neither difficult nor crowd."""
    return [a for a in entry["annotations"] if not a.get("difficult", 0) and not a.get("iscrowd", 0)]


def _training_item(entry: dict, rng: np.random.Generator, inputs: CfgNode) -> dict:
    targets = _usable_annotations(entry)
    boxes = np.array([target["bbox"] for target in targets], dtype=np.float64).reshape(-1, 4)
    classes = np.array([target["category_id"] for target in targets], dtype=np.int64)
    image, boxes, kept = augment(read_image(entry["file_name"], inputs.FORMAT), boxes, rng, inputs)
    instances = Instances(image.shape[:2])
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
    instances.gt_classes = torch.as_tensor(classes[kept])
    return {**_item(entry, image), "instances": instances}


def build_test_loader(cfg: CfgNode, dataset_name: str) -> TestLoader:
    """Every image of a registered data set, in order, in lists of TEST.BATCH_SIZE dicts.

    Items are as read_test_item returns them. Each rank gets a contiguous share. A file that cannot be
    decoded is left out under ON_ERROR "skip": its objects then count as missed.
    """
    return TestLoader(DatasetCatalog.get(dataset_name), partial(read_test_item, cfg=cfg), cfg)


def read_test_item(entry: dict, cfg: CfgNode) -> dict:
    """The model's input dict of one image: as in training, without instances.

    The image is resized to MIN_SIZE_TEST, MAX_SIZE_TEST (MIN_SIZE_TEST 0: not at all).
    entry: file_name and image_id at least; height and width are read from the file where they are missing.
    Raises ImageError for a file that cannot be read.
    """
    return resized_item(entry, read_image(entry["file_name"], cfg.INPUT.FORMAT), cfg)


def resized_item(entry: dict, image: np.ndarray, cfg: CfgNode) -> dict:
    """As read_test_item, of pixels `(H, W, 3)` uint8 in the order of INPUT.FORMAT."""
    height, width = image.shape[:2]
    no_boxes = np.zeros((0, 4))
    image, _ = resize_shortest_edge(image, no_boxes, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return _item({"height": height, "width": width, **entry}, image)


def _item(entry: dict, image: np.ndarray) -> dict:
    """The model's input dict of one image, uint8 (H, W, 3) -> tensor (3, H, W)."""
    kept = {key: entry[key] for key in ("file_name", "image_id", "height", "width")}
    return {**kept, "image": torch.from_numpy(image.transpose(2, 0, 1).copy())}
