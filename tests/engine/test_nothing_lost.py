"""What a run has made stays: through kills, signals, used folders, other runs, bad steps and bit rot."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_resume import assert_same_checkpoint, losses, train_toy
from tiny_training import PREDICTOR_PARALLEL, train
from toy_model import UPDATES, ToyModel, make_toy, make_trainer, toy_loader

from dfm_d2.data.files import write_atomically, write_text_atomically
from dfm_d2.engine import checkpoint as checkpoint_module
from dfm_d2.engine import stop as stop_module
from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer
from dfm_d2.engine.folder import check_folder, last_checkpoint, locked
from dfm_d2.engine.metrics import METRICS_FILE, read_metrics
from dfm_d2.engine.stop import Stopped, StopSignals
from dfm_d2.engine.weights import load_tensors
from dfm_d2.errors import CheckpointError, UserError
from dfm_d2.local_update import NonFiniteLossError


def test_a_used_folder_keeps_the_files_of_others_and_a_lost_last_checkpoint_is_made_again(shapes, tmp_path):
    others = {name: name.encode() for name in ("model_0000001.pth", "model_final.pth", "model_best.pth")}
    [(tmp_path / name).write_bytes(content) for name, content in others.items()]
    keys = ("SOLVER.CHECKPOINT_PERIOD=2", "SOLVER.CHECKPOINTS_TO_KEEP=1")
    assert train(shapes, tmp_path, "SOLVER.MAX_ITER=4", *keys) == 0
    assert not (tmp_path / "model_0000001.pth").exists(), "one of two was to stay"
    for name in ("model_0000001.pth", "model_final.pth"):
        assert (tmp_path / f"{name}.previous").read_bytes() == others[name]
    assert "its model_final.pth is now model_final.pth.previous" in (tmp_path / "log.txt").read_text()

    # As a kill leaves it in mid-write of the last checkpoint; and somebody puts files of his own beside it.
    final = tmp_path / "model_final.pth"
    content = final.read_bytes()
    final.rename(tmp_path / "model_final.pth.0123abcd.partial")
    write_text_atomically(tmp_path / "last_checkpoint", "model_0000003.pth")
    foreign = [tmp_path / "model_0000000.pth", tmp_path / "model_0000002.pth", tmp_path / "notes.partial"]
    [path.write_bytes(b"mine") for path in foreign]
    assert train(shapes, tmp_path, "--resume", "SOLVER.MAX_ITER=4", *keys) == 0
    assert final.read_bytes() == content and (tmp_path / "last_checkpoint").read_text() == final.name
    assert sorted(tmp_path.glob("*.partial")) == [foreign[2]]
    assert train(shapes, tmp_path, "--resume", "SOLVER.MAX_ITER=6", *keys) == 0
    assert all(path.read_bytes() == b"mine" for path in foreign)
    found = {path.name for path in tmp_path.glob("model_*.pth")} - {path.name for path in foreign}
    assert found == {"model_0000005.pth", "model_best.pth", "model_final.pth"}
    assert not (tmp_path / "run.lock").exists()


def test_a_folder_that_cannot_be_written_is_one_line_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    full = mock.patch("tempfile.TemporaryFile", side_effect=OSError(30, "Read-only file system"))
    cases = {"": "is empty", "file": "'file' cannot be written to (it is a file)"}
    cases |= {"file/below": "(Not a directory)", ".": "(Read-only file system)"}
    for out, said in cases.items():
        with full if out == "." else contextlib.nullcontext(), pytest.raises(UserError) as caught:
            check_folder(out)
        assert str(caught.value).startswith("OUTPUT_DIR ") and said in str(caught.value)
    assert train("nowhere", "") == 2
    printed, said = capsys.readouterr()
    assert said.startswith("error: OUTPUT_DIR is empty: name the folder") and not printed
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("update", UPDATES)
def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path, update):
    def loader(start: int):
        for number, batch in enumerate(toy_loader(start)):
            for group in trainer.optimizer.param_groups if number == 3 else ():
                group["lr"] = 1e38
            yield batch

    model = make_toy()
    trainer = make_trainer(model, loader, update)
    checkpointer = SafeCheckpointer(model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([CheckpointHook(checkpointer, 1, 0)])
    said = "at iteration 3, .*: weights of block .* = (inf|nan).*The last checkpoint is intact"
    with pytest.raises(NonFiniteLossError, match=said):
        trainer.train(0, 5)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    saved = load_tensors(last_checkpoint(str(tmp_path), resume=True))
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_flipped_bit_is_seen_or_changes_nothing(tmp_path):
    path, moments = tmp_path / "model.pth", random.Random(0)
    SafeCheckpointer(ToyModel(), str(tmp_path)).save("model", iteration=3)
    content, saved = path.read_bytes(), load_tensors(str(path))
    weights = saved.pop("model")
    places = [
        content.index(weights["predictors.0.0.weight"].numpy().tobytes()) + 5,
        *moments.sample(range(len(content)), 80),
    ]
    errors = []
    for place in places:
        flipped = bytes([content[place] ^ 1 << moments.randrange(8)])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
        try:
            found = load_tensors(str(path))
        except CheckpointError as error:
            errors.append(str(error))
            continue
        torch.testing.assert_close(found.pop("model"), weights, rtol=0, atol=0)
        assert found == saved
    assert f"{path} is damaged or not of torch.save (the checksum of its archive/data/" in errors[0]
    assert len(errors) > 20


def test_a_file_is_written_by_many_at_once_and_through_no_link(tmp_path, monkeypatch):
    path, contents = tmp_path / "file", [bytes([number]) * 5000 for number in range(8)]

    def write(content: bytes) -> bytes:
        for _ in range(5):
            write_atomically(path, lambda file: file.write(content))
        return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write, contents)) <= set(contents)
    monkeypatch.setattr("secrets.token_hex", lambda number: "0123abcd")
    (tmp_path / "file.0123abcd.partial").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        write(b"new")
    assert not (tmp_path / "target").exists() and path.read_bytes() in contents


HOLD = (
    "import sys; from dfm_d2.engine.folder import *\nwith locked(sys.argv[1]): print(1, flush=True); input()"
)


def test_a_folder_in_use_is_refused_until_its_run_is_dead(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        said = f"{tmp_path} is in use by process {other.pid} on {os.uname().nodename}: wait"
        with pytest.raises(UserError, match=said), locked(str(tmp_path)):
            pytest.fail("two are in it")
        other.kill()
    with locked(str(tmp_path)):
        assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    (tmp_path / "run.lock").symlink_to(tmp_path / "target")
    with pytest.raises(UserError, match="run.lock"), locked(str(tmp_path)):
        pytest.fail("it followed a link")


@pytest.mark.parametrize(("step", "saved"), [(22, "model_latest.pth"), (59, "model_final.pth")])
def test_a_training_that_is_asked_to_stop_goes_on_as_if_it_had_not(tmp_path, caplog, step, saved):
    def loader(position: int):
        for number, batch in enumerate(toy_loader(position)):
            if position == 0 and number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    train_toy(straight)
    with pytest.raises(Stopped):
        train_toy(stopped, loader=loader)
    assert (stopped / "last_checkpoint").read_text() == saved
    assert f"iteration {step} is saved ({saved}), the same command with --resume goes on" in caplog.text
    train_toy(stopped, loader=loader)
    assert_same_checkpoint(straight, stopped)
    assert sorted(os.listdir(stopped)) == sorted(os.listdir(straight))
    assert [line for line in losses(stopped) if line["iteration"] != 22] == losses(straight)


@pytest.mark.parametrize("keys", [(), ("--num-gpus", "2"), ("--num-gpus", "2", *PREDICTOR_PARALLEL)], ids=len)
def test_all_processes_stop_together(server, shapes, tmp_path, keys):
    def interrupt() -> None:
        while not read_metrics(tmp_path / METRICS_FILE):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert train(shapes, tmp_path, "SOLVER.MAX_ITER=100000", *keys) == 128 + signal.SIGTERM
    thread.join()
    assert (tmp_path / "log.txt").read_text().count("with --resume goes on") == 1
    done = load_tensors(last_checkpoint(str(tmp_path), resume=True))["iteration"] + 1
    assert train(shapes, tmp_path, "--resume", f"SOLVER.MAX_ITER={done + 1}", *keys) == 0
    assert [line["iteration"] for line in losses(tmp_path) if "total_loss" in line] == list(range(done + 1))


def test_a_second_signal_stops_at_once(monkeypatch):
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        for _ in range(3):  # one Ctrl-C, told by several
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.caught == signal.SIGINT
        monkeypatch.setattr(stop_module, "SECONDS_OF_ONE", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("it went on")


def test_a_short_training_is_saved_by_the_clock(tmp_path, monkeypatch):
    saved, save = [], SafeCheckpointer.save
    monkeypatch.setattr(SafeCheckpointer, "save", lambda *a, **extra: saved.append(a[1]) or save(*a, **extra))
    monkeypatch.setattr(checkpoint_module, "MINUTES", 0.0)
    train_toy(tmp_path, 10, period=6)
    assert saved == ["model_latest", "model_0000005", "model_latest", "model_final"]
    assert {path.name for path in Path(tmp_path).glob("*.pth")} == {"model_0000005.pth", "model_final.pth"}
    assert [line["iteration"] for line in losses(tmp_path)] == [3, 5, 7, 9]
