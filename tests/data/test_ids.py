"""Image ids and their order, which must never change: noise and the order of training depend on them."""

import pytest
from data_helpers import write_idx

from dfm_d2.classification.data.registration import HELD_OUT, register_class_sets
from dfm_d2.data.stream import SampleStream
from dfm_d2.detection.data.registration import register_datasets
from dfm_d2.framework import DatasetCatalog


def ids(name):
    return [entry["image_id"] for entry in DatasetCatalog.get(name)]


def test_voc_ids_are_the_names_in_the_order_of_the_split_file(voc, make_cfg):
    for name in ("b", "my cat", "a"):
        voc.add(name)
    voc.split("train", ["my cat", "", "b  -1", "a 1"])
    register_datasets(make_cfg(voc.root))
    assert ids("voc_root_train") == ["my cat", "b", "a"]


def test_coco_ids_are_the_numbers_in_rising_order(coco, make_cfg):
    register_datasets(make_cfg("", ("coco_json_train",), **coco[1]()))
    assert ids("coco_json_train") == [3, 7]


@pytest.mark.parametrize("packed", [False, True])
def test_ids_of_a_folder_and_a_tar_are_class_and_name_in_the_order_of_text(
    folder, make_tar, make_cfg, packed
):
    (folder / "train/class9/notes.txt").write_text("no image")
    (folder / "train/class9/0.png").rename(folder / "train/class9/10.PNG")
    (folder / "train/class9/2.png").rename(folder / "train/2.png")
    register_class_sets(make_cfg(make_tar() if packed else folder, ("root_train",)))
    names = ["class10/0.png", "class10/1.png", "class10/2.png", "class10/3.png"]
    assert ids("root_train") == [*names, "class9/1.png", "class9/10.PNG", "class9/3.png"]


def test_idx_ids_are_the_indices_of_a_fixed_split(tmp_path, make_cfg):
    write_idx(tmp_path, "t10k", 20)
    cfg = make_cfg(tmp_path, ("root_train",), ("root_test",), HOLD_OUT=0.2)
    register_class_sets(cfg)
    assert ids("root_test") == ["1", "9", "14", "15"]
    assert ids(HELD_OUT) == ["12", "13", "18"]
    write_idx(tmp_path, "train", 7)
    cfg.DATASETS.HOLD_OUT = 0.0
    register_class_sets(cfg)
    assert ids("root_train") == [str(i) for i in range(7)] and ids("root_test") == [str(i) for i in range(20)]


def test_the_order_of_training_and_its_augmentation_are_fixed():
    dicts = [{"number": number} for number in range(6)]
    stream = SampleStream(dicts, 5, lambda entry, rng: (entry["number"], int(rng.integers(100))))
    numbers, drawn = zip(*(stream[position][0] for position in range(12)))
    assert numbers == (2, 0, 5, 4, 3, 1, 3, 0, 1, 5, 4, 2)
    assert drawn == (79, 66, 89, 50, 81, 2, 80, 45, 11, 11, 81, 88)
