"""Batches of images with boxes, of the streams of dfm_d2.data.stream, and their augmentation.

Augmentations are pure functions of an explicit random generator and move the boxes with the pixels.
Images are uint8 (H, W, 3); boxes float64 (M, 4), xyxy in pixels, half-open.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image

from dfm_d2.data.images import ImageError, read_image
from dfm_d2.data.stream import SampleStream, TestLoader, train_batches
from dfm_d2.errors import UserError
from dfm_d2.framework import Boxes, CfgNode, DatasetCatalog, Instances

MIN_BOX_SIDE = 1.0  # pixels; smaller boxes, left over by a crop or a resize, are dropped


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
    image, boxes, kept = augment(_pixels(entry, inputs), boxes, rng, inputs)
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
    return resized_item(entry, _pixels(entry, cfg.INPUT), cfg)


def _pixels(entry: dict, inputs: CfgNode) -> np.ndarray:
    """Of the file. Raises ImageError if it is not as large as the entry says, where that says anything."""
    image = read_image(entry["file_name"], inputs.FORMAT)
    size, known = image.shape[:2], (entry.get("height"), entry.get("width"))
    if known not in ((None, None), size):
        raise ImageError(
            f"{entry['file_name']} has {size} pixels, but had {known}: start anew with what is there"
        )
    return image


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


def augment(
    image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator, inputs: CfgNode
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flip, maybe resize and crop, resize. Returns (image, boxes (M', 4), indices (M',) of those kept).

    inputs: cfg.INPUT. RANDOM_FLIP happens with probability 1/2; DETR_CROP is that of the crop branch of the
    DETR recipe (CROP_RESIZE, CROP_SIZE). The shortest side is one of MIN_SIZE_TRAIN, 0 for no resize, or
    lies between them if MIN_SIZE_TRAIN_SAMPLING is "range"; MAX_SIZE_TRAIN bounds the longest.
    """
    if inputs.RANDOM_FLIP != "none" and rng.random() < 0.5:
        image, boxes = mirror(image, boxes, inputs.RANDOM_FLIP)
    if inputs.DETR_CROP > 0 and rng.random() < inputs.DETR_CROP:
        image, boxes = resize_shortest_edge(image, boxes, int(rng.choice(inputs.CROP_RESIZE)), None)
        image, boxes = random_crop(image, boxes, rng, inputs.CROP_SIZE)
    if inputs.MIN_SIZE_TRAIN_SAMPLING == "range":
        short = int(rng.integers(inputs.MIN_SIZE_TRAIN[0], inputs.MIN_SIZE_TRAIN[1] + 1))
    else:
        short = int(rng.choice(inputs.MIN_SIZE_TRAIN))
    image, boxes = resize_shortest_edge(image, boxes, short, inputs.MAX_SIZE_TRAIN)
    boxes, kept = clip_and_drop(boxes, image.shape[0], image.shape[1])
    return image, boxes, kept


def mirror(image: np.ndarray, boxes: np.ndarray, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """Mirror left-right ("horizontal") or upside down ("vertical"): x' = W - x or y' = H - y."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = boxes.reshape(-1, 4).T
    if direction == "horizontal":
        return image[:, ::-1], np.stack([width - x1, y0, width - x0, y1], axis=1)
    return image[::-1], np.stack([x0, height - y1, x1, height - y0], axis=1)


def shortest_edge_size(height: int, width: int, short: int, max_size: int | None) -> tuple[int, int]:
    """(new height, new width) with the shortest side `short`, less if the longest would pass `max_size`."""
    scale = short / min(height, width)
    if max_size and max(height, width) * scale > max_size:
        scale = max_size / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_shortest_edge(
    image: np.ndarray, boxes: np.ndarray, short: int, max_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Resize bilinearly (antialiased) to a shortest side `short`, 0 for none; boxes scale by W'/W, H'/H."""
    if short == 0:
        return image, boxes
    height, width = image.shape[:2]
    new_height, new_width = shortest_edge_size(height, width, short, max_size)
    if (new_height, new_width) == (height, width):
        return image, boxes
    picture = Image.fromarray(np.ascontiguousarray(image))
    resized = np.asarray(picture.resize((new_width, new_height), Image.Resampling.BILINEAR))
    return resized, boxes.reshape(-1, 4) * np.array([new_width / width, new_height / height] * 2)


def random_crop(
    image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator, size_range: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut out a window whose sides are drawn from `size_range` (least, greatest), each at most the image's.

    Boxes are shifted, not yet clipped (see `clip_and_drop`).
    """
    height, width = image.shape[:2]
    low, high = size_range
    crop_height = int(rng.integers(min(height, low), min(height, high) + 1))
    crop_width = int(rng.integers(min(width, low), min(width, high) + 1))
    top = int(rng.integers(height - crop_height + 1))
    left = int(rng.integers(width - crop_width + 1))
    cropped = image[top : top + crop_height, left : left + crop_width]
    return cropped, boxes.reshape(-1, 4) - np.array([left, top] * 2)


def clip_and_drop(boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to the image and drop those with a side under one pixel. Returns (boxes, kept indices)."""
    clipped = np.clip(boxes.reshape(-1, 4), 0.0, np.array([width, height] * 2, dtype=np.float64))
    kept = np.flatnonzero((clipped[:, 2:] - clipped[:, :2] >= MIN_BOX_SIDE).all(axis=1))
    return clipped[kept], kept
