"""Damaged and hostile files that broke something once: each is one error message that names the file."""

import functools
import gzip
import io
import json
import os
import struct
import subprocess
import sys
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_model import ToyModel, make_toy, make_trainer, toy_config

from dfm_d2.classification.data.registration import _read_idx
from dfm_d2.data.catalog import distinct
from dfm_d2.data.images import ImageError, image_size, limit_bytes, read_image
from dfm_d2.data.problems import ProblemReport
from dfm_d2.detection.data.loader import read_test_item
from dfm_d2.detection.data.readers import read_coco
from dfm_d2.detection.detect_files import find_inputs
from dfm_d2.engine.checkpoint import SafeCheckpointer, class_names_of
from dfm_d2.engine.folder import last_checkpoint
from dfm_d2.engine.metrics import cut_back, read_metrics
from dfm_d2.engine.timm_models import _options, _read_file
from dfm_d2.errors import CheckpointError, UnsafeFileError, UserError
from dfm_d2.framework import LRScheduler, merge_config_file
from dfm_d2.visualize.boxes import draw_sheet

FUZZ = [sys.executable, str(Path(__file__).with_name("fuzz.py"))]


def fuzz(*arguments: str) -> str:
    done = subprocess.run([*FUZZ, *arguments], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_fuzz_finds_what_is_planted_and_nothing_else():
    assert fuzz("--self-test") == "4 cases: 1 code runs, 1 crashes, 1 tracebacks, 1 hangs"
    assert fuzz("--seconds", "120").endswith("0 code runs, 0 crashes, 0 tracebacks, 0 hangs")


def test_images_of_other_formats_and_what_is_no_file_are_refused(tmp_path):
    Image.new("RGB", (4, 3)).save(picture := tmp_path / "a.jpg", "EPS")  # Pillow would start Ghostscript
    os.mkfifo(pipe := tmp_path / "b.jpg")
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"a.jpg .*cannot identify"):
            read(picture)
        with pytest.raises(ImageError, match=r"b.jpg .*a pipe"):
            read(pipe)
    assert find_inputs([str(tmp_path)]) == ([picture], [])
    Image.new("RGB", (4, 3)).save(picture, "JPEG")
    entry = {"file_name": str(picture), "image_id": "a", "height": 3, "width": 5}
    with pytest.raises(ImageError, match=r"has \(3, 4\) pixels, but had \(3, 5\)"):
        read_test_item(entry, toy_config())


BOMB = "a0: &a0 [1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40))


YAMLS = {BOMB: "aliases that make it more than 1000000 values", "SEED: &a [*a]": "or endless"}
YAMLS |= {"[" * 30_000: "too deep", "SEED: 2024-99-99": "cannot be read", 'SEED: "\\ud800"': "whole number"}
YAMLS |= {"#" * 1_000_001: "more than 1000000 characters", 'OUTPUT_DIR: "a\\ud800"': "cannot be printed"}


def test_yaml_bombs(tmp_path):
    for text, said in YAMLS.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=f"bad.yaml.*{said}"):
            merge_config_file(toy_config(), str(tmp_path / "bad.yaml"))


def test_images_have_a_limit_that_a_key_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 0)  # restored afterwards
    Image.new("RGB", (40, 50)).save(path := tmp_path / "a.png")
    limit_bytes(6000)
    assert read_image(path).shape == (50, 40, 3)
    limit_bytes(5994)
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="a.png .*more than 1998 pixels, .* DATASETS.MAX_BYTES"):
            read(path)


def test_idx_files_of_no_or_too_many_bytes(tmp_path):
    for shape, limit in (((5, 0, 0), 2**30), ((2, 2**15, 2**15), 2**30), ((5, 2, 2), 19)):
        header = bytes((0, 0, 8, 3)) + struct.pack(">3I", *shape)
        (tmp_path / "x").write_bytes(gzip.compress(header))
        said = f"x is not a whole idx file .*read are 1 to DATASETS.MAX_BYTES {limit} bytes"
        with pytest.raises(UserError, match=said):
            _read_idx(tmp_path / "x", 3, limit)


def test_coco_json_with_long_numbers_and_deep_lists(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10**399, 5]}
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [box]}
    content["categories"] = [{"id": 1, "name": "cat"}]
    (tmp_path / "x.json").write_text(json.dumps(content))
    entries, _ = read_coco(tmp_path / "x.json", [tmp_path], report := ProblemReport("x"), 0)
    assert entries[0]["annotations"] == [] and report.counts() == {"bad_coordinates": 1}
    (tmp_path / "x.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="x.json is not json"):
        read_coco(tmp_path / "x.json", [tmp_path], report, 0)


def test_names_of_classes_are_short_and_printable_and_may_have_a_dollar(tmp_path):
    for name in ("a" * 201, "\ud800", ""):
        with pytest.raises(UserError, match="A class has the name .* 1 to 200 printable characters"):
            distinct(["cat", name])
    draw_sheet(
        tmp_path / "x.png", [(np.zeros((9, 9, 3), np.uint8), [((1, 1, 5, 5), 0)])], distinct(["$\\frac{"])
    )


def test_damaged_metrics_and_what_is_no_last_checkpoint(tmp_path):
    path, good = tmp_path / "metrics.json", '{"iteration": 1, "lr": 0.5}\n'
    for line in ("[1]", "1", '{"iteration": "x"}', '{"iteration": null}', '{"lr": []}', "[" * 10**5, "x"):
        path.write_text(f"{good}{line}\n{good}")
        with pytest.raises(UserError, match=r"metrics.json: line 2 is damaged"):
            cut_back(path, 1)
        path.write_text(f"{good}\n{line}")  # as a kill may leave the last one
        assert read_metrics(path) == [{"iteration": 1, "lr": 0.5}]
    os.mkfifo(tmp_path / "last_checkpoint")
    assert last_checkpoint(str(tmp_path), resume=True) == ""


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_options_and_weights_of_timm(tmp_path, monkeypatch):
    for text in ("a=" + "[" * 30_000, "a=&x [*x]", "a=!!python/name:os.mkdir", "a=2024-99-99"):
        with pytest.raises(UserError, match="MODEL.TIMM.OPTIONS has 'a="):
            _options([text])
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "bad.pth")
    # Of timm 1.0.9.
    load = functools.partial(torch.load, weights_only=False)
    monkeypatch.setattr("timm.models.load_state_dict", load)
    with pytest.raises(UnsafeFileError, match="bad.pth is not a plain file"):
        _read_file("bad.pth")
    assert not Path("ran").exists()


PARAMETER = "predictors.0.0.weight"
NAN, REPEATED = torch.full((16, 12), float("nan")), torch.zeros(1).expand(2**40)
DAMAGE = [(("model", PARAMETER), value) for value in (NAN, REPEATED, "x", torch.eye(2).to_sparse())]
DAMAGE += [
    (("dfm_d2",), 1),
    (("dfm_d2", "class_names"), [1]),
    (("dfm_d2", "config"), BOMB),
    (("iteration",), "x"),
]
STATE = ("trainer", "optimizer", "state", PARAMETER)
DAMAGE += [((*STATE, "step"), None), ((*STATE, "exp_avg"), torch.zeros(3)), (STATE, {"a": 1})]
DAMAGE += [(("trainer", "rng"), {}), (("trainer", "data_position"), -1), (("trainer", "history"), {"a": [1]})]
DAMAGE += [(("trainer", "hooks", "LRScheduler", "last_epoch"), "x"), (("trainer",), [])]


def test_damaged_checkpoints(tmp_path):
    trainer = make_trainer(ToyModel())
    trainer.register_hooks([LRScheduler()])
    trainer.train(0, 1)
    path = str(tmp_path / "run.pth")
    SafeCheckpointer(trainer.model, str(tmp_path), trainer=trainer).save("run", iteration=0)
    whole = torch.load(path, weights_only=True)
    for place, value in DAMAGE:
        torch.save(whole, file := io.BytesIO())
        file.seek(0)
        content = torch.load(file, weights_only=True)
        functools.reduce(getitem, place[:-1], content)[place[-1]] = value
        torch.save(content, path)
        model = make_toy()
        again = make_trainer(model)
        again.register_hooks([LRScheduler()])
        with pytest.raises(CheckpointError, match="run.pth"):
            class_names_of(path)
            SafeCheckpointer(model, cfg=toy_config(), trainer=again).load(path)
    torch.save({"model": whole["model"]}, path)
    with pytest.raises(CheckpointError, match="run.pth has no trainer, which a run continues from"):
        SafeCheckpointer(model, trainer=again).load(path)
