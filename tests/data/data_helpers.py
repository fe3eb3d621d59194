"""Files of small data sets."""

import gzip
import struct

import numpy as np
from PIL import Image


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


def write_idx(folder, name, number, labels=None):
    """A pair of idx files of `number` images of 2 x 2 and labels 0, 1, 2, 0, ...; labels: how many."""
    images = np.arange(number * 4, dtype=np.uint8).reshape(number, 2, 2)
    classes = (np.arange(number if labels is None else labels) % 3).astype(np.uint8)
    for kind, array in (("images", images), ("labels", classes)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        path = folder / f"{name}-{kind}-idx{array.ndim}-ubyte.gz"
        path.write_bytes(gzip.compress(header + array.tobytes()))
