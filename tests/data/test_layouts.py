"""Folders in any layout: the same set is read from each, and what is wrong with one is one message."""

import json
import logging
from pathlib import Path

import pytest
from data_helpers import VocFolder, make_cfg, pixels_of
from PIL import Image

from dfm_d2.detection.data.overview import choose, register_and_show
from dfm_d2.detection.data.registration import register_datasets
from dfm_d2.detection.from_config import detector_arguments
from dfm_d2.errors import UserError
from dfm_d2.framework import DatasetCatalog, MetadataCatalog

SIZE, NAMES = (64, 32), ["cat", "dog"]
# {split: {name of an image: its boxes (class, x0, y0, x1, y1)}}
BOXES = {
    "train": {"1": [(1, 4, 8, 20, 24), (0, 0, 0, 64, 32)], "2": [], "3": [(0, 8, 2, 24, 18)]},
    "val": {"4": [(1, 32, 16, 64, 32)]},
}


def save(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of(int(name), SIZE)).save(folder / f"{name}.jpg")


def write_voc(root):
    voc = VocFolder(root)
    for split, images in BOXES.items():
        voc.split(split, [*images])
        for name, boxes in images.items():
            voc.add(name, [(NAMES[k], x0 + 1, y0 + 1, x1, y1) for k, x0, y0, x1, y1 in boxes], SIZE)


def write_coco(root, json_of, images_of, categories=()):
    """json_of, images_of: paths below root, for a split."""
    categories = [*categories, *({"id": k + 1, "name": name} for k, name in enumerate(NAMES))]
    for split, images in BOXES.items():
        content = {"categories": categories, "images": [], "annotations": []}
        for name, boxes in images.items():
            save(root / images_of.format(split), name)
            content["images"].append({"id": int(name), "file_name": f"{name}.jpg"})
            for k, x0, y0, x1, y1 in boxes:
                found = {"image_id": int(name), "category_id": k + 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                content["annotations"].append(found)
        (root / json_of.format(split)).parent.mkdir(parents=True, exist_ok=True)
        (root / json_of.format(split)).write_text(json.dumps(content))


def yolo_line(k, x0, y0, x1, y1):
    return f"{k} {(x0 + x1) / 128} {(y0 + y1) / 64} {(x1 - x0) / 64} {(y1 - y0) / 32}\n"


def write_yolo(root, folder="{1}/{0}", data_yaml="names: [cat, dog]\nval: ../val/images", sets=BOXES):
    """folder: path below root of {0} "images" or "labels" and {1} a split."""
    for split, images in sets.items():
        labels = root / folder.format("labels", split)
        labels.mkdir(parents=True)
        for name, boxes in images.items():
            save(root / folder.format("images", split), name)
            if boxes:  # no file is no object
                (labels / f"{name}.txt").write_text("".join(yolo_line(*box) for box in boxes))
    (root / "data.yaml").write_text(data_yaml)


PROJECT = [{"id": 0, "name": "pets", "supercategory": "none"}]
PATHS = "path: /sets\ntrain: images/trainx\nval: images/valx\nnames: [cat, dog]"
WRITE = {
    "coco": lambda r: write_coco(r, "annotations/instances_{}2017.json", "{}2017"),
    "coco_one_folder": lambda r: write_coco(r, "annotations/{}.json", "images"),
    "roboflow": lambda r: write_coco(r, "{}/_annotations.coco.json", "{}", PROJECT),
    "yolo_by_split": lambda r: write_yolo(r, "{1}/{0}"),
    "yolo_by_kind": lambda r: write_yolo(r, "{0}/{1}", "names: {1: dog, 0: cat}"),
    "yolo_elsewhere": lambda r: write_yolo(r, "sets/{0}/{1}x", PATHS),
}


def read(root, out):
    """{name of an image: what is known of it but its path and id} of both splits, and the classes."""
    cfg = make_cfg(root, ("root_train",), ("root_test",))
    cfg.OUTPUT_DIR, sets = str(out), {}
    register_datasets(cfg)
    for name in ("root_train", "root_test"):
        sets[name] = {Path(entry["file_name"]).stem: dict(entry) for entry in DatasetCatalog.get(name)}
        for entry in sets[name].values():
            del entry["file_name"], entry["image_id"]
    return sets, MetadataCatalog.get("root_train").thing_classes


@pytest.mark.parametrize("layout", WRITE)
def test_a_set_is_the_same_in_every_layout(tmp_path, layout):
    write_voc(tmp_path / "voc")
    WRITE[layout](tmp_path / layout)
    expected, found = (read(tmp_path / name, tmp_path / "out") for name in ("voc", layout))
    assert found == expected and found[1] == NAMES and not (tmp_path / "out").exists()
    assert found[0]["root_train"]["3"]["annotations"][0]["bbox"] == [8, 2, 24, 18]


def test_polygons_and_a_set_without_splits_that_a_resume_divides_as_before(tmp_path):
    images, out = {str(n): [(0, 1, 1, 9, 9)] for n in range(10)}, tmp_path / "out"
    write_yolo(tmp_path / "flat", "{0}", "names: [cat]", {"train": images})
    (tmp_path / "flat/labels/1.txt").write_text("0 .25 .5 .5 .25 .75 1\n")
    rename(tmp_path / "flat/images", ("1.jpg", "1.JPG"))
    (first, _), (again, _) = (read(tmp_path / "flat", out) for _ in range(2))
    assert first == again and (len(first["root_train"]), len(first["root_test"])) == (8, 2)
    both = first["root_train"] | first["root_test"]
    assert len(both) == 10 and both["1"]["annotations"][0]["bbox"] == [16, 8, 48, 32]
    record = json.loads((out / "split.json").read_text())
    assert {Path(name).stem for name in record["held_out"]} == set(first["root_test"])
    (out / "split.json").write_text(json.dumps({**record, "held_out": ["5.jpg"]}))
    assert set(read(tmp_path / "flat", out)[0]["root_test"]) == {"5"}
    for damaged in ("[", "[" * 100_000):
        (out / "split.json").write_text(damaged)
        with pytest.raises(UserError, match="split.json is damaged: remove it"):
            read(tmp_path / "flat", out)


BAD_LINES = {
    "2 .5 .5 .1 .1": "the line '2 .5 .5 .1 .1' has a class beyond the 2 names of data.yaml",
    "0 40 20 9 9": "the line '0 40 20 9 9' goes beyond 0 to 1: it must be 'class cx cy width height'",
    "0 -.5 .5 .1 .1": "goes beyond 0 to 1",
    "cat .5 .5 .1 .1": "is not numbers",
    "0 .5 nan .1 .1": "is not numbers",
    "0 .5 .5 .1": "has 4 numbers",
    "0 .5 .5 0 .1": "zero area",
}


@pytest.mark.parametrize("label, says", BAD_LINES.items())
def test_a_bad_line_is_reported_and_fatal_where_nothing_is_left(tmp_path, caplog, label, says):
    write_yolo(tmp_path / "set")
    (tmp_path / "set/train/labels/1.txt").write_text(f"0 .5 .5 .1 .1\n\n{label}\n")
    train = read(tmp_path / "set", tmp_path / "out")[0]["root_train"]
    assert len(train["1"]["annotations"]) == 1 and says in caplog.text
    for name in "13":
        (tmp_path / f"set/train/labels/{name}.txt").write_text(label)
    with pytest.raises(UserError, match="root_train has no usable box. First: 1.txt: ") as caught:
        read(tmp_path / "set", tmp_path / "out")
    assert says in str(caught.value)


def rename(root, *pairs):
    for old, new in pairs:
        (root / old).rename(root / new)


CODE = "a: !!python/object/apply:os.system ['false']"
WRONG = {
    "has none of the layouts that are read: VOC .* It holds data.yam, train, val.": lambda r: rename(
        r, ("data.yaml", "data.yam"), ("train/labels", "train/x"), ("val/labels", "val/x")
    ),
    "names: write one with, say, 'names": lambda r: (r / "data.yaml").write_text("nc: 2"),
    "data.yaml cannot be read": lambda r: (r / "data.yaml").write_text(CODE),
    "but no images": lambda r: rename(r, ("train/images", "train/x"), ("val/images", "val/x")),
    "has 3 images, none .* with labels: .*/1.txt, for one": lambda r: rename(r, ("train/labels", "x")),
    "more than 10000000 bytes": lambda r: (r / "data.yaml").write_bytes(b"#" * 10_000_001),
}


@pytest.mark.parametrize("says, spoil", WRONG.items())
def test_a_bad_folder_is_one_message(tmp_path, says, spoil):
    write_yolo(tmp_path / "set")
    spoil(tmp_path / "set")
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path / "set", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_what_was_found_is_said_and_shown_and_the_rest_is_chosen(tmp_path, caplog):
    full = {**BOXES["train"], "7": [(1, 0, 0, 4, 4)] * 30}
    write_yolo(tmp_path / "set", sets={**BOXES, "train": full})
    (tmp_path / "set/train/labels/gone.txt").write_text("")
    (tmp_path / "set/train/images/2.jpg").write_text("no image")
    cfg = make_cfg(tmp_path / "set", ("root_train",), ("root_test",))
    cfg.OUTPUT_DIR, cfg.MODEL.DFM.NUM_PROPOSALS, cfg.INPUT.MIN_SIZE_TRAIN = str(tmp_path / "out"), 0, ()
    cfg.MODEL.DFM.NUM_CLASSES = 2
    with pytest.raises(UserError, match="take the config.yaml that it wrote"):
        detector_arguments(cfg)
    with caplog.at_level(logging.INFO):
        register_and_show(cfg)
    for said in (
        "layout YOLO; train is 'train', test is 'val'",
        "0 images without boxes, none with more than 30; cat 2, dog 31",
        "4 x 4 px (7.jpg), 64 x 32 px (1.jpg); 2 problems",
        "gone.txt: has labels of no image",
        "NUM_PROPOSALS of MODEL.DFM 120, its SAMPLER 360, INPUT.MIN_SIZE_TRAIN (32, 32, 64), "
        "MIN_SIZE_TEST 64, MAX 128",
    ):
        assert said in caplog.text
    with Image.open(tmp_path / "out/dataset.png") as sheet:
        assert min(sheet.size) > 100


def test_sizes_suit_the_smallest_boxes_and_a_rare_class():
    def entry(sides, classes):
        boxes = [{"bbox": [0, 0, side, side], "category_id": k} for side, k in zip(sides, classes)]
        return {"height": 480, "width": 640, "annotations": boxes}

    cases = [
        ([100], [0], 192),
        ([100] * 8 + [20] * 2, [0] * 10, 480),
        ([100] * 30 + [40], [0] * 30 + [1], 288),
    ]
    for sides, classes, wanted in cases:
        cfg = make_cfg()
        cfg.INPUT.MIN_SIZE_TRAIN, before = (), cfg.MODEL.DFM.NUM_PROPOSALS
        choose(cfg, [entry(sides, classes)])
        assert cfg.INPUT.MIN_SIZE_TRAIN == (wanted - 32, wanted, cfg.INPUT.MIN_SIZE_TEST)
        assert cfg.MODEL.DFM.NUM_PROPOSALS == before
