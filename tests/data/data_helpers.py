"""A small folder in VOC layout, and where the checkout is."""

from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def voc_xml(objects, size=(40, 30)):
    """objects: (name, xmin, ymin, xmax, ymax[, difficult]) as written in the file."""
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

    def add(self, name, objects=(("cat", 3, 4, 20, 25),), size=(40, 30), xml=None):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.image(name), quality=95)
        self.xml(name).write_text(voc_xml(objects, size) if xml is None else xml)

    def image(self, name):
        return self.root / "JPEGImages" / f"{name}.jpg"

    def xml(self, name):
        return self.root / "Annotations" / f"{name}.xml"

    def split(self, split, names):
        (self.root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")

    def truncate(self, name):
        data = self.image(name).read_bytes()
        self.image(name).write_bytes(data[: len(data) // 2])
