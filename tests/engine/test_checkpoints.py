"""Checkpoints: whole or not there, nothing in them is run, and what does not fit is said."""

import os

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from toy_model import ToyModel

from dfm_d2 import __version__
from dfm_d2.data.files import write_atomically
from dfm_d2.engine import checkpoint as checkpoint_module
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.errors import CheckpointError, UnsafeFileError, UserError
from dfm_d2.framework import PROVIDER


def test_a_round_trip_and_what_it_says_about_itself(tmp_path):
    model = ToyModel()
    SafeCheckpointer(model, str(tmp_path), class_names=["a", "b"], config="MODEL: {}").save(
        "one", iteration=4
    )
    twin = ToyModel()
    twin_checkpointer = SafeCheckpointer(twin, str(tmp_path), class_names=["a", "b"])
    extra = twin_checkpointer.resume_or_load("ignored")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
    assert extra["iteration"] == 4
    assert extra["dfm_d2"] == {
        "version": __version__,
        "provider": PROVIDER,
        "class_names": ["a", "b"],
        "config": "MODEL: {}",
    }
    assert (tmp_path / "last_checkpoint").read_text() == "one.pth"


def test_a_write_that_fails_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    model = ToyModel()
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()
    torch_save = torch.save

    def torn(data, file):
        torch_save(data, file)
        file.truncate(100)
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", torn)
    for name in ("model", "other"):
        with pytest.raises(OSError, match="no space"):
            checkpointer.save(name)
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    SafeCheckpointer(ToyModel(), str(tmp_path)).resume_or_load("")


def test_the_pointer_is_written_after_the_file(tmp_path, monkeypatch):
    checkpointer = SafeCheckpointer(ToyModel(), str(tmp_path))
    checkpointer.save("first")

    def fail(path, text):
        raise OSError("killed here")

    monkeypatch.setattr(checkpoint_module, "write_text_atomically", fail)
    with pytest.raises(OSError, match="killed"):
        checkpointer.save("second")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")
    assert (tmp_path / "second.pth").is_file()


def test_atomic_writes_replace_in_one_step(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_an_interruption_goes_through_an_atomic_write(tmp_path):
    def interrupted(file):
        raise KeyboardInterrupt

    try:
        raise FileNotFoundError(2, "another error, that is being handled", "elsewhere")
    except FileNotFoundError:
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "file", interrupted)
    assert not os.listdir(tmp_path)


def test_a_truncated_checkpoint_is_named(tmp_path):
    checkpointer = SafeCheckpointer(ToyModel(), str(tmp_path))
    checkpointer.save("model")
    content = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="model.pth is damaged"):
        checkpointer.resume_or_load("")
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.pth is damaged"):
        checkpointer.resume_or_load("")


def test_missing_and_unfetchable_weights(tmp_path):
    checkpointer = SafeCheckpointer(ToyModel(), str(tmp_path))
    with pytest.raises(CheckpointError, match="no weight file .*nothing.pth: set MODEL.WEIGHTS"):
        checkpointer.load(str(tmp_path / "nothing.pth"))
    with pytest.raises(CheckpointError, match="Could not fetch .*set MODEL.WEIGHTS to the local file"):
        checkpointer.load("https://localhost:9/none.pth")


def test_what_does_not_fit_is_an_error_when_resuming(tmp_path):
    SafeCheckpointer(ToyModel(num_predictors=2), str(tmp_path), class_names=["a", "b"]).save("model")
    with pytest.raises(CheckpointError, match="has no predictors.2.0.weight"):
        SafeCheckpointer(ToyModel(num_predictors=3), str(tmp_path)).resume_or_load("")
    other = ToyModel(num_predictors=2)
    other.predictors[1][3] = torch.nn.Linear(16, 2)
    with pytest.raises(CheckpointError, match=r"predictors.1.3.weight with the shape \(1, 16\)"):
        SafeCheckpointer(other, str(tmp_path)).resume_or_load("")
    same = SafeCheckpointer(ToyModel(num_predictors=2), str(tmp_path), class_names=["b", "a"])
    with pytest.raises(CheckpointError, match="trained for the classes a, b, but the data set has b, a"):
        same.resume_or_load("")
    same.load(str(tmp_path / "model.pth"))  # fine-tuning may change the classes


def test_weights_of_which_nothing_matches_are_an_error(tmp_path):
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="Nothing in .*other.pth matches"):
        SafeCheckpointer(ToyModel()).load(str(tmp_path / "other.pth"))
    np.save(tmp_path / "array.npy", np.zeros(2))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list|does not hold a dict"):
        SafeCheckpointer(ToyModel()).load(str(tmp_path / "list.pth"))


class Evil:
    """Writes a marker file when it is unpickled by anything that runs code."""

    def __init__(self, marker) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_a_frozen_part_that_the_weights_lack_is_an_error(tmp_path):
    """ImageNet weights have no FPN: frozen, it would stay random."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    torch.save({"model": {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}}, tmp_path / "part.pth")
    SafeCheckpointer(model, str(tmp_path)).load(str(tmp_path / "part.pth"))
    model.requires_grad_(False)
    with pytest.raises(CheckpointError, match="has no 1.weight, which this run keeps frozen"):
        SafeCheckpointer(model, str(tmp_path)).load(str(tmp_path / "part.pth"))


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt"])
def test_a_malicious_file_runs_nothing(tmp_path, suffix):
    import pickle

    marker, path = tmp_path / "marker", tmp_path / f"evil{suffix}"
    content = {"model": {"backbone.fpn.weight": Evil(marker)}, "__author__": "nobody"}
    with open(path, "wb") as file:
        if suffix == ".pkl":
            pickle.dump(content, file)
        else:
            torch.save(content, file)
    checkpointer = SafeCheckpointer(ToyModel(), str(tmp_path))
    with pytest.raises(UnsafeFileError, match=f"evil{suffix} is not a plain file.*nothing in it was run"):
        checkpointer.load(str(path))
    assert not marker.exists()
    (tmp_path / "last_checkpoint").write_text(path.name)
    with pytest.raises(UserError):
        checkpointer.resume_or_load("", resume=True)
    assert not marker.exists()


def test_a_strict_load_refuses_a_predictor_too_many(tmp_path):
    SafeCheckpointer(ToyModel(), str(tmp_path)).save("one")
    smaller = ToyModel()
    name = next(iter(smaller.state_dict()))
    holder = smaller.get_submodule(name.rpartition(".")[0])
    delattr(holder, name.rpartition(".")[2])
    with pytest.raises(CheckpointError, match=f"has {name}, which this run's model does not have"):
        SafeCheckpointer(smaller, str(tmp_path)).load(str(tmp_path / "one.pth"), strict=True)


@pytest.mark.parametrize(
    ("key", "then", "now"),
    [("MODEL.DFM.TIME", "partitioned", "shared"), ("INPUT.FORMAT", "RGB", "BGR")],
)
def test_weights_that_would_mean_something_else_are_refused(tmp_path, key, then, now):
    def config(value):
        text = value
        for part in reversed(key.split(".")):
            text = {part: text}
        return yaml.safe_dump(text)

    SafeCheckpointer(ToyModel(), str(tmp_path), config=config(then)).save("model")
    path = str(tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=f"was trained with {key} {then}, but the config has {now}"):
        SafeCheckpointer(ToyModel(), str(tmp_path), config=config(now)).load(path, strict=True)
    SafeCheckpointer(ToyModel(), str(tmp_path), config=config(then)).load(path, strict=True)
    SafeCheckpointer(ToyModel(), str(tmp_path), config=config(now)).load(path)  # fine-tuning may
