"""Configs and files of small data sets."""

import gzip
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfm_d2.config import add_dfm_config
from dfm_d2.framework import get_cfg


def make_cfg(root="", train=("voc_root_train",), test=(), **keys):
    """root: of ROOT; keys: others of DATASETS."""
    cfg = get_cfg()
    add_dfm_config(cfg)
    keys = {"ROOT": str(root), "TRAIN": tuple(train), "TEST": tuple(test), **keys}
    cfg.DATASETS.update(keys)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (24, 32), 0
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 0, 2, 5
    return cfg


def shared_data(name):
    """A real set in the folder of DFM_SHARED_DATA; skips where it is missing."""
    default = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("DFM_SHARED_DATA", default)) / name
    return path if path.exists() else pytest.skip(f"no {path}: set DFM_SHARED_DATA")


def pixels_of(seed, size=(5, 6)):
    """Random uint8 (H, W, 3) of size (width, height)."""
    return np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)


def voc_xml(objects, size=(40, 30)):
    """objects: (name, xmin, ymin, xmax, ymax[, difficult]) as written in the file, or a name alone."""
    objects = [(item, 3, 4, 20, 25) if isinstance(item, str) else item for item in objects]
    body = "".join(
        f"<object><name>{name}</name><difficult>{difficult[0] if difficult else 0}</difficult><bndbox>"
        f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
        for name, xmin, ymin, xmax, ymax, *difficult in objects
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{body}</annotation>"


class VocFolder:
    """A folder in VOC layout that a test fills."""

    def __init__(self, root):
        self.root = root
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / part).mkdir(parents=True)

    def add(self, name, objects=("cat",), size=(40, 30)):
        Image.fromarray(pixels_of(len(name), size)).save(self.image(name), quality=95)
        self.xml(name).write_text(voc_xml(objects, size))

    def image(self, name):
        return self.root / "JPEGImages" / f"{name}.jpg"

    def xml(self, name):
        return self.root / "Annotations" / f"{name}.xml"

    def split(self, split, names):
        """Write a split of names; of {name: objects}, add these images, too."""
        for name in names if isinstance(names, dict) else ():
            self.add(name, names[name])
        (self.root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")

    def truncate(self, name):
        data = self.image(name).read_bytes()
        self.image(name).write_bytes(data[: len(data) // 2])


def make_tar(folder, name="set.tar", mode="w"):
    """An archive of a folder beside it."""
    with tarfile.open(folder.parent / name, mode) as tar:
        tar.add(folder, "set")
    return folder.parent / name


def write_idx(folder, name, number, labels=None):
    """A pair of idx files of `number` images of 2 x 2 and labels 0, 1, 2, 0, ...; labels: how many."""
    images = np.arange(number * 4, dtype=np.uint8).reshape(number, 2, 2)
    classes = (np.arange(number if labels is None else labels) % 3).astype(np.uint8)
    for kind, array in (("images", images), ("labels", classes)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        path = folder / f"{name}-{kind}-idx{array.ndim}-ubyte.gz"
        path.write_bytes(gzip.compress(header + array.tobytes()))
