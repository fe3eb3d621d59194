"""A full disk, an image that is not a number, and a process that dies: nothing that was saved is lost."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_resume import assert_same_checkpoint
from tiny_training import ONE_THREAD, command, run
from toy_model import toy_config

from dfm_d2.detection.data.shapes import write_shapes
from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.engine.trainer import LocalUpdateTrainer
from dfm_d2.local_update.errors import NonFiniteLossError
from dfm_d2.local_update.updates import build_update


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, num_train=12, num_val=3, size=64, seed=0)
    return folder


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` at `folder`."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this user cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.timeout(300)
def test_a_full_disk_is_a_sentence_and_the_run_continues_when_there_is_room(shapes, tmp_path):
    options = ("SOLVER.MAX_ITER=6", "SOLVER.CHECKPOINT_PERIOD=2", "SOLVER.CHECKPOINTS_TO_KEEP=0")
    run(command(shapes, tmp_path / "straight", *options))
    size = (tmp_path / "straight/model_final.pth").stat().st_size
    with small_disk(tmp_path / "disk", str(int(1.5 * size))) as disk:
        out = disk / "out"
        done = run(command(shapes, out, *options), status=2)
        assert f"Could not write {out}/model_0000003.pth: No space left on device." in done.stderr
        assert "--resume" in done.stderr and "Traceback" not in done.stderr + done.stdout
        assert sorted(path.name for path in out.glob("model*")) == ["model_0000001.pth"]
        assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
        subprocess.run(["mount", "-o", f"remount,size={6 * size}", str(disk)], check=True)
        run(command(shapes, out, "--resume", *options))
        found, expected = (
            torch.load(folder / "model_final.pth", weights_only=True)
            for folder in (out, tmp_path / "straight")
        )
    for checkpoint in (found, expected):
        del checkpoint["dfm_d2"]["config"]  # names its own OUTPUT_DIR
    assert_same_checkpoint(found, expected)


@pytest.mark.timeout(120)
def test_a_disk_that_is_full_from_the_start_is_a_sentence(shapes, tmp_path):
    with small_disk(tmp_path / "disk", "4k") as disk:
        (disk / "rest").write_bytes(b"x" * 4096)
        done = run(command(shapes, disk, "SOLVER.MAX_ITER=1"), status=2)
    assert f"Could not write {disk}/config.yaml: No space left on device." in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("log.txt takes no more") == 1


def batches(make_input, bad_iteration: int):
    """Two images a batch; in one iteration the second of them is not a number."""

    def loader(position: int):
        while True:
            batch = [make_input(f"i{position + place}") for place in range(2)]
            if position == 2 * bad_iteration:
                batch[1]["image"] = torch.full(batch[1]["image"].shape, float("nan"))
            yield batch
            position += 2

    return loader


@pytest.mark.parametrize(
    ("update", "backbone_update", "step_in_backward"),
    [
        ("joint", "accumulate", False),
        ("sequential", "accumulate", False),
        ("sequential", "accumulate", True),
        ("sequential", "local", True),
        ("parallel", "accumulate", False),
    ],
)
def test_an_image_that_is_not_a_number_stops_training_with_its_name(
    make_model, make_input, tmp_path, update, backbone_update, step_in_backward
):
    model = make_model(BACKBONE_UPDATE=backbone_update).train()
    optimizer = build_block_optimizer(toy_config(), model)
    strategy = build_update(update, backbone_update, step_in_backward)
    trainer = LocalUpdateTrainer(
        model, batches(make_input, 3), optimizer, strategy, contextlib.nullcontext, images_per_step=2
    )
    checkpointer = SafeCheckpointer(model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([CheckpointHook(checkpointer, 1, 0)])
    with pytest.raises(
        NonFiniteLossError, match=r"at iteration 3, image ids \['i6', 'i7'\]: loss_cls/"
    ) as caught:
        trainer.train(0, 6)
    assert all(value != value for value in caught.value.values.values())
    twin = make_model(seed=1, BACKBONE_UPDATE=backbone_update)
    SafeCheckpointer(twin, str(tmp_path)).resume_or_load("")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert all(value.isfinite().all() for value in twin.state_dict().values())


PREDICTOR_PARALLEL = ("MODEL.DFM.UPDATE=parallel", "MODEL.DFM.PREDICTOR_RANKS=2")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        pytest.param("nan", (), marks=pytest.mark.slow),
        ("nan", (*PREDICTOR_PARALLEL, "MODEL.DFM.STEP_IN_BACKWARD=True")),
        ("data", ()),
        pytest.param("data", PREDICTOR_PARALLEL, marks=pytest.mark.slow),
    ],
)
def test_an_error_in_the_last_iteration_of_one_process_ends_all(shapes, tmp_path, kind, keys):
    """Where there is an evaluation still to come, for which the processes would wait for each other."""
    arguments = command(
        shapes, tmp_path, "--num-gpus", "2", "SOLVER.MAX_ITER=3", "SOLVER.CHECKPOINT_PERIOD=1", *keys
    )
    script = str(Path(__file__).with_name("bad_training.py"))
    done = run([arguments[0], script, kind, "2", *arguments[2:]], status=1 if kind == "nan" else 2)
    assert "Traceback" not in done.stderr
    if kind == "nan":
        spoilt = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("spoilt"))
        errors = [line for line in done.stderr.splitlines() if "Not finite at iteration 2" in line]
        assert errors and all(f"'{spoilt}'" in line for line in errors), done.stderr
    else:
        assert "bad.jpg: Permission denied." in done.stderr
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STARTS = {
    "data parallel": (["--num-gpus", "2"], ()),
    "predictor parallel": (
        ["--num-gpus", "2", *PREDICTOR_PARALLEL],
        (),
    ),
    "torchrun": ([], TORCHRUN),
}


def workers_of(pid: int) -> list[int]:
    """The processes that train, youngest last."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return sorted(child for child, line in lines.items() if b"spawn_main" in line or b"train_net.py" in line)


def is_running(pid: int) -> bool:
    """Whether it is there, and more than an entry that nobody has collected yet."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "start",
    [pytest.param(s, marks=() if s == "predictor parallel" else pytest.mark.slow) for s in STARTS],
)
def test_a_process_that_dies_ends_the_run_in_seconds_with_its_name(shapes, tmp_path, start):
    arguments, launcher = STARTS[start]
    arguments = command(shapes, tmp_path, "SOLVER.MAX_ITER=100000", *arguments, launcher=launcher)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ONE_THREAD) as process:
        try:
            metrics = tmp_path / "metrics.json"
            while not (metrics.exists() and metrics.stat().st_size):
                assert process.poll() is None, process.stderr.read()[-3000:]
                time.sleep(0.2)
            workers = workers_of(process.pid)
            assert len(workers) == 2
            os.kill(workers[1], signal.SIGKILL)
            killed = time.monotonic()
            _, errors = process.communicate(timeout=90)
            seconds = time.monotonic() - killed
        finally:
            process.terminate()  # a test that fails must not leave a training behind
    assert process.returncode == 1 and seconds < 60
    if launcher:
        assert "Signal 9 (SIGKILL) received" in errors
    else:
        assert "error: process 1 was killed (SIGKILL)" in errors and "--resume" in errors
    assert not [pid for pid in workers if is_running(pid)]
