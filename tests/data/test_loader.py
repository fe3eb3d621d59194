"""The stream is a pure function of (seed, position), and a broken file never ends an epoch."""

import itertools
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from dfm_d2.data import stream as loader_module
from dfm_d2.data.images import ImageError, read_image
from dfm_d2.data.problems import DataProblemError
from dfm_d2.detection.data.loader import build_test_loader, build_train_loader
from dfm_d2.detection.data.registration import register_datasets

NAMES = [f"im{'x' * i}" for i in range(7)]


@pytest.fixture
def cfg(voc, make_cfg):
    for number, name in enumerate(NAMES):
        voc.add(name, [("cat", 3, 4, 20, 25), ("dog", 8, 6, 30, 28)], size=(40 + number, 30))
    voc.split("train", NAMES)
    cfg = make_cfg(voc.root, test=("voc_root_train",), VERIFY_IMAGES="never")
    register_datasets(cfg)
    return cfg


def take(cfg, start, batches):
    return list(itertools.islice(build_train_loader(cfg, start), batches))


def assert_same(first, second):
    assert first["image_id"] == second["image_id"]
    assert torch.equal(first["image"], second["image"])
    assert torch.equal(first["instances"].gt_boxes.tensor, second["instances"].gt_boxes.tensor)
    assert torch.equal(first["instances"].gt_classes, second["instances"].gt_classes)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_position_equals_having_got_there(cfg, workers):
    cfg.INPUT.DETR_CROP, cfg.INPUT.CROP_RESIZE, cfg.INPUT.CROP_SIZE = 0.5, (26, 34), (16, 30)
    whole = [item for batch in take(cfg, 0, 12) for item in batch]
    cfg.DATALOADER.NUM_WORKERS = workers
    for start in (0, 6, 13):
        for offset, item in enumerate(item for batch in take(cfg, start, 4) for item in batch):
            if start + offset < len(whole):
                assert_same(item, whole[start + offset])


def test_each_epoch_shows_every_image_once_in_its_own_order(cfg):
    ids = [item["image_id"] for batch in take(cfg, 0, 14) for item in batch]
    epochs = [ids[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == sorted(NAMES) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_the_seed_matters_and_global_generators_do_not(cfg):
    first = take(cfg, 0, 3)
    np.random.seed(9)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    second = take(cfg, 0, 3)
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(itertools.chain(*first), itertools.chain(*second)):
        assert_same(a, b)
    cfg.SEED = 6
    third = take(cfg, 0, 3)
    assert [i["image_id"] for b in third for i in b] != [i["image_id"] for b in first for i in b]


def test_ranks_share_the_batches(cfg, monkeypatch):
    whole = take(cfg, 0, 3)
    monkeypatch.setattr(loader_module.comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(loader_module.comm, "get_rank", lambda rank=rank: rank)
        for batch, mine in zip(whole, take(cfg, 0, 3)):
            assert_same(batch[rank], mine[0])
    cfg.SOLVER.IMS_PER_BATCH = 3
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH"):
        build_train_loader(cfg, 0)


def test_items_are_detectrons(cfg):
    (item, _) = next(build_train_loader(cfg, 0))
    assert set(item) == {"file_name", "image_id", "height", "width", "image", "instances"}
    assert item["image"].dtype == torch.uint8 and item["image"].shape[0] == 3
    assert item["instances"].image_size == tuple(item["image"].shape[1:])
    assert item["instances"].gt_classes.dtype == torch.int64
    assert item["instances"].gt_boxes.tensor.dtype == torch.float32 and item["height"] == 30


def test_a_truncated_file_is_replaced_by_the_next_position(cfg, voc, caplog):
    order = [item["image_id"] for batch in take(cfg, 0, 8) for item in batch]
    voc.truncate(order[1])
    with caplog.at_level(logging.WARNING):
        now = [item["image_id"] for batch in take(cfg, 0, 7) for item in batch]
    assert now == [order[p + 1] if order[p] == order[1] else order[p] for p in range(14)]
    messages = [r.getMessage() for r in caplog.records if r.name == "dfm_d2.detection.data.loader"]
    assert len(messages) == 1 and f"{order[1]}.jpg" in messages[0]


def test_a_truncated_file_is_fatal_if_asked(cfg, voc):
    voc.truncate(NAMES[3])
    cfg.DATASETS.ON_ERROR = "fatal"
    with pytest.raises(DataProblemError, match=f"{NAMES[3]}.jpg"):
        take(cfg, 0, 7)


def test_verification_finds_a_truncated_file_before_training(cfg, voc):
    voc.truncate(NAMES[3])
    cfg.DATASETS.VERIFY_IMAGES = "auto"
    report = register_datasets(cfg)["voc_root_train"]
    assert report.files("broken_image") == [f"{NAMES[3]}.jpg"]


def test_no_readable_image_is_an_error_not_a_loop(cfg, voc):
    for name in NAMES:
        voc.truncate(name)
    with pytest.raises(DataProblemError, match="Not one training image"):
        take(cfg, 0, 1)


def test_difficult_objects_and_empty_images(voc, make_cfg):
    voc.add("a", [("cat", 3, 4, 20, 25, 1), ("cat", 5, 6, 22, 27)])
    voc.add("bb", [("cat", 3, 4, 20, 25, 1)])
    voc.add("ccc", [])
    voc.split("train", ["a", "bb", "ccc"])
    cfg = make_cfg(voc.root)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    register_datasets(cfg)
    counts = {i["image_id"]: len(i["instances"]) for batch in take(cfg, 0, 2) for i in batch}
    assert counts == {"a": 1, "bb": 0, "ccc": 0}
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert {i["image_id"] for batch in take(cfg, 0, 2) for i in batch} == {"a"}
    voc.split("train", ["ccc"])
    cfg.DATASETS.CLASSES = ["cat"]
    register_datasets(cfg)
    with pytest.raises(ValueError, match="no image to train on"):
        build_train_loader(cfg, 0)


def test_test_loader_shows_all_in_order_resized_with_original_sizes(cfg):
    cfg.TEST.BATCH_SIZE, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 3, 60, 1000
    test_loader = build_test_loader(cfg, "voc_root_train")
    batches = list(test_loader)
    assert len(test_loader) == 3 and [len(batch) for batch in batches] == [3, 3, 1]
    items = [item for batch in batches for item in batch]
    assert [item["image_id"] for item in items] == NAMES
    assert all(item["image"].shape[1] == 60 and item["height"] == 30 for item in items)
    assert list(test_loader)[0][0]["image_id"] == NAMES[0]  # it can be gone through again


def test_test_loader_leaves_out_what_it_cannot_read(cfg, voc):
    voc.truncate(NAMES[1])
    assert [i["image_id"] for b in build_test_loader(cfg, "voc_root_train") for i in b] == [
        name for name in NAMES if name != NAMES[1]
    ]
    cfg.TEST.BATCH_SIZE = 0
    with pytest.raises(ValueError, match="TEST.BATCH_SIZE"):
        build_test_loader(cfg, "voc_root_train")


def test_channel_order_and_orientation(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels[::-1, ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", "BGR"), pixels[::-1, ::-1, ::-1])
    Image.new("L", (3, 3), 7).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (3, 3, 3)
    deep = np.array([[0, 257 * 7], [257 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[..., 1].tolist() == [[0, 7], [200, 255]]
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match="float.tiff cannot be decoded .floating-point pixels"):
        read_image(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="INPUT.FORMAT"):
        read_image(tmp_path / "a.png", "YUV")
