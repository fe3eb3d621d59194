"""Checkpoints: whole or not there, nothing in them is run, and what does not fit is said."""

import os
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from toy_model import ToyModel, make_toy, toy_config

from dfm_d2 import __version__
from dfm_d2.data.files import write_atomically
from dfm_d2.detection.detector import FlowDetector
from dfm_d2.engine import checkpoint as checkpoint_module
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.errors import CheckpointError, UnsafeFileError
from dfm_d2.framework import PROVIDER


def test_a_round_trip_and_what_it_says_about_itself(tmp_path):
    model, twin, cfg = ToyModel(), ToyModel(), toy_config()
    SafeCheckpointer(model, str(tmp_path), class_names=["a", "b"], cfg=cfg).save("one", iteration=4, ema={})
    extra = SafeCheckpointer(twin, str(tmp_path), class_names=["a", "b"]).resume_or_load("ignored")
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert extra["iteration"] == 4 and "ema" in extra  # which earlier versions saved
    about = {"version": __version__, "provider": PROVIDER, "class_names": ["a", "b"], "config": cfg.dump()}
    assert extra["dfm_d2"] == about
    assert (tmp_path / "last_checkpoint").read_text() == "one.pth"


def test_a_write_that_fails_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    checkpointer = SafeCheckpointer(ToyModel(), str(tmp_path))
    checkpointer.save("model")
    before, torch_save = (tmp_path / "model.pth").read_bytes(), torch.save

    def torn(data, file):
        torch_save(data, file)
        file.truncate(100)
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module.torch, "save", torn)
        for name in ("model", "other"):
            with pytest.raises(OSError, match="no space"):
                checkpointer.save(name)
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    SafeCheckpointer(ToyModel(), str(tmp_path)).resume_or_load("")
    monkeypatch.setattr(checkpoint_module, "write_text_atomically", lambda path, text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpointer.save("other")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model.pth")
    assert (tmp_path / "other.pth").is_file(), "the pointer is written after the file"


def test_atomic_writes_replace_in_one_step_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    try:
        raise FileNotFoundError(2, "another error, that is being handled", "elsewhere")
    except FileNotFoundError:
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, mock.Mock(side_effect=KeyboardInterrupt))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def error_of(model, path, *parts, **arguments) -> str:
    """The error message of loading a whole run, or these parts beside the weights."""
    with pytest.raises(CheckpointError) as caught:
        SafeCheckpointer(model, **arguments).load(str(path), *parts)
    return str(caught.value)


def test_a_file_that_is_damaged_missing_or_something_else_is_named(tmp_path):
    path = tmp_path / "model.pth"
    SafeCheckpointer(ToyModel(), str(tmp_path)).save("model")
    content = path.read_bytes()
    for length in (len(content) // 2, 0):
        path.write_bytes(content[:length])
        assert "model.pth is damaged" in error_of(ToyModel(), path)
    said = error_of(ToyModel(), tmp_path / "nothing.pth")
    assert "no weight file" in said and "nothing.pth: set MODEL.WEIGHTS" in said
    said = error_of(ToyModel(), "https://localhost:9/none.pth")
    assert "Could not fetch" in said and "set MODEL.WEIGHTS to the local file" in said
    torch.save([1, 2], path)
    assert "does not hold a dict of weights but a list" in error_of(ToyModel(), path)
    torch.save({"encoder.weight": torch.zeros(2)}, path)
    assert f"Nothing in {path} matches" in error_of(ToyModel(), path, [])


def test_what_does_not_fit_is_an_error_when_resuming(tmp_path):
    path, two = tmp_path / "model.pth", make_toy(num_predictors=2)
    SafeCheckpointer(two, str(tmp_path), class_names=["a", "b"]).save("model")
    assert "has no predictors.2.0.weight" in error_of(make_toy(num_predictors=3), path)
    said = error_of(make_toy(num_predictors=1), path)  # a predictor too many is no harmless rest
    assert "has predictors.1.0.weight, which this run's model does not" in said
    other = make_toy(num_predictors=2)
    other.predictors[1][3] = torch.nn.Linear(16, 2)
    assert "predictors.1.3.weight with the shape (1, 16)" in error_of(other, path)
    said = error_of(two, path, class_names=["b", "a"])
    assert "trained for the classes a, b, but the data set has b, a" in said
    # Fine-tuning may change the classes, and the heads.
    SafeCheckpointer(two, class_names=["b", "a"]).load(str(path), [])
    SafeCheckpointer(other).load(str(path), [])


def test_weights_that_would_mean_something_else_or_lack_a_frozen_part_are_refused(tmp_path):
    path, cfgs = tmp_path / "model.pth", {order: toy_config() for order in ("RGB", "BGR")}
    for order, cfg in cfgs.items():
        cfg.INPUT.FORMAT = order
    SafeCheckpointer(ToyModel(), str(tmp_path), cfg=cfgs["RGB"]).save("model")
    said = error_of(ToyModel(), path, cfg=cfgs["BGR"])
    assert "was trained with INPUT.FORMAT RGB, but the config has BGR" in said
    SafeCheckpointer(ToyModel(), cfg=cfgs["RGB"]).load(str(path))
    SafeCheckpointer(ToyModel(), cfg=cfgs["BGR"]).load(str(path), [])  # fine-tuning may
    # Other intervals, and options that were removed.
    others = ("INTERVALS", 2, 4), ("PREDICTION", "velocity", "endpoint"), ("TIME", "shared", "INTERVALS")
    for key, before, now in (("INTERVALS", 4, ""), ("ROLLOUT", 2, ""), *others, ("ROLLOUT", 0, 1)):
        then = cfgs["BGR"].clone()
        then.MODEL.DFM[key] = before
        SafeCheckpointer(ToyModel(), str(tmp_path), cfg=then).save("model")
        model = ToyModel()
        model.meaning, model.meant = FlowDetector.meaning, FlowDetector.meant
        if now == "":  # the same by another number
            SafeCheckpointer(model, cfg=cfgs["BGR"]).load(str(path))
            continue
        said = error_of(model, path, cfg=cfgs["BGR"])
        assert f"was trained with MODEL.DFM.{key} {before}, but the config has {now}" in said
    # ImageNet weights have no FPN: frozen, it would stay random.
    model, path = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), str(tmp_path / "part.pth")
    torch.save({"model": {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}}, path)
    SafeCheckpointer(model).load(path, [])
    model.requires_grad_(False)
    assert "has no 1.weight, which this run keeps frozen" in error_of(model, path, [])


class Made:
    """Pickled as a call, and a state for what it returns, of one's choice."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt"])
def test_a_malicious_file_runs_nothing(tmp_path, suffix):
    marker, path = tmp_path / "marker", tmp_path / f"evil{suffix}"
    content = {"model": {"backbone.fpn.weight": Made(open, (str(marker), "w"))}, "__author__": "nobody"}
    with open(path, "wb") as file:
        pickle.dump(content, file) if suffix == ".pkl" else torch.save(content, file)
    checkpointer = SafeCheckpointer(ToyModel(), str(tmp_path))
    with pytest.raises(UnsafeFileError, match=f"evil{suffix} is not a plain file.*nothing in it was run"):
        checkpointer.load(str(path), [])
    (tmp_path / "last_checkpoint").write_text(path.name)
    with pytest.raises(UnsafeFileError):
        checkpointer.resume_or_load("", resume=True)
    assert not marker.exists()
