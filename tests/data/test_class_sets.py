"""Image sets of classifiers: every source, the stream, and what is broken."""

import gzip
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import make_cfg, make_tar, pixels_of, write_idx

from dfm_d2.classification.data.loader import build_class_test_loader, build_class_train_loader, shifted
from dfm_d2.classification.data.registration import read_root, read_torchvision, register_class_sets
from dfm_d2.errors import UserError
from dfm_d2.framework import DatasetCatalog, MetadataCatalog


def class_cfg(root="", **keys):
    cfg = make_cfg(root, **{"train": ("root_train",), "test": ("root_test",), **keys})
    cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP, cfg.SOLVER.IMS_PER_BATCH = "RGB", "none", 3
    return cfg


def test_a_tar_s_links_and_later_members_are_read_and_two_roots_refused(folder):
    """Hard links are stored once; `tar -r` adds a newer member of the same name."""
    link = tarfile.TarInfo("set/train/class9/link.png")
    link.type, link.linkname = tarfile.LNKTYPE, "set/train/class9/1.png"
    path = make_tar(folder)
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
        tar.add(folder / "train/class9/3.png", "set/train/class9/0.png")
    found = {sample.image_id: sample.read() for sample in read_root(path, "train")}
    assert len(found) == 9 and np.array_equal(found["class9/link.png"], pixels_of(1))
    assert np.array_equal(found["class9/0.png"], pixels_of(3))
    with tarfile.open(path, "a") as tar:
        tar.add(folder / "train/class9/0.png", "other/train/class9/0.png")
    with pytest.raises(UserError, match="set/train/class9/0.png and .*set.tar:other/.* are one image"):
        read_root(path, "train")


def test_idx_files_that_are_damaged_or_do_not_go_together_are_named(tmp_path):
    write_idx(tmp_path, "train", 20)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole, other_type = path.read_bytes(), gzip.compress(b"\x00\x00\x0b\x03" + bytes(12))
    short = whole[:30], whole[:3], gzip.decompress(whole)[:30]
    says = dict.fromkeys(short, f"{path.name} is not a whole idx file")
    for content, said in {**says, other_type: "magic number is 00000b03"}.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_root(tmp_path, "train")
    write_idx(tmp_path, "train", 7, labels=6)
    with pytest.raises(UserError, match="has 7 images, .* 6 labels"):
        read_root(tmp_path, "train")
    write_idx(tmp_path, "other", 7)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    says = {split: f"no idx files of the split {split}, only .'other', 'train'" for split in ("test", "val")}
    for split, said in {**says, "train": "has no labels train-labels-idx1-ubyte.gz"}.items():
        with pytest.raises(UserError, match=said):
            read_root(tmp_path, split)


def test_a_missing_cifar_says_what_to_do(tmp_path, monkeypatch):
    def no_network(url, root, **_):
        Path(root).mkdir(exist_ok=True)  # as torchvision does
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    for root in (tmp_path, tmp_path / "new"):
        with pytest.raises(UserError, match="cifar100 is not in .* could not be downloaded"):
            read_torchvision("cifar100", root, "train")
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_the_stream_flips_and_shifts_by_the_position_and_fills_with_zeros(folder):
    cfg = class_cfg(folder)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.RANDOM_SHIFT = "horizontal", 2
    register_class_sets(cfg)
    batches, later = build_class_train_loader(cfg, 0), next(build_class_train_loader(cfg, 6))
    items = [item for _ in range(20) for item in next(batches)]
    assert all(torch.equal(one["image"], two["image"]) for one, two in zip(later, items[6:]))
    seen = {item["image"].numpy().tobytes() for item in items if item["image_id"] == "class9/0.png"}
    image, moves = pixels_of(0), itertools.product((1, -1), range(-2, 3), range(-2, 3))
    known = {shifted(image[:, ::step], *by).transpose(2, 0, 1).tobytes() for step, *by in moves}
    assert len(seen) > 4 and seen <= known
    cfg.INPUT.RANDOM_SHIFT = 5
    with pytest.raises(UserError, match="INPUT.RANDOM_SHIFT is 5, but .* has 6 x 5 pixels"):
        next(build_class_train_loader(cfg, 0))
    down, left = shifted(image, 1, 0), shifted(image, 0, -2)
    assert np.array_equal(down[1:], image[:-1]) and not down[0].any()
    assert np.array_equal(left[:, :-2], image[:, 2:]) and not left[:, -2:].any()


def test_classes_in_natural_order_or_those_given_channels_size_and_format(folder):
    reports = register_class_sets(class_cfg(folder, CLASSES=["class10"]))
    assert reports["root_train"].counts() == {"unknown_class": 4}
    cfg = class_cfg(folder)
    register_class_sets(cfg)
    assert MetadataCatalog.get("root_test").thing_classes == ["class9", "class10"]
    assert [e["label"] for e in DatasetCatalog.get("root_test")] == [1, 1, 0, 0]

    def first_image():
        return next(iter(build_class_test_loader(cfg, "root_test")))[0]["image"].numpy().transpose(1, 2, 0)

    assert np.array_equal(first_image(), pixels_of(10))
    cfg.INPUT.FORMAT = "BGR"
    assert np.array_equal(first_image(), pixels_of(10)[..., ::-1])
    cfg.INPUT.IMAGE_SIZE = 12
    assert first_image().shape == (12, 12, 3)
    cfg.MODEL.PIXEL_MEAN, cfg.INPUT.FORMAT = [1.0], "RGB"
    assert first_image().shape == (12, 12, 1)


@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_image_is_named_and_replaced(folder, packed):
    broken = folder / "train/class9/2.png"
    broken.write_bytes(broken.read_bytes()[:50])
    root = make_tar(folder) if packed else folder
    name = f"{root}:set/train/class9/2.png" if packed else str(broken)
    with pytest.raises(UserError, match=f"1 problem: {name}"):
        register_class_sets(class_cfg(root, ON_ERROR="fatal"))
    cfg = class_cfg(root)
    (problem,) = register_class_sets(cfg)["root_train"].problems
    assert problem.file == name and len(DatasetCatalog.get("root_train")) == 7
    # A set too large to be verified meets it while training: another image takes its place.
    cfg.DATASETS.VERIFY_IMAGES = "never"
    register_class_sets(cfg)
    batches = build_class_train_loader(cfg, 0)
    seen = [item["image_id"] for _ in range(3) for item in next(batches)]
    assert len(seen) == 9 and "class9/2.png" not in seen


@pytest.mark.parametrize(
    "root, keys, says",
    [
        ("set.tar", {"train": ("root_val",)}, "has no image val/<class>/<image>"),
        ("set", {"train": ("root_val",)}, r"has no folder val \(there are: test, train\)"),
        ("set.tar.gz", {}, "set.tar.gz is not a plain tar"),
        ("nowhere", {}, "DATASETS.ROOT is .*nowhere, which is missing"),
        ("", {}, "root_train needs DATASETS.ROOT"),
        ("set", {"train": ("digits_val",)}, r"Unknown data set 'digits_val'.*digits_{train,test}"),
        ("set", {"CLASSES": ["a", "a"]}, "names a class twice"),
        ("set", {"CLASSES": ["class1"]}, "root_train has no usable image"),
        ("set", {"HOLD_OUT": 0.01}, "leaves no image to train on or none to set aside"),
    ],
)
def test_what_is_missing_is_named(folder, root, keys, says):
    make_tar(folder)
    make_tar(folder, "set.tar.gz", "w:gz")
    with pytest.raises(UserError, match=says):
        register_class_sets(class_cfg(root and folder.parent / root, **keys))
