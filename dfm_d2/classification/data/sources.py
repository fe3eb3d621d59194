"""Where labelled images come from: folders, a tar of folders, idx files, torchvision, scikit-learn.

Each source returns samples whose pixels are read when they are asked for: uint8 (H, W, 3), or (H, W, 1) for
grey ones. Splits are train and test; folders and tars may have any.
"""

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfm_d2.data.images import ImageError, read_image
from dfm_d2.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# The seeded split of data that come in one piece, and its share of test images.
_SPLIT_SEED, _TEST_SHARE = 0, 0.2


class ClassSample(NamedTuple):
    """One labelled image. file_name: for messages. image_id: unique in its set. class_name: its class.

    read: its pixels; raises ImageError.
    """

    file_name: str
    image_id: str
    class_name: str
    read: Callable[[], np.ndarray]


def read_root(root: Path, split: str) -> list[ClassSample]:
    """The samples of a split of a folder, a tar or a folder of idx files. Raises UserError."""
    if root.is_file():
        return _tar_samples(root, split)
    if any(root.glob("*idx3-ubyte*")):
        return _idx_samples(root, split)
    return _folder_samples(root, split)


def _folder_samples(root: Path, split: str) -> list[ClassSample]:
    folder = root / split
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise UserError(
            f"{root} has no folder {split} (there are: {there}): it wants {split}/<class>/<image>."
        )
    files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
    return [
        ClassSample(str(p), f"{p.parent.name}/{p.name}", p.parent.name, partial(read_image, p)) for p in files
    ]


def _tar_samples(path: Path, split: str) -> list[ClassSample]:
    """Members are read where they lie in the file, which is not unpacked."""
    try:
        # "r:": no compression, in which no member could be found without reading all before it.
        with tarfile.open(path, "r:") as archive:
            found = archive.getmembers()
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"DATASETS.ROOT {path} is not a plain tar ({error}): unpack it, or tar it without compression."
        ) from error
    # Of a name that comes twice, as after "tar -r", the last one is meant.
    stored = {member.name: member for member in found if member.isfile()}
    for member in found:
        if member.islnk() and member.linkname in stored:  # a file of several names is stored once
            stored[member.name] = stored[member.linkname]
    samples: dict[str, ClassSample] = {}
    for member_name, member in sorted(stored.items()):
        *_, in_split, class_name, name = ("", "", *member_name.split("/"))
        if in_split != split or Path(name).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        file_name, image_id = f"{path}:{member_name}", f"{class_name}/{name}"
        if image_id in samples:
            raise UserError(
                f"{file_name} and {samples[image_id].file_name} are one image by their names: tar one folder "
                "of <split>/<class>/<image> only."
            )
        read = partial(_read_member, path, member.offset_data, member.size, file_name)
        samples[image_id] = ClassSample(file_name, image_id, class_name, read)
    if not samples:
        raise UserError(f"{path} has no image {split}/<class>/<image>: check DATASETS.ROOT and the split.")
    return list(samples.values())


def _read_member(path: Path, offset: int, size: int, name: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error.strerror})") from error
    return read_image(io.BytesIO(content), name=name)


def _idx_samples(root: Path, split: str) -> list[ClassSample]:
    """Of idx files: `train-*` and `t10k-*`, or a seeded split where only one pair is there."""
    found = {path.name.split("-")[0]: path for path in sorted(root.glob("*images*idx3-ubyte*"))}
    wanted = "t10k" if split == "test" and "t10k" in found else split
    images = next(iter(found.values())) if len(found) == 1 else found.get(wanted)
    if images is None or split not in ("train", "test"):
        raise UserError(f"{root} has no idx files of the split {split}, only {sorted(found)}.")
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if not labels.is_file():
        raise UserError(f"{images} has no labels {labels.name} beside it.")
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise UserError(f"{images} has {len(pixels)} images, {labels} {len(classes)} labels: get them again.")
    names = [str(k) for k in range(int(classes.max()) + 1)]
    chosen = _seeded_split(len(pixels), split) if len(found) == 1 else range(len(pixels))
    return array_samples(pixels, classes, names, str(images), chosen)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an idx file, uint8 of `dimensions` dimensions.

    Raises UserError for a file that is damaged or of another kind.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        if content[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"its magic number is {content[:4].hex()}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is not a whole idx file ({error}): get it again.") from error


def read_digits(split: str) -> list[ClassSample]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, 0 to 16, here 0 to 240; a seeded split 80 : 20."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, chosen = (found.images * 15).astype(np.uint8), _seeded_split(len(found.images), split)
    return array_samples(pixels, found.target, [str(k) for k in range(10)], "digits", chosen)


def read_torchvision(name: str, root: Path, split: str) -> list[ClassSample]:
    """torchvision's CIFAR ("cifar10", "cifar100"), downloaded to `root` where it is not there yet.

    Raises UserError where it neither is there nor can be downloaded.
    """
    from torchvision import datasets

    try:
        found = getattr(datasets, name.upper())(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {root} and could not be downloaded ({error}): put torchvision's files "
            "there, or point DATASETS.ROOT to where they are."
        ) from error
    chosen = range(len(found.data))
    return array_samples(found.data, np.array(found.targets), found.classes, name, chosen)


def array_samples(
    pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str], name: str, chosen: Iterable[int]
) -> list[ClassSample]:
    """Samples of the chosen indices of an array (n, H, W) or (n, H, W, 3) in memory."""
    pixels = pixels if pixels.ndim == 4 else pixels[..., None]
    return [
        ClassSample(f"{name}[{i}]", str(i), classes[int(labels[i])], partial(pixels.__getitem__, i))
        for i in chosen
    ]


def _seeded_split(number: int, split: str) -> list[int]:
    """Indices of a split of `number` images that come without one."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(number)
    first = round(number * (1 - _TEST_SHARE))
    return sorted((order[:first] if split == "train" else order[first:]).tolist())
