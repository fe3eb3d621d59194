"""Small data sets on disk for the tests of data."""

import json
import os
import tarfile
from itertools import product
from pathlib import Path

import pytest
from data_helpers import VocFolder, pixels_of
from PIL import Image

from dfm_d2.config import add_dfm_config
from dfm_d2.framework import get_cfg


@pytest.fixture
def make_cfg():
    """make_cfg(folder of VOC_ROOT and ROOT, names of TRAIN, names of TEST, **other DATASETS keys)."""

    def make(root="", train=("voc_root_train",), test=(), **keys):
        cfg = get_cfg()
        add_dfm_config(cfg)
        keys = {"VOC_ROOT": str(root), "ROOT": str(root), "TRAIN": tuple(train), "TEST": tuple(test), **keys}
        cfg.DATASETS.update(keys)
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (24, 32), 0
        cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 0, 2, 5
        return cfg

    return make


@pytest.fixture
def shared_data():
    """shared_data(name): a real set in the folder of DFM_SHARED_DATA; skips where it is missing."""

    def find(name):
        default = Path(__file__).parents[3] / "shared" / "data"
        path = Path(os.environ.get("DFM_SHARED_DATA", default)) / name
        return path if path.exists() else pytest.skip(f"no {path}: set DFM_SHARED_DATA")

    return find


@pytest.fixture
def voc(tmp_path):
    return VocFolder(tmp_path / "voc")


@pytest.fixture
def coco(tmp_path, make_cfg):
    """(content of a COCO json to change, function that writes it and returns a config of it)."""
    images, json_path = tmp_path / "images", tmp_path / "instances.json"
    images.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), "red").save(images / name)
    content = {
        "images": [
            {"id": number, "file_name": f"{name}.jpg", "width": 40, "height": 30}
            for number, name in ((7, "b"), (3, "a"))
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 18, "bbox": [1, 2, 10, 20], "area": 150.0, "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 2, "bbox": [5, 5, 10, 10], "iscrowd": 1},
        ],
    }

    def write(text=None):
        json_path.write_text(json.dumps(content) if text is None else text)
        keys = {"COCO_TRAIN_JSON": str(json_path), "COCO_TRAIN_IMAGES": str(images)}
        return make_cfg("", ("coco_json_train",), **keys)

    return content, write


@pytest.fixture
def folder(tmp_path):
    """<split>/<class>/<image>, whose pixels are pixels_of(10 * (number of the class) + number)."""
    for (split, number), (k, label) in product((("train", 4), ("test", 2)), enumerate(("class9", "class10"))):
        where = tmp_path / "set" / split / label
        where.mkdir(parents=True)
        for index in range(number):
            Image.fromarray(pixels_of(10 * k + index)).save(where / f"{index}.png")
    return tmp_path / "set"


@pytest.fixture
def make_tar(folder):
    """make_tar(name, mode): an archive of the folder beside it."""

    def make(name="set.tar", mode="w"):
        with tarfile.open(folder.parent / name, mode) as tar:
            tar.add(folder, "set")
        return folder.parent / name

    return make
