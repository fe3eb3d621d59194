"""The image sets of a classification config, read, checked and registered in DatasetCatalog.

Names: root_<split> (DATASETS.ROOT: a folder, a tar of folders or idx files), digits_{train,test}
(scikit-learn), cifar10_{train,test}, cifar100_{train,test} (torchvision). Pixels are read when they are asked
for: uint8 (H, W, 3), or (H, W, 1) for grey images. A root may have any splits.
"""

import gzip
import io
import math
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfm_d2.data.catalog import distinct, register, set_aside
from dfm_d2.data.images import ImageError, read_image
from dfm_d2.data.problems import DECODE_UP_TO, Problem, ProblemReport
from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# The seeded split of data that come in one piece, and its share of test images.
_SPLIT_SEED, _TEST_SHARE = 0, 0.2
_KNOWN = "root_<split> (with DATASETS.ROOT), digits_{train,test}, cifar10_{train,test}, cifar100_{train,test}"


class ClassSample(NamedTuple):
    """One labelled image. file_name: for messages. image_id: unique in its set. class_name: its class.

    read: its pixels; raises ImageError.
    """

    file_name: str
    image_id: str
    class_name: str
    read: Callable[[], np.ndarray]


def register_class_sets(cfg: CfgNode) -> dict[str, ProblemReport]:
    """Read and register every set in cfg.DATASETS.TRAIN and TEST, and HELD_OUT. {name: its ProblemReport}.

    An entry has file_name, image_id, label and read, which returns the pixels. Classes are DATASETS.CLASSES
    if given, else those of the training sets (of the test sets where there are none), as thing_classes.
    Raises UserError for a set that is unknown, not there or without any image, and for any problem under
    DATASETS.ON_ERROR "fatal".
    """
    train, decode_up_to = list(cfg.DATASETS.TRAIN), DECODE_UP_TO[cfg.DATASETS.VERIFY_IMAGES]
    reports = {name: ProblemReport(name) for name in [*train, *cfg.DATASETS.TEST]}
    samples = {name: read() for name, read in locate_class_sets(cfg).items()}
    for name, of_set in samples.items():
        if len(of_set) <= decode_up_to:
            samples[name] = reports[name].keep(_decoded, of_set)
    found = {sample.class_name for name in train or samples for sample in samples[name]}
    classes = distinct(list(cfg.DATASETS.CLASSES) or sorted(found, key=_natural))
    index = {name: number for number, name in enumerate(classes)}
    entries = {}
    for name, report in reports.items():
        entries[name] = report.keep(partial(_entry, index=index), samples[name])
        report.conclude(len(entries[name]), cfg.DATASETS.ON_ERROR)
    set_aside(cfg, entries)
    for name, of_set in entries.items():
        register(name, of_set, classes)
    return reports


def locate_class_sets(cfg: CfgNode) -> dict[str, Callable[[], list[ClassSample]]]:
    """What reads each data set of a config. Raises UserError for one that is not known or not there."""
    return {name: _locate(name, cfg) for name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]}


def _locate(name: str, cfg: CfgNode) -> Callable[[], list[ClassSample]]:
    root = cfg.DATASETS.ROOT
    if match := re.fullmatch("root_(.+)", name):
        if not root:
            raise UserError(f"The data set {name} needs DATASETS.ROOT: set it to a folder or a tar.")
        if not Path(root).exists():
            raise UserError(f"DATASETS.ROOT is {root}, which is missing: point it to the data.")
        return partial(read_root, Path(root), match[1], cfg.DATASETS.MAX_BYTES)
    match = re.fullmatch("(digits|cifar10|cifar100)_(train|test)", name)
    if not match:
        raise UserError(f"Unknown data set {name!r} in DATASETS: known are {_KNOWN}.")
    source, split = match.groups()
    if source == "digits":
        return partial(read_digits, split)
    return partial(read_torchvision, source, Path(root or "data"), split)


def _decoded(sample: ClassSample) -> ClassSample:
    try:
        sample.read()
    except ImageError as error:
        raise Problem(sample.file_name, "image", str(error)) from error
    return sample


def _entry(sample: ClassSample, index: dict[str, int]) -> dict:
    entry = sample._asdict()
    name = entry.pop("class_name")
    if name not in index:
        raise Problem(sample.file_name, "unknown_class", f"its class {name!r} is not known")
    return {**entry, "label": index[name]}


def _natural(text: str) -> list:
    """A key that puts 9 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def read_root(root: Path, split: str, most_bytes: int = 2**30) -> list[ClassSample]:
    """The samples of a split of a folder, a tar or a folder of idx files, which have a limit. UserError."""
    if root.is_file():
        return _tar_samples(root, split)
    if any(root.glob("*idx3-ubyte*")):
        return _idx_samples(root, split, most_bytes)
    if not (root / split).is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise UserError(
            f"{root} has no folder {split} (there are: {there}): it wants {split}/<class>/<image>."
        )
    files = sorted(
        p for p in (root / split).glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
    )
    names = [(p, p.parent.name) for p in files]
    return [ClassSample(str(p), f"{name}/{p.name}", name, partial(read_image, p)) for p, name in names]


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


def _idx_samples(root: Path, split: str, most_bytes: int) -> list[ClassSample]:
    """Of idx files: `train-*` and `t10k-*`, or a seeded split where only one pair is there."""
    found = {
        path.name.split("-")[0]: path for path in sorted(root.glob("*images*idx3-ubyte*")) if path.is_file()
    }
    wanted = "t10k" if split == "test" and "t10k" in found else split
    images = next(iter(found.values()), None) if len(found) == 1 else found.get(wanted)
    if images is None or split not in ("train", "test"):
        raise UserError(f"{root} has no idx files of the split {split}, only {sorted(found)}.")
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if not labels.is_file():
        raise UserError(f"{images} has no labels {labels.name} beside it.")
    pixels, classes = _read_idx(images, 3, most_bytes), _read_idx(labels, 1, most_bytes)
    if len(pixels) != len(classes):
        raise UserError(f"{images} has {len(pixels)} images, {labels} {len(classes)} labels: get them again.")
    names = [str(k) for k in range(int(classes.max()) + 1)]
    chosen = _seeded_split(len(pixels), split) if len(found) == 1 else range(len(pixels))
    return _array_samples(pixels, classes, names, str(images), chosen)


def _read_idx(path: Path, dimensions: int, most_bytes: int) -> np.ndarray:
    """The bytes of an idx file, uint8 of `dimensions` dimensions."""
    try:
        with open(path, "rb") as plain:
            file = gzip.open(plain) if plain.peek(2)[:2] == b"\x1f\x8b" else plain
            header = file.read(4 + 4 * dimensions)
            shape = struct.unpack(f">{dimensions}I", header[4:])
            if header[:4] != bytes((0, 0, 8, dimensions)):
                raise ValueError(f"its magic number is {header[:4].hex()}")
            if not 0 < math.prod(shape) <= most_bytes:
                limit = f"DATASETS.MAX_BYTES {most_bytes}"
                raise ValueError(f"its sizes are {shape}; read are 1 to {limit} bytes")
            return np.frombuffer(file.read(math.prod(shape) + 1), np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is not a whole idx file ({error}): get it again.") from error


def read_digits(split: str) -> list[ClassSample]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, 0 to 16, here 0 to 240; a seeded split 80 : 20."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, chosen = (found.images * 15).astype(np.uint8), _seeded_split(len(found.images), split)
    return _array_samples(pixels, found.target, [str(k) for k in range(10)], "digits", chosen)


def read_torchvision(name: str, root: Path, split: str) -> list[ClassSample]:
    """torchvision's CIFAR ("cifar10", "cifar100"), downloaded to `root` where it is not there. UserError."""
    from torchvision import datasets

    is_new = not root.exists()
    try:
        found = getattr(datasets, name.upper())(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        if is_new and root.is_dir() and not any(root.iterdir()):  # torchvision made it
            root.rmdir()
        raise UserError(
            f"{name} is not in {root} and could not be downloaded ({error}): put torchvision's files "
            "there, or point DATASETS.ROOT to where they are."
        ) from error
    return _array_samples(found.data, found.targets, found.classes, name, range(len(found.data)))


def _array_samples(
    pixels: np.ndarray, labels: Sequence[int], classes: Sequence[str], name: str, chosen: Iterable[int]
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
