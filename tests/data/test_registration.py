"""Which names mean which files, and what a missing one says."""

import pytest
from data_helpers import VocFolder

from dfm_d2.detection.data.registration import VOC_CLASSES, register_datasets
from dfm_d2.errors import UserError
from dfm_d2.framework import DatasetCatalog, MetadataCatalog


def test_classes_come_from_all_training_splits_and_rule_the_test_set(voc, make_cfg):
    for name, split, classes in (("a", "one", ["dog"]), ("b", "two", ["cat"]), ("c", "val", ["cow", "dog"])):
        voc.add(name, [(label, 3, 4, 20, 25) for label in classes])
        voc.split(split, [name])
    report = register_datasets(make_cfg(voc.root, ("voc_root_one", "voc_root_two"), ("voc_root_val",)))[
        "voc_root_val"
    ]
    metadata, (entry,) = MetadataCatalog.get("voc_root_val"), DatasetCatalog.get("voc_root_val")
    assert metadata.thing_classes == ["cat", "dog"] and metadata.data_problems is report
    assert [t["category_id"] for t in entry["annotations"]] == [1]
    assert report.counts() == {"unknown_class": 1}
    assert entry["image_id"] == "c" and (entry["width"], entry["height"]) == (40, 30)


def test_given_classes_make_others_a_problem(voc, make_cfg):
    voc.add("a", [("dog", 3, 4, 20, 25), ("cat", 3, 4, 20, 25)])
    voc.split("train", ["a"])
    (problem,) = register_datasets(make_cfg(voc.root, CLASSES=["dog"]))["voc_root_train"].problems
    assert (problem.file, problem.kind) == ("a.jpg", "unknown_class")


def test_registering_again_with_another_root_replaces(tmp_path, make_cfg):
    for name in ("first", "second"):
        folder = VocFolder(tmp_path / name)
        folder.add(name, [(f"class_{name}", 3, 4, 20, 25)])
        folder.split("train", [name])
        register_datasets(make_cfg(folder.root))
        assert [e["image_id"] for e in DatasetCatalog.get("voc_root_train")] == [name]
        assert MetadataCatalog.get("voc_root_train").thing_classes == [f"class_{name}"]


def test_official_names_are_ours_with_the_official_classes(tmp_path, voc, make_cfg, monkeypatch):
    folder = VocFolder(tmp_path / "VOC2007")
    folder.add("000005", [("chair", 3, 4, 20, 25, 1)])
    folder.split("trainval", ["000005"])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_datasets(make_cfg("", ("voc_2007_trainval",)))
    (entry,) = DatasetCatalog.get("voc_2007_trainval")
    (target,) = entry["annotations"]
    assert entry["image_id"] == "000005" and target["difficult"] == 1
    assert target["category_id"] == VOC_CLASSES.index("chair") == 8
    metadata = MetadataCatalog.get("voc_2007_trainval")
    assert metadata.thing_classes == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert (metadata.year, metadata.split, metadata.dirname) == (2007, "trainval", str(folder.root))
    voc.add("a")
    voc.split("train", ["a"])
    with pytest.raises(UserError, match="have different classes: set DATASETS.CLASSES"):
        register_datasets(make_cfg(voc.root, ("voc_2007_trainval", "voc_root_train")))


def test_coco_json(coco, make_cfg):
    report = register_datasets(make_cfg("", ("coco_json_train",), **coco[1]()))["coco_json_train"]
    metadata = MetadataCatalog.get("coco_json_train")
    assert not report.problems and metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 18: 1}
    first, second = DatasetCatalog.get("coco_json_train")
    assert (first["image_id"], second["image_id"], second["annotations"]) == (3, 7, [])
    dog, crowd = first["annotations"]
    assert dog["bbox"] == [1, 2, 11, 22] and dog["category_id"] == 1 and dog["area"] == 150.0
    assert crowd["iscrowd"] == 1 and "area" not in crowd


def test_coco_problems_are_reported(coco, make_cfg):
    content, write = coco
    content["images"].append({"id": 9, "file_name": "gone.jpg", "width": 40, "height": 30})
    content["images"].append({"id": 3, "file_name": "b.jpg", "width": 40, "height": 30})
    content["images"][0]["width"] = 41
    bad = [  # (image, category, box)
        (3, 99, [1, 1, 2, 2]),
        (3, 2, [1, 1, 0, 2]),
        (3, 2, [1, 1, None, 2]),
        (3, 2, [1, 1, True, 2]),
        (3, 2, [1, 1, 4]),
        (3, 2, [90, 1, 4, 2]),
        (12345, 2, [1, 1, 4, 2]),
        (9, 2, [1, 1, 4, 2]),
    ]
    content["annotations"] += [{"image_id": i, "category_id": c, "bbox": box} for i, c, box in bad]
    report = register_datasets(make_cfg("", ("coco_json_train",), **write()))["coco_json_train"]
    assert report.counts() == {
        "bad_coordinates": 3,
        "missing_image": 2,
        "duplicate": 1,
        "size_mismatch": 1,
        "unknown_class": 1,
        "zero_area": 1,
        "box_outside": 1,
    }
    (entry,) = DatasetCatalog.get("coco_json_train")
    assert entry["image_id"] == 3 and len(entry["annotations"]) == 2


CATEGORIES = (
    '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": %d, "name": "%s"}]}'
)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "is not json"),
        ("[]", 'has no list "images"'),
        ('{"images": [], "annotations": []}', 'has no list "categories"'),
        (
            '{"images": [{"id": [1], "file_name": "a"}]}',
            r"images\[0\] needs id \(int\) and file_name \(str\)",
        ),
        (CATEGORIES % (1, "b"), "two categories of one id or name"),
        (CATEGORIES % (2, "a"), "two categories of one id or name"),
    ],
)
def test_what_is_not_coco_json_says_so(coco, make_cfg, text, says):
    with pytest.raises(UserError, match=f"instances.json .*{says}"):
        register_datasets(make_cfg("", ("coco_json_train",), **coco[1](text)))


@pytest.mark.parametrize(
    "name, keys, says",
    [
        ("nonsense", {}, "Unknown data set 'nonsense'.*voc_root_<split>"),
        ("voc_2007_nonsense", {}, "Unknown data set"),
        ("voc_root_train", {"VOC_ROOT": ""}, "DATASETS.VOC_ROOT"),
        ("voc_root_train", {"VOC_ROOT": "/nowhere/at/all"}, "/nowhere/at/all, which is missing"),
        ("voc_root_nosuch", {}, "nosuch.txt, which is missing.*train"),
        ("voc_root_broken", {}, "no usable image"),
        ("voc_root_train", {"CLASSES": ["dog", "dog"]}, "twice"),
        ("voc_2012_train", {}, "VOC2012.*DETECTRON2_DATASETS"),
        ("coco_json_train", {}, "DATASETS.COCO_TRAIN_JSON and DATASETS.COCO_TRAIN_IMAGES"),
        ("coco_2017_val", {}, "instances_val2017.json.*DETECTRON2_DATASETS"),
    ],
)
def test_what_is_missing_is_named(voc, make_cfg, monkeypatch, tmp_path, name, keys, says):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "empty"))
    voc.add("a")
    voc.split("train", ["a"])
    voc.add("b", xml="<annotation>")
    voc.split("broken", ["b"])
    with pytest.raises(UserError, match=says) as caught:
        register_datasets(make_cfg(voc.root, (name,), **keys))
    assert "\n" not in str(caught.value)
