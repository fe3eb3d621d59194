"""Small data sets on disk for the tests of the data room."""

import json
import os
from pathlib import Path

import pytest
from data_helpers import ROOT, VocFolder
from PIL import Image

from dfm_d2.config import add_dfm_config
from dfm_d2.framework import get_cfg


@pytest.fixture
def voc(tmp_path):
    return VocFolder(tmp_path / "voc")


@pytest.fixture
def make_cfg():
    """cfg of a data set: make_cfg(root, train=("voc_root_train",), test=(), **DATASETS keys)."""

    def make(root, train=("voc_root_train",), test=(), **keys):
        cfg = get_cfg()
        add_dfm_config(cfg)
        cfg.DATASETS.VOC_ROOT = str(root)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
        for key, value in keys.items():
            cfg.DATASETS[key] = value
        cfg.INPUT.MIN_SIZE_TRAIN = (24, 32)
        cfg.INPUT.MIN_SIZE_TEST = 0
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.SOLVER.IMS_PER_BATCH = 2
        cfg.SEED = 5
        return cfg

    return make


@pytest.fixture
def coco_folder(tmp_path):
    """(json path, image folder, content to change and `write()`)."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), "red").save(images / name)
    content = {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "a.jpg", "width": 40, "height": 30},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 18, "bbox": [1, 2, 10, 20], "area": 150.0, "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 2, "bbox": [5, 5, 10, 10], "iscrowd": 1},
        ],
    }
    json_path = tmp_path / "instances.json"

    def write():
        json_path.write_text(json.dumps(content))
        return json_path, images

    write()
    return json_path, images, content, write


@pytest.fixture
def shared_data():
    """Path of a folder of the shared data; skips where it is missing."""

    def find(name):
        folder = Path(os.environ.get("DFM_SHARED_DATA", ROOT / ".." / "shared" / "data")) / name
        if not folder.is_dir():
            pytest.skip(f"the shared data set {name} is not here (set DFM_SHARED_DATA)")
        return folder

    return find
