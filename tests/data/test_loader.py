"""The stream is a pure function of (seed, position), no broken file ends an epoch, boxes move with pixels."""

import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_helpers import make_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dfm_d2.data import stream
from dfm_d2.data.images import ImageError, read_image
from dfm_d2.data.problems import DataProblemError
from dfm_d2.detection.data import loader
from dfm_d2.detection.data.loader import build_test_loader, build_train_loader
from dfm_d2.detection.data.registration import register_datasets
from dfm_d2.errors import UserError

NAMES = [f"im{'x' * i}" for i in range(7)]
RECIPE = {"MIN_SIZE_TRAIN": (20, 30), "MIN_SIZE_TRAIN_SAMPLING": "choice", "MAX_SIZE_TRAIN": 60}  # of INPUT
RECIPE |= {"RANDOM_FLIP": "none", "DETR_CROP": 0}
SEEDS, *SIZES = (st.integers(*ends) for ends in ((0, 2**32), (12, 90), (40, 120), (6, 30), (0, 30)))


@pytest.fixture
def cfg(voc):
    for number, name in enumerate(NAMES):
        voc.add(name, [("cat", 3, 4, 20, 25), ("dog", 8, 6, 30, 28)], size=(40 + number, 30))
    voc.split("train", NAMES)
    cfg = make_cfg(voc.root, test=("voc_root_train",), VERIFY_IMAGES="never")
    register_datasets(cfg)
    return cfg


def take(cfg, start, batches):
    """The items of some batches from a position on."""
    return list(itertools.chain.from_iterable(itertools.islice(build_train_loader(cfg, start), batches)))


def ids(items):
    return [item["image_id"] for item in items]


def assert_same(first, second):
    for one, two in zip(first, second, strict=True):
        assert one["image_id"] == two["image_id"] and torch.equal(one["image"], two["image"])
        one, two = one["instances"], two["instances"]
        assert torch.equal(one.gt_boxes.tensor, two.gt_boxes.tensor)
        assert torch.equal(one.gt_classes, two.gt_classes)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_position_equals_having_got_there(cfg, workers):
    cfg.INPUT.DETR_CROP, cfg.INPUT.CROP_RESIZE, cfg.INPUT.CROP_SIZE = 0.5, (26, 34), (16, 30)
    whole = take(cfg, 0, 11)
    for item in whole:
        assert set(item) == {"file_name", "image_id", "height", "width", "image", "instances"}
        image, found = item["image"], item["instances"]
        assert image.shape == (3, *found.image_size) and item["height"] == 30
        dtypes = image.dtype, found.gt_boxes.tensor.dtype, found.gt_classes.dtype
        assert dtypes == (torch.uint8, torch.float32, torch.int64)
    cfg.DATALOADER.NUM_WORKERS = workers
    for start in (0, 6, 13):
        assert_same(take(cfg, start, 4), whole[start : start + 8])


def test_the_seed_matters_and_global_generators_do_not(cfg):
    first = take(cfg, 0, 3)
    np.random.seed(9)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert_same(first, take(cfg, 0, 3))
    assert torch.equal(before, torch.get_rng_state())
    cfg.SEED = 6
    assert ids(take(cfg, 0, 3)) != ids(first)


def test_ranks_share_the_batches(cfg, monkeypatch):
    whole = take(cfg, 0, 3)
    monkeypatch.setattr(stream.comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(stream.comm, "get_rank", lambda rank=rank: rank)
        assert_same(take(cfg, 0, 3), whole[rank::2])
        shown = [item["image_id"] for batch in build_test_loader(cfg, "voc_root_train") for item in batch]
        assert shown == (NAMES[:4], NAMES[4:])[rank]
    cfg.SOLVER.IMS_PER_BATCH = 3
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH"):
        build_train_loader(cfg, 0)


def test_a_truncated_file_is_replaced_by_the_next_position_or_fatal(cfg, voc, caplog):
    order = ids(take(cfg, 0, 8))
    voc.truncate(order[1])
    with caplog.at_level(logging.WARNING):
        now = ids(take(cfg, 0, 7))
    assert now == [order[p + 1] if order[p] == order[1] else order[p] for p in range(14)]
    (message,) = [r.getMessage() for r in caplog.records]  # once, although it comes twice
    assert f"{order[1]}.jpg" in message
    left = [item["image_id"] for batch in build_test_loader(cfg, "voc_root_train") for item in batch]
    assert left == [name for name in NAMES if name != order[1]]
    cfg.DATASETS.ON_ERROR = "fatal"
    for batches in (build_train_loader(cfg, 0), build_test_loader(cfg, "voc_root_train")):
        with pytest.raises(DataProblemError, match=f"{order[1]}.jpg"):
            list(itertools.islice(batches, 7))
    cfg.DATASETS.ON_ERROR = "skip"
    for name in NAMES:
        voc.truncate(name)
    with pytest.raises(DataProblemError, match="Not one training image"):  # an error, not an endless loop
        take(cfg, 0, 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [UserError("the tar has changed"), OSError(5, "torn", "a.tar")])
def test_what_a_worker_says_to_the_user_is_one_line(cfg, error, workers):
    """DataLoader puts a traceback into the message of what a worker raises."""

    def make(entry, *rng):
        raise error

    cfg.DATALOADER.NUM_WORKERS = workers
    training = stream.train_batches(stream.SampleStream([{}], 0, make), cfg, 0)
    for batches in (training, stream.TestLoader([{}], make, cfg)):
        with pytest.raises(UserError) as caught:
            next(iter(batches))
        assert str(caught.value) in ("the tar has changed", "a.tar: torn.")


def test_difficult_objects_and_empty_images(voc):
    difficult = ("cat", 3, 4, 20, 25, 1)
    voc.split("train", {"a": [difficult, "cat"], "bb": [difficult], "ccc": []})
    cfg = make_cfg(voc.root, CLASSES=["cat"])
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    register_datasets(cfg)
    counts = {item["image_id"]: len(item["instances"]) for item in take(cfg, 0, 2)}
    assert counts == {"a": 1, "bb": 0, "ccc": 0}
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert set(ids(take(cfg, 0, 2))) == {"a"}
    voc.split("train", ["ccc"])
    register_datasets(cfg)
    with pytest.raises(UserError, match="no image to train on"):
        build_train_loader(cfg, 0)


def test_test_loader_shows_all_in_order_resized_with_original_sizes(cfg):
    cfg.TEST.BATCH_SIZE, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 3, 60, 1000
    test_loader = build_test_loader(cfg, "voc_root_train")
    for _ in range(2):  # it can be gone through again
        batches = list(test_loader)
        assert len(test_loader) == 3 and [len(batch) for batch in batches] == [3, 3, 1]
        items = sum(batches, [])
        assert ids(items) == NAMES
        assert all(item["image"].shape[1] == 60 and item["height"] == 30 for item in items)


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


@st.composite
def images_with_a_box(draw):
    """A white rectangle, which is found again after a transformation."""
    height, width = draw(st.integers(12, 60)), draw(st.integers(12, 60))
    x0, y0 = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
    x1, y1 = draw(st.integers(x0 + 6, width)), draw(st.integers(y0 + 6, height))
    image = np.zeros((height, width, 3), np.uint8)
    image[y0:y1, x0:x1] = 255
    return image, np.array([[x0, y0, x1, y1]], dtype=np.float64)


def extent(image):
    rows, columns = np.nonzero(image[:, :, 0] > 127)
    return np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], dtype=np.float64)


@settings(deadline=None)
@given(images_with_a_box(), st.sampled_from(["horizontal", "vertical"]), SEEDS, *SIZES)
def test_mirroring_resizing_and_cropping_move_the_box(sample, direction, seed, short, longest, low, more):
    image, boxes = sample
    mirrored, moved = loader.mirror(image, boxes, direction)
    np.testing.assert_array_equal(extent(mirrored), moved)
    for again, original in zip(loader.mirror(mirrored, moved, direction), sample):
        np.testing.assert_array_equal(again, original)
    resized, moved = loader.resize_shortest_edge(image, boxes, short, longest)
    assert max(resized.shape[:2]) <= max(longest, short)
    assert np.abs(extent(resized) - moved).max() <= 1.0
    assert (moved <= np.array([resized.shape[1], resized.shape[0]] * 2) + 1e-9).all()
    cropped, moved = loader.random_crop(image, boxes, np.random.default_rng(seed), (low, low + more))
    for side, original in zip(cropped.shape[:2], image.shape[:2]):
        assert min(low, original) <= side <= min(low + more, original)
    moved, kept = loader.clip_and_drop(moved, *cropped.shape[:2])
    assert len(kept) == bool(cropped.any())
    if len(kept):
        np.testing.assert_array_equal(extent(cropped), moved)


@settings(max_examples=50, deadline=None)
@given(images_with_a_box(), SEEDS)
def test_augment_is_a_function_of_its_generator_and_boxes_stay_inside(sample, seed):
    image, boxes = sample
    inputs = SimpleNamespace(**RECIPE | {"MIN_SIZE_TRAIN": (20, 30, 40), "RANDOM_FLIP": "horizontal"})
    inputs.DETR_CROP, inputs.CROP_RESIZE, inputs.CROP_SIZE = 0.5, (24, 40), (10, 30)
    runs = [loader.augment(image, boxes, np.random.default_rng(seed), inputs) for _ in range(2)]
    for first, second in zip(*runs):
        np.testing.assert_array_equal(first, second)
    moved, kept = runs[0][1:]
    assert len(moved) == len(kept) <= 1
    assert (moved >= 0).all() and (moved[:, 2:] - moved[:, :2] >= 1).all()


def test_sizes_are_drawn_from_a_choice_or_a_range_and_are_of_the_shortest_edge():
    image, boxes = np.zeros((40, 50, 3), np.uint8), np.zeros((0, 4))
    for sampling, seen in (("choice", {20, 30}), ("range", set(range(20, 31)))):
        rng = np.random.default_rng(0)
        inputs = SimpleNamespace(**RECIPE | {"MIN_SIZE_TRAIN_SAMPLING": sampling})
        runs = [loader.augment(image, boxes, rng, inputs)[0] for _ in range(200)]
        assert {run.shape[0] for run in runs} == seen
    assert loader.shortest_edge_size(480, 640, 800, 1333) == (800, 1067)
    assert loader.shortest_edge_size(100, 400, 800, 1333) == (333, 1333)
    assert loader.shortest_edge_size(1, 1000, 20, 100) == (1, 100)


def test_boxes_that_a_crop_leaves_nothing_of_are_dropped_with_their_index():
    boxes = np.array([[-9, 0, -2, 5], [2, 2, 8, 8], [9.5, 2, 30, 8]], dtype=np.float64)
    kept_boxes, kept = loader.clip_and_drop(boxes, 10, 10)
    assert kept.tolist() == [1] and kept_boxes.tolist() == [[2, 2, 8, 8]]
