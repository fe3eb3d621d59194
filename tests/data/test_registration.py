"""Which names mean which files, and what a missing one says."""

import pytest
from data_helpers import VocFolder, make_cfg

from dfm_d2.detection.data.registration import VOC_CLASSES, register_datasets
from dfm_d2.errors import UserError
from dfm_d2.framework import DatasetCatalog, MetadataCatalog


def test_classes_come_from_all_training_splits_or_the_config_and_rule_the_test_set(voc):
    for split, objects in (("one", ["dog"]), ("two", ["cat"]), ("val", ["cow", "dog"])):
        voc.split(split, {split: objects})
    cfg = make_cfg(voc.root, ("voc_root_one", "voc_root_two"), ("voc_root_val",))
    # Registering again replaces what was there.
    for classes, indices, unknown in ((["cat", "dog"], [1], 1), (["cow", "dog", "cat"], [0, 1], 0)):
        cfg.DATASETS.CLASSES = classes if unknown == 0 else []
        report = register_datasets(cfg)["voc_root_val"]
        metadata, (entry,) = MetadataCatalog.get("voc_root_val"), DatasetCatalog.get("voc_root_val")
        assert metadata.thing_classes == classes
        assert [target["category_id"] for target in entry["annotations"]] == indices
        assert [(p.file, p.kind) for p in report.problems] == [("val.jpg", "unknown_class")] * unknown
    assert (entry["width"], entry["height"]) == (40, 30)


def test_official_names_are_ours_with_the_official_classes(tmp_path, voc, monkeypatch):
    folder = VocFolder(tmp_path / "VOC2007")
    folder.split("trainval", {"000005": ["chair"]})
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_datasets(make_cfg("", ("voc_2007_trainval",)))
    (entry,), metadata = DatasetCatalog.get("voc_2007_trainval"), MetadataCatalog.get("voc_2007_trainval")
    assert entry["annotations"][0]["category_id"] == VOC_CLASSES.index("chair") == 8
    assert metadata.thing_classes == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert (metadata.year, metadata.split, metadata.dirname) == (2007, "trainval", str(folder.root))
    voc.split("train", {"a": ["cat"]})
    with pytest.raises(UserError, match="have different classes: set DATASETS.CLASSES"):
        register_datasets(make_cfg(voc.root, ("voc_2007_trainval", "voc_root_train")))


def test_coco_json_with_ids_in_rising_order(coco):
    report = register_datasets(coco[1]())["coco_json_train"]
    metadata = MetadataCatalog.get("coco_json_train")
    assert not report.problems and metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 18: 1}
    first, second = DatasetCatalog.get("coco_json_train")
    assert (first["image_id"], second["image_id"], second["annotations"]) == (3, 7, [])
    dog, crowd = first["annotations"]
    assert dog["bbox"] == [1, 2, 11, 22] and dog["category_id"] == 1 and dog["area"] == 150.0
    assert crowd["iscrowd"] == 1 and "area" not in crowd


def test_coco_problems_are_reported(coco):
    content, write = coco
    for number, name in ((9, "gone.jpg"), (3, "b.jpg")):
        content["images"].append({"id": number, "file_name": name, "width": 40, "height": 30})
    content["images"][0]["width"] = 41
    boxes = [[1, 1, 0, 2], [1, 1, None, 2], [1, 1, True, 2], [1, 1, 4], [90, 1, 4, 2]]
    others = [(3, 99, [1] * 4), (12345, 2, [1] * 4), (9, 2, [1] * 4)]
    for image, category, box in [*others, *((3, 2, box) for box in boxes)]:
        content["annotations"].append({"image_id": image, "category_id": category, "bbox": box})
    report = register_datasets(write())["coco_json_train"]
    once = ("duplicate", "size_mismatch", "unknown_class", "zero_area", "box_outside")
    assert report.counts() == {"bad_coordinates": 3, "missing_image": 2, **dict.fromkeys(once, 1)}
    (entry,) = DatasetCatalog.get("coco_json_train")
    assert entry["image_id"] == 3 and len(entry["annotations"]) == 2


EMPTY = '{"images": [], "annotations": []'
CATEGORIES = EMPTY + ', "categories": [{"id": 1, "name": "a"}, {"id": %d, "name": "%s"}]}'
NOT_COCO = {
    "{": "is not json",
    "[]": 'has no list "images"',
    EMPTY + "}": 'has no list "categories"',
    '{"images": [{"id": [1], "file_name": "a"}]}': r"images.0. needs id .int. and file_name .str.",
    **dict.fromkeys((CATEGORIES % (1, "b"), CATEGORIES % (2, "a")), "two categories of one id or name"),
}


@pytest.mark.parametrize("text, says", NOT_COCO.items())
def test_what_is_not_coco_json_says_so(coco, text, says):
    with pytest.raises(UserError, match=f"instances.json .*{says}"):
        register_datasets(coco[1](text))


@pytest.mark.parametrize(
    "name, keys, says",
    [
        ("nonsense", {}, "Unknown data set 'nonsense'.*voc_root_<split>"),
        ("voc_2007_nonsense", {}, "Unknown data set"),
        ("voc_root_train", {"ROOT": ""}, "needs DATASETS.ROOT"),
        ("root_train", {"ROOT": ""}, "needs DATASETS.ROOT"),
        ("voc_root_train", {"ROOT": "", "VOC_ROOT": "/nowhere/at/all"}, "/nowhere/at/all, which is missing"),
        ("root_train", {"ROOT": "/nowhere/at/all"}, "/nowhere/at/all, which is missing"),
        (
            "root_train",
            {"VOC_ROOT": "/nowhere"},
            "and its alias DATASETS.VOC_ROOT /nowhere differ: set one",
        ),
        ("root_nosuch", {}, "has no split nosuch but broken, train, test: name one"),
        ("voc_root_nosuch", {}, "nosuch.txt, which is missing.*train"),
        ("voc_root_broken", {}, "no usable image"),
        ("voc_root_train", {"CLASSES": ["dog", "dog"]}, "twice"),
        ("voc_2012_train", {}, "VOC2012.*DETECTRON2_DATASETS"),
        ("coco_json_train", {}, "DATASETS.COCO_TRAIN_JSON and DATASETS.COCO_TRAIN_IMAGES"),
        ("coco_2017_val", {}, "instances_val2017.json.*DETECTRON2_DATASETS"),
    ],
)
def test_what_is_missing_is_named(voc, monkeypatch, tmp_path, name, keys, says):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "empty"))
    voc.split("train", {"a": ["cat"]})
    voc.split("broken", ["no_annotation"])
    with pytest.raises(UserError, match=says) as caught:
        register_datasets(make_cfg(voc.root, (name,), **keys))
    assert "\n" not in str(caught.value)
