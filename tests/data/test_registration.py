"""Which names mean which files, and what a missing one says."""

import pytest
from data_helpers import VocFolder

from dfm_d2.detection.data.registration import register_datasets
from dfm_d2.detection.data.voc import VOC_CLASSES
from dfm_d2.framework import DatasetCatalog, MetadataCatalog


def test_classes_come_from_all_training_splits_and_rule_the_test_set(voc, make_cfg):
    voc.add("a", [("dog", 3, 4, 20, 25)])
    voc.add("b", [("cat", 3, 4, 20, 25)])
    voc.add("c", [("cow", 3, 4, 20, 25), ("dog", 3, 4, 20, 25)])
    for split, name in (("one", "a"), ("two", "b"), ("val", "c")):
        voc.split(split, [name])
    cfg = make_cfg(voc.root, ("voc_root_one", "voc_root_two"), ("voc_root_val",))
    reports = register_datasets(cfg)
    assert MetadataCatalog.get("voc_root_val").thing_classes == ["cat", "dog"]
    (entry,) = DatasetCatalog.get("voc_root_val")
    assert [t["category_id"] for t in entry["annotations"]] == [1]
    assert reports["voc_root_val"].counts() == {"unknown_class": 1}
    assert MetadataCatalog.get("voc_root_val").data_problems is reports["voc_root_val"]
    assert entry["image_id"] == "c" and (entry["width"], entry["height"]) == (40, 30)


def test_given_classes_make_others_a_problem(voc, make_cfg):
    voc.add("a", [("dog", 3, 4, 20, 25), ("cat", 3, 4, 20, 25)])
    voc.split("train", ["a"])
    reports = register_datasets(make_cfg(voc.root, CLASSES=["dog"]))
    assert reports["voc_root_train"].files("unknown_class") == ["a.jpg"]
    with pytest.raises(ValueError, match="twice"):
        register_datasets(make_cfg(voc.root, CLASSES=["dog", "dog"]))


def test_registering_again_with_another_root_replaces(tmp_path, make_cfg):
    for name in ("first", "second"):
        folder = VocFolder(tmp_path / name)
        folder.add(name, [(f"class_{name}", 3, 4, 20, 25)])
        folder.split("train", [name])
        register_datasets(make_cfg(folder.root))
        assert [e["image_id"] for e in DatasetCatalog.get("voc_root_train")] == [name]
        assert MetadataCatalog.get("voc_root_train").thing_classes == [f"class_{name}"]


def test_official_names_are_ours_with_the_official_classes(tmp_path, make_cfg, monkeypatch):
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
    with pytest.raises(FileNotFoundError, match=r"VOC2012.*DETECTRON2_DATASETS"):
        register_datasets(make_cfg("", ("voc_2012_train",)))


def test_coco_json(coco_folder, make_cfg):
    json_path, images, _, _ = coco_folder
    keys = {"COCO_TRAIN_JSON": str(json_path), "COCO_TRAIN_IMAGES": str(images)}
    reports = register_datasets(make_cfg("", ("coco_json_train",), **keys))
    assert len(reports["coco_json_train"]) == 0
    metadata = MetadataCatalog.get("coco_json_train")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 18: 1}
    first, second = DatasetCatalog.get("coco_json_train")
    assert (first["image_id"], second["image_id"], second["annotations"]) == (3, 7, [])
    dog, crowd = first["annotations"]
    assert dog["bbox"] == [1, 2, 11, 22] and dog["category_id"] == 1 and dog["area"] == 150.0
    assert crowd["iscrowd"] == 1 and "area" not in crowd


def test_coco_problems_are_reported(coco_folder, make_cfg):
    json_path, images, content, write = coco_folder
    content["images"].append({"id": 9, "file_name": "gone.jpg", "width": 40, "height": 30})
    content["images"].append({"id": 3, "file_name": "b.jpg", "width": 40, "height": 30})
    content["images"][0]["width"] = 41
    content["annotations"] += [
        {"id": 3, "image_id": 3, "category_id": 99, "bbox": [1, 1, 2, 2]},
        {"id": 4, "image_id": 3, "category_id": 2, "bbox": [1, 1, 0, 2]},
        {"id": 5, "image_id": 3, "category_id": 2, "bbox": [1, 1, None, 2]},
        {"id": 6, "image_id": 3, "category_id": 2, "bbox": [90, 1, 4, 2]},
        {"id": 7, "image_id": 12345, "category_id": 2, "bbox": [1, 1, 4, 2]},
        {"id": 8, "image_id": 9, "category_id": 2, "bbox": [1, 1, 4, 2]},
    ]
    write()
    keys = {"COCO_TRAIN_JSON": str(json_path), "COCO_TRAIN_IMAGES": str(images)}
    report = register_datasets(make_cfg("", ("coco_json_train",), **keys))["coco_json_train"]
    assert report.counts() == {
        "missing_image": 2,
        "duplicate": 1,
        "size_mismatch": 1,
        "unknown_class": 1,
        "zero_area": 1,
        "bad_coordinates": 1,
        "box_outside": 1,
    }
    assert [e["image_id"] for e in DatasetCatalog.get("coco_json_train")] == [3]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"images": [], "annotations": []}', '{"images": [{"id": [1], "file_name": "a"}]}']
)
def test_what_is_not_coco_json_says_so(coco_folder, make_cfg, text):
    json_path, images, _, _ = coco_folder
    json_path.write_text(text)
    keys = {"COCO_TRAIN_JSON": str(json_path), "COCO_TRAIN_IMAGES": str(images)}
    with pytest.raises(ValueError, match="instances.json is not"):
        register_datasets(make_cfg("", ("coco_json_train",), **keys))


@pytest.mark.parametrize(
    "name, keys, error, says",
    [
        ("nonsense", {}, ValueError, "voc_root_<split>"),
        ("voc_2007_nonsense", {}, ValueError, "Unknown data set"),
        ("voc_root_train", {"VOC_ROOT": ""}, ValueError, "DATASETS.VOC_ROOT"),
        ("voc_root_train", {"VOC_ROOT": "/nowhere/at/all"}, FileNotFoundError, "/nowhere/at/all"),
        ("voc_root_nosuch", {}, FileNotFoundError, "nosuch.txt.*train"),
        ("coco_json_train", {}, ValueError, "DATASETS.COCO_TRAIN_JSON and DATASETS.COCO_TRAIN_IMAGES"),
        ("coco_2017_val", {}, FileNotFoundError, "instances_val2017.json.*DETECTRON2_DATASETS"),
        ("voc_root_train", {"ON_ERROR": "ignore"}, ValueError, "DATASETS.ON_ERROR"),
        ("voc_root_train", {"VERIFY_IMAGES": "yes"}, ValueError, "DATASETS.VERIFY_IMAGES"),
    ],
)
def test_what_is_missing_is_named(voc, make_cfg, monkeypatch, tmp_path, name, keys, error, says):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "empty"))
    voc.add("a")
    voc.split("train", ["a"])
    with pytest.raises(error, match=says) as caught:
        register_datasets(make_cfg(voc.root, (name,), **keys))
    assert "\n" not in str(caught.value)


def test_nothing_usable_is_an_error(voc, make_cfg):
    voc.add("a", xml="<annotation>")
    voc.split("train", ["a"])
    with pytest.raises(ValueError, match="no usable image"):
        register_datasets(make_cfg(voc.root))
