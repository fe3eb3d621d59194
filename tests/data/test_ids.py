"""Image ids and their order, which must never change: noise and the order of training depend on them."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_cfg, make_tar, pixels_of, shared_data, write_idx
from hypothesis import example, given
from hypothesis import strategies as st

from dfm_d2.classification.data.registration import read_digits, read_root, register_class_sets
from dfm_d2.data.catalog import HELD_OUT
from dfm_d2.data.files import paths_by_stem
from dfm_d2.data.images import ImageError
from dfm_d2.data.stream import SampleStream
from dfm_d2.detection.data.registration import register_datasets
from dfm_d2.framework import DatasetCatalog


def ids(name):
    return [entry["image_id"] for entry in DatasetCatalog.get(name)]


@given(st.lists(st.sampled_from(["x.jpg", "x.png", "x_2.jpg", "x_2_2.jpg", "z"]), max_size=8))
@example(["a/x.jpg", "b/x.png", "x_2.gif", "y.jpg"])
def test_an_output_file_s_stem_that_is_taken_gets_a_number(files):
    found = paths_by_stem(files, Path("out"), ".html")
    assert len(set(found)) == len(files)
    if "y.jpg" in files:
        assert [path.name for path in found] == ["x.html", "x_2.html", "x_2_2.html", "y.html"]


def test_voc_ids_are_the_names_in_the_order_of_the_split_file(voc):
    voc.split("train", {"b": ["cat"], "my cat": ["cat"], "a": ["cat"]})
    voc.split("train", ["my cat", "", "b  -1", "a 1"])
    register_datasets(make_cfg(voc.root))
    assert ids("voc_root_train") == ["my cat", "b", "a"]


@pytest.mark.parametrize("packed", [False, True])
def test_folders_and_tars_are_the_same_with_class_and_name_in_text_order(folder, packed):
    (folder / "train/class9/notes.txt").write_text("no image")
    (folder / "train/class9/0.png").rename(folder / "train/class9/10.PNG")
    (folder / "train/class9/2.png").rename(folder / "train/2.png")
    register_class_sets(make_cfg(make_tar(folder) if packed else folder, ("root_train",)))
    names, entries = [f"class10/{number}.png" for number in range(4)], DatasetCatalog.get("root_train")
    assert ids("root_train") == [*names, "class9/1.png", "class9/10.PNG", "class9/3.png"]
    assert [entry["label"] for entry in entries] == [1] * 4 + [0] * 3
    for entry, seed in zip(entries, (10, 11, 12, 13, 1, 0, 3)):
        assert np.array_equal(entry["read"](), pixels_of(seed))


def test_idx_ids_are_the_indices_of_a_fixed_split(tmp_path):
    write_idx(tmp_path, "t10k", 20)
    register_class_sets(make_cfg(tmp_path, ("root_train",), ("root_test",), HOLD_OUT=0.2))
    assert ids("root_test") == ["1", "9", "14", "15"] and ids(HELD_OUT) == ["12", "13", "18"]
    assert len(ids("root_train")) == 13 and not {*ids("root_test"), *ids(HELD_OUT)} & set(ids("root_train"))
    for entry in DatasetCatalog.get("root_train") + DatasetCatalog.get("root_test"):
        number = int(entry["image_id"])
        assert entry["label"] == number % 3 and entry["read"]().shape == (2, 2, 1)
        assert entry["read"]().ravel().tolist() == [*range(4 * number, 4 * number + 4)]
    write_idx(tmp_path, "train", 7)
    register_class_sets(make_cfg(tmp_path, ("root_train",), ("root_test",)))
    assert [ids("root_train"), ids("root_test")] == [[*map(str, range(n))] for n in (7, 20)]


def test_the_digits_are_split():
    train, test = read_digits("train"), read_digits("test")
    assert (len(train), len(test), test[0].image_id) == (1438, 359, "1")
    assert train[0].read().shape == (8, 8, 1) and max(sample.read().max() for sample in train) == 240


@pytest.mark.parametrize("name, train_size", [("mnist_t10k", 8000), ("cifar10_jpg_12k.tar", 10000)])
def test_the_shared_sets(name, train_size):
    sizes = [len(read_root(shared_data(name), split)) for split in ("train", "test")]
    assert sizes == [train_size, 2000]


@pytest.mark.parametrize("unreadable, numbers", [((), "205431301542"), ((1, 5), "204433304442")])
def test_the_order_of_training_and_its_augmentation_are_fixed(unreadable, numbers):
    """An unreadable image is replaced by that of the next good position, augmented as at its own."""

    def make(entry, rng):
        if entry["number"] in unreadable:
            raise ImageError("torn")
        return entry["number"], int(rng.integers(100))

    dicts = [{"file_name": f"{number}.png", "number": number} for number in range(6)]
    shown, drawn = zip(*(SampleStream(dicts, 5, make)[position][0] for position in range(12)))
    assert shown == tuple(map(int, numbers)) and drawn == (79, 66, 89, 50, 81, 2, 80, 45, 11, 11, 81, 88)
