"""Augmentations: pure functions of an explicit random generator, boxes moved with the pixels.

Images are uint8 (H, W, 3); boxes float64 (M, 4), xyxy in pixels, half-open.
"""

import numpy as np
from PIL import Image

from dfm_d2.framework import CfgNode

MIN_BOX_SIDE = 1.0  # pixels; smaller boxes, left over by a crop or a resize, are dropped


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
