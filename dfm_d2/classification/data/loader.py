"""Batches of labelled images, as a function of (seed, position) as in dfm_d2.data.stream.

Items: file_name, image_id, label, height, width, image (uint8 tensor (C, H, W)); C is what
MODEL.PIXEL_MEAN has numbers.
"""

from functools import partial

import numpy as np
import torch
from PIL import Image

from dfm_d2.data.stream import SampleStream, TestLoader, train_batches
from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode, DatasetCatalog


def build_class_train_loader(cfg: CfgNode, start_position: int):
    """Infinite iterator of training batches from sample `start_position` of the global stream on.

    Images are resized to INPUT.IMAGE_SIZE, shifted and flipped. Raises UserError for a batch that the ranks
    cannot share, and where no training set is named.
    """
    entries = [entry for name in cfg.DATASETS.TRAIN for entry in DatasetCatalog.get(name)]
    if not entries:
        raise UserError("DATASETS.TRAIN is empty: name a data set to train on, such as digits_train.")
    stream = SampleStream(entries, max(cfg.SEED, 0), partial(_training_item, cfg=cfg))
    return train_batches(stream, cfg, start_position)


def build_class_test_loader(cfg: CfgNode, dataset_name: str) -> TestLoader:
    """Every image of a registered set, in order, in lists of TEST.BATCH_SIZE items."""
    return TestLoader(DatasetCatalog.get(dataset_name), partial(class_item, cfg=cfg), cfg)


def _training_item(entry: dict, rng: np.random.Generator, cfg: CfgNode) -> dict:
    image, most = _pixels(entry, cfg), cfg.INPUT.RANDOM_SHIFT
    if cfg.INPUT.RANDOM_FLIP == "horizontal" and rng.random() < 0.5:
        image = image[:, ::-1]
    if most:
        if most >= min(image.shape[:2]):
            raise UserError(
                f"INPUT.RANDOM_SHIFT is {most}, but {entry['file_name']} has "
                f"{image.shape[0]} x {image.shape[1]} pixels: set it to less than its sides."
            )
        image = shifted(image, *rng.integers(-most, most + 1, size=2))
    return _item(entry, image)


def class_item(entry: dict, cfg: CfgNode) -> dict:
    """The model's input dict of one image, unchanged but for its size. Raises ImageError."""
    return _item(entry, _pixels(entry, cfg))


def _pixels(entry: dict, cfg: CfgNode) -> np.ndarray:
    """uint8 (H, W, C) in INPUT.FORMAT order."""
    image, channels, size = entry["read"](), len(cfg.MODEL.PIXEL_MEAN), cfg.INPUT.IMAGE_SIZE
    if size and image.shape[:2] != (size, size):
        import cv2

        method = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_LINEAR
        image = cv2.resize(image, (size, size), interpolation=method).reshape(size, size, -1)
    if channels == 1 and image.shape[2] == 3:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    elif channels == 3 and image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    return image[..., ::-1] if cfg.INPUT.FORMAT == "BGR" else image


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """`image` (H, W, C) moved, zeros where nothing of it comes."""
    height, width = image.shape[:2]
    reach = max(abs(down), abs(right))
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)))
    return padded[reach - down : reach - down + height, reach - right : reach - right + width]


def _item(entry: dict, image: np.ndarray) -> dict:
    pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
    kept = {key: entry[key] for key in ("file_name", "image_id", "label")}
    return {**kept, "height": image.shape[0], "width": image.shape[1], "image": pixels}
