"""Image sets of classifiers: every source, the stream, and what is broken."""

import gzip
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_classifier import classifier_cfg

from dfm_d2.classification.data.loader import (
    ClassStream,
    build_class_test_loader,
    build_class_train_loader,
    shifted,
)
from dfm_d2.classification.data.registration import HELD_OUT, register_class_sets
from dfm_d2.classification.data.sources import read_digits, read_idx, read_root, read_torchvision
from dfm_d2.framework import DatasetCatalog, MetadataCatalog


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 255, (6, 5, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for split, number in (("train", 4), ("test", 2)):
        for k, label in enumerate(("class9", "class10")):
            where = tmp_path / "set" / split / label
            where.mkdir(parents=True)
            for index in range(number):
                Image.fromarray(pixels(10 * k + index)).save(where / f"{index}.png")
    return tmp_path / "set"


@pytest.fixture
def archive(folder):
    path = folder.parent / "set.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "set")
    return path


def data_cfg(root="", train=("root_train",), test=("root_test",), **keys):
    cfg = classifier_cfg("DATALOADER.NUM_WORKERS", "0", "INPUT.FORMAT", "RGB", "INPUT.RANDOM_FLIP", "none")
    cfg.MODEL.PIXEL_MEAN = [1.0, 1.0, 1.0]
    cfg.DATASETS.ROOT, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = str(root), tuple(train), tuple(test)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 3, 5
    for key, value in keys.items():
        cfg.DATASETS[key] = value
    return cfg


def test_a_folder_and_a_tar_of_it_are_the_same(folder, archive):
    (one, _), (two, _) = read_root(folder, "train"), read_root(archive, "train")
    assert [s.class_name for s in one] == ["class10"] * 4 + ["class9"] * 4
    for a, b in zip(one, two, strict=True):
        assert (a.image_id, a.class_name) == (b.image_id, b.class_name)
        assert np.array_equal(a.read(), b.read())
    assert np.array_equal(one[1].read(), pixels(11))


def test_a_tar_s_links_and_later_members_are_read_and_two_roots_refused(folder, archive):
    """Hard links are stored once; `tar -r` adds a newer member of the same name."""
    link = tarfile.TarInfo("set/train/class9/link.png")
    link.type, link.linkname = tarfile.LNKTYPE, "set/train/class9/1.png"
    with tarfile.open(archive, "a") as tar:
        tar.addfile(link)
        tar.add(folder / "train/class9/3.png", "set/train/class9/0.png")
    found = {sample.image_id: sample for sample in read_root(archive, "train")[0]}
    assert len(found) == 9
    assert np.array_equal(found["class9/link.png"].read(), pixels(1))
    assert np.array_equal(found["class9/0.png"].read(), pixels(3))
    with tarfile.open(archive, "a") as tar:
        tar.add(folder / "train/class9/0.png", "other/train/class9/0.png")
    with pytest.raises(
        ValueError, match="set.tar:set/train/class9/0.png and .*set.tar:other/.* are one image"
    ):
        read_root(archive, "train")


def test_classes_are_in_natural_order_and_named(folder):
    cfg = data_cfg(folder)
    register_class_sets(cfg)
    assert MetadataCatalog.get("root_test").thing_classes == ["class9", "class10"]
    assert [e["label"] for e in DatasetCatalog.get("root_test")] == [1, 1, 0, 0]
    cfg = data_cfg(folder, CLASSES=["class10"])
    reports = register_class_sets(cfg)
    assert reports["root_train"].counts() == {"unknown_class": 4}


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, name: str, number: int):
    images = np.arange(number * 4, dtype=np.uint8).reshape(number, 2, 2)
    labels = (np.arange(number) % 3).astype(np.uint8)
    (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    (folder / f"{name}-labels-idx1-ubyte").rename(folder / f"{name}-labels-idx1-ubyte.gz")


def test_one_pair_of_idx_files_is_split_and_two_are_not(tmp_path):
    write_idx(tmp_path, "t10k", 20)
    (train, _), (test, _) = read_root(tmp_path, "train"), read_root(tmp_path, "test")
    assert (len(train), len(test)) == (16, 4)
    assert not {s.image_id for s in train} & {s.image_id for s in test}
    assert all(s.class_name == str(int(s.image_id) % 3) for s in train + test)
    assert train[0].read().shape == (2, 2, 1)
    write_idx(tmp_path, "train", 7)
    assert [len(read_root(tmp_path, split)[0]) for split in ("train", "test")] == [7, 20]


def test_a_damaged_idx_file_is_named(tmp_path):
    write_idx(tmp_path, "t10k", 20)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz is not a whole idx file"):
        read_root(tmp_path, "train")
    path.write_bytes(gzip.compress(b"\x00\x00\x0b\x03" + bytes(12)))
    with pytest.raises(ValueError, match="magic number is 00000b03"):
        read_idx(path, 3)


def test_the_digits_are_there():
    train, test = read_digits("train"), read_digits("test")
    assert (len(train), len(test)) == (1438, 359)
    assert train[0].read().shape == (8, 8, 1) and max(s.read().max() for s in train) == 240


def test_a_missing_cifar_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError, match="cifar100 is not in .* could not be downloaded"):
        read_torchvision("cifar100", tmp_path, "train")


def test_the_stream_is_a_function_of_the_position(folder):
    cfg = data_cfg(folder)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.RANDOM_SHIFT = "horizontal", 2
    register_class_sets(cfg)
    first, later = build_class_train_loader(cfg, 0), build_class_train_loader(cfg, 6)
    batch = next(iter(first))
    stream = ClassStream(DatasetCatalog.get("root_train"), cfg)
    items = [stream[position].item for position in range(16)]
    assert torch.equal(batch[2]["image"], items[2]["image"])
    assert torch.equal(next(iter(later))[1]["image"], items[7]["image"])
    for epoch in (items[:8], items[8:]):
        assert sorted(item["image_id"] for item in epoch) == sorted(
            f"class{k}/{i}.png" for k in (9, 10) for i in range(4)
        )
    assert [i["image_id"] for i in items[:8]] != [i["image_id"] for i in items[8:]]


@pytest.mark.parametrize(("shift", "seen"), [((1, 0), (0, 0)), ((0, -2), (0, 2))])
def test_a_shifted_image_is_filled_with_zeros(shift, seen):
    image = pixels(0)
    moved = shifted(image, *shift)
    down, right = max(shift[0], 0), max(shift[1], 0)
    assert np.array_equal(moved[down, right], image[seen])
    assert (moved == 0).sum() >= {(1, 0): 15, (0, -2): 36}[shift]


def test_channels_size_and_format(folder):
    cfg = data_cfg(folder)
    register_class_sets(cfg)
    item = next(iter(build_class_test_loader(cfg, "root_test")))[0]
    assert np.array_equal(item["image"].numpy().transpose(1, 2, 0), pixels(10))
    cfg.INPUT.FORMAT, cfg.INPUT.IMAGE_SIZE = "BGR", 12
    item = next(iter(build_class_test_loader(cfg, "root_test")))[0]
    assert item["image"].shape == (3, 12, 12)
    cfg.MODEL.PIXEL_MEAN, cfg.INPUT.FORMAT = [1.0], "RGB"
    item = next(iter(build_class_test_loader(cfg, "root_test")))[0]
    assert item["image"].shape == (1, 12, 12)


def test_what_is_held_out_is_not_trained_on(folder):
    cfg = data_cfg(folder, HOLD_OUT=0.25)
    register_class_sets(cfg)
    trained = {e["image_id"] for e in DatasetCatalog.get("root_train")}
    held_out = {e["image_id"] for e in DatasetCatalog.get(HELD_OUT)}
    assert (len(trained), len(held_out)) == (6, 2) and not trained & held_out
    with pytest.raises(ValueError, match="leaves no image to train on or none to fit"):
        register_class_sets(data_cfg(folder, HOLD_OUT=0.01))


@pytest.mark.parametrize("on_error", ["skip", "fatal"])
def test_a_broken_member_of_a_tar_is_named(folder, on_error):
    broken = folder / "train/class9/2.png"
    broken.write_bytes(broken.read_bytes()[:50])
    path = folder.parent / "set.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "set")
    cfg = data_cfg(path, ON_ERROR=on_error)
    name = f"{path}:set/train/class9/2.png"
    if on_error == "fatal":
        with pytest.raises(ValueError, match=name):
            register_class_sets(cfg)
        return
    report = register_class_sets(cfg)["root_train"]
    assert report.files() == [name] and len(DatasetCatalog.get("root_train")) == 7
    # A set too large to be verified meets it while training: another image takes its place.
    cfg.DATASETS.VERIFY_IMAGES = "never"
    register_class_sets(cfg)
    batches = build_class_train_loader(cfg, 0)
    seen = [item["image_id"] for _ in range(3) for item in next(batches)]
    assert len(seen) == 9 and "class9/2.png" not in seen


def test_a_compressed_tar_and_a_missing_split_are_one_sentence(folder, archive, tmp_path):
    with pytest.raises(ValueError, match="has no image val/<class>/<image>"):
        read_root(archive, "val")
    with pytest.raises(FileNotFoundError, match="has no folder val \\(there are: test, train\\)"):
        read_root(folder, "val")
    packed = tmp_path / "a.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, "set")
    with pytest.raises(ValueError, match="a.tar.gz is not a plain tar"):
        read_root(packed, "train")


def test_the_shared_sets(shared_data):
    mnist = shared_data("mnist_t10k")
    assert [len(read_root(mnist, split)[0]) for split in ("train", "test")] == [8000, 2000]
    tar = mnist.parent / "cifar10_jpg_12k.tar"
    assert [len(read_root(tar, split)[0]) for split in ("train", "test")] == [10000, 2000]
