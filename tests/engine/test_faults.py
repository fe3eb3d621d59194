"""A full disk, an image that is not a number, and a process that dies: nothing that was saved is lost."""

import contextlib
import itertools
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_resume import assert_same_run
from tiny_training import PREDICTOR_PARALLEL, train
from toy_model import UPDATES, make_trainer

from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer
from dfm_d2.engine.hooks import FinalEvalHook
from dfm_d2.engine.log import start_log
from dfm_d2.local_update import NonFiniteLossError


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` at `folder`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_continues_when_there_is_room(shapes, tmp_path, capfd):
    options = ("SOLVER.MAX_ITER=6", "SOLVER.CHECKPOINT_PERIOD=2", "SOLVER.CHECKPOINTS_TO_KEEP=0")
    assert train(shapes, tmp_path / "straight", *options) == 0
    size = (tmp_path / "straight/model_final.pth").stat().st_size
    with small_disk(tmp_path / "disk", str(int(1.5 * size))) as disk:
        out = disk / "out"
        capfd.readouterr()
        assert train(shapes, out, *options) == 2
        printed, said = capfd.readouterr()
        assert f"Could not write {out}/model_0000003.pth: No space left on device." in said
        assert "--resume" in said and "Traceback" not in said + printed
        assert sorted(path.name for path in out.glob("model*")) == ["model_0000001.pth"]
        assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
        subprocess.run(["mount", "-o", f"remount,size={6 * size}", str(disk)], check=True)
        assert train(shapes, out, "--resume", *options) == 0
        assert_same_run(out, tmp_path / "straight")


def test_a_disk_that_is_full_from_the_start_is_one_line(shapes, tmp_path, capfd):
    with small_disk(tmp_path / "disk", "4k") as disk:
        (disk / "rest").write_bytes(b"x" * 4096)
        assert train(shapes, disk, "SOLVER.MAX_ITER=1") == 2
        start_log(str(tmp_path), is_main=True)  # as the next run does: it closes the log of this one
    said = capfd.readouterr().err
    assert f"Could not write {disk}/config.yaml: No space left on device." in said
    assert "Traceback" not in said
    assert said.count("log.txt takes no more") == 1


@pytest.mark.parametrize(
    ("update", "backbone_update"), [(update, "accumulate") for update in UPDATES] + [("in backward", "local")]
)
def test_an_image_that_is_not_a_number_stops_training_with_its_name(
    make_model, make_input, tmp_path, update, backbone_update
):
    def batches(start: int):
        for position in itertools.count(start, 2):
            batch = [make_input(f"i{position + place}") for place in range(2)]
            if position == 6:
                batch[1]["image"] = torch.full(batch[1]["image"].shape, float("nan"))
            yield batch

    model = make_model(BACKBONE_UPDATE=backbone_update)
    trainer = make_trainer(model, batches, update, images_per_step=2)
    checkpointer = SafeCheckpointer(model, str(tmp_path), trainer=trainer)
    evaluation = FinalEvalHook(0, lambda: pytest.fail("evaluated"))
    trainer.register_hooks([evaluation, CheckpointHook(checkpointer, 1, 0)])
    named = r"at iteration 3, image ids \['i6', 'i7'\]: loss_cls/.*The last checkpoint is intact"
    with pytest.raises(NonFiniteLossError, match=named) as caught:
        trainer.train(0, 4)
    assert all(value != value for value in caught.value.values.values())
    twin = make_model(seed=1, BACKBONE_UPDATE=backbone_update)
    SafeCheckpointer(twin, str(tmp_path)).resume_or_load("")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert all(value.isfinite().all() for value in twin.state_dict().values())


PARALLEL = {"data": (), "predictors": PREDICTOR_PARALLEL}


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("kind", ["nan", "data"])
def test_an_error_in_the_last_iteration_of_one_process_ends_all(server, shapes, tmp_path, kind, parallel):
    """Where there is an evaluation still to come, for which the processes would wait for each other."""
    keys = ("SOLVER.MAX_ITER=3", "SOLVER.CHECKPOINT_PERIOD=1", *PARALLEL[parallel])
    if kind == "nan":
        keys += ("MODEL.DFM.STEP_IN_BACKWARD=True",)
    status = train(shapes, tmp_path, "--num-gpus", "2", *keys, fault=(kind, 2))
    said = "".join(path.read_text() for path in tmp_path.glob("process?.txt"))
    assert status == (1 if kind == "nan" else 2), said
    assert "Traceback" not in said
    if kind == "nan":
        spoilt = next(line.split()[1] for line in said.splitlines() if line.startswith("spoilt"))
        errors = [line for line in said.splitlines() if "Not finite at iteration 2" in line]
        assert errors and all(f"'{spoilt}'" in line for line in errors), said
        assert re.search(r"loss_cls/predictor\d of process 1 = nan", said)
    else:
        assert "bad.jpg: Permission denied." in said
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def is_running(pid: int) -> bool:
    """Whether it is there, and more than an entry that nobody has collected yet."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_process_that_dies_ends_the_run_in_seconds_with_its_name(server, shapes, tmp_path, capfd, parallel):
    start, keys = time.monotonic(), ("SOLVER.MAX_ITER=100000", *PARALLEL[parallel])
    assert train(shapes, tmp_path, "--num-gpus", "2", *keys, fault=("killed", 2)) == 1
    assert time.monotonic() - start < 60
    said = capfd.readouterr().err
    assert "error: process 1 was killed (SIGKILL)" in said and "--resume" in said
    pids = [int(path.read_text()) for path in tmp_path.glob("process?.pid")]
    assert len(pids) == 2 and not any(map(is_running, pids))
