"""What every example does around a file: photographs in, boxes of the photograph out. Needs numpy and Pillow.

Shapes: B images, L detections of an image at most.
"""

import numpy as np
from PIL import Image, ImageOps


def read(path, about):
    """Pixels float32 (3, H, W) as the file wants them, and the factors (4,) from there to the photograph.

    about: what the file says of itself, the JSON under the name dfm_d2.json.
    """
    photo = ImageOps.exif_transpose(Image.open(path))
    if photo.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips: white for the most part
        photo = Image.fromarray((np.asarray(photo).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    photo = photo.convert("RGB")
    width, height = photo.size
    if about["min_size"]:
        scale = about["min_size"] / min(photo.size)
        if about["max_size"] and max(photo.size) * scale > about["max_size"]:
            scale = about["max_size"] / max(photo.size)
        size = (max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1))
        photo = photo.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(photo, dtype=np.float32)
    if about["format"] == "BGR":
        pixels = pixels[:, :, ::-1]
    factors = np.array([width / photo.width, height / photo.height] * 2)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), factors


def pad(images, about):
    """(B, 3, H, W) with sides that the file takes, and the sizes (B, 2) of what is inside."""
    sizes = np.array([image.shape[1:] for image in images], dtype=np.float32)
    unit = about["divisibility"]
    height, width = (max(-(-int(side) // unit) * unit, about["min_side"]) for side in sizes.max(0))
    batch = np.zeros((len(images), 3, height, width), dtype=np.float32)
    for place, image in zip(batch, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def noise(count, about):
    """(count, N, 4): any standard normal numbers do; the same ones give the same answer."""
    shape = (count, about["num_noise_boxes"], 4)
    return np.random.default_rng(about["seed"]).standard_normal(shape, dtype=np.float32)


def answer(boxes, scores, classes, factors, about):
    """Detections of one image (L, 4), (L,), (L,) as plain values, boxes in pixels of the photograph."""
    return [
        {
            "class": about["class_names"][int(label)],
            "score": float(score),
            "box_xyxy": (np.asarray(box) * factors).tolist(),
        }
        for box, score, label in zip(boxes, scores, classes)
    ]
