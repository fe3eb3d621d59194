"""Small data sets on disk for the tests of data."""

import json
from itertools import product

import pytest
from data_helpers import VocFolder, make_cfg, pixels_of
from PIL import Image


@pytest.fixture
def voc(tmp_path):
    return VocFolder(tmp_path / "voc")


@pytest.fixture
def coco(tmp_path):
    """(content of a COCO json to change, function that writes it and returns a config of it)."""
    images, json_path = tmp_path / "images", tmp_path / "instances.json"
    images.mkdir()
    names = {7: "b.jpg", 3: "a.jpg"}
    for name in names.values():
        Image.new("RGB", (40, 30), "red").save(images / name)
    content = {
        "images": [{"id": k, "file_name": name, "width": 40, "height": 30} for k, name in names.items()],
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
