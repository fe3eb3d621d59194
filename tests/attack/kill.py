"""Kill trainings at random moments and resume them: nothing is lost, and they train what they would have.

    python tests/attack/kill.py --kills 200 --seed 0

Trainings of a tiny detector, of one process and of two in turns, are real processes that get SIGKILL: half of
them at any moment from their start to their end, half within a checkpoint's writing; of two processes all, or
only one. After each kill the checkpoint that was promised is read whole and is not older than before (else it
is lost); a training that is at its end has every line of metrics.json and every bit of the last checkpoint of
one that was never killed (else it differs). The last line counts both; the exit status is 1 if there are any.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "engine")]
# ruff: noqa: E402
from test_resume import assert_same_run
from tiny_training import train

from dfm_d2.detection.data.shapes import write_shapes
from dfm_d2.engine.folder import last_checkpoint
from dfm_d2.engine.weights import load_tensors
from dfm_d2.errors import CheckpointError

KEYS = "SOLVER.MAX_ITER=24 SOLVER.CHECKPOINT_PERIOD=3 SOLVER.OPTIMIZER=adamw SOLVER.IMS_PER_BATCH=2".split()
WAYS = {"one process": (), "two processes": ("--num-gpus", "2")}
PATIENCE = 120.0  # seconds until what should have ended hangs


def started(shapes: Path, folder: Path, way: str) -> int:
    """The process of a training that resumes, which leads a group of its own; it prints into a file."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        printed = os.open(f"{folder}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        start = torch.multiprocessing.start_processes  # forked ones have no imports to wait for
        torch.multiprocessing.start_processes = lambda *a, **k: start(*a, **k | {"start_method": "fork"})
        status = train(shapes, folder, "--resume", *WAYS[way], *KEYS)
    finally:
        os._exit(status)


def members(group: int) -> list[int]:
    """The processes of a group that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # it has ended meanwhile
        if int(of) == group and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def wait_for(condition, seconds: float = PATIENCE) -> bool:
    """Whether a condition became true in time."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.0005)
    return bool(met)


def ended(child: int) -> int | None:
    """The exit status (a negative signal) of a training whose processes have all ended; TimeoutError."""
    _, status = os.waitpid(child, 0)
    if not wait_for(lambda: not members(child)):
        os.killpg(child, signal.SIGKILL)
        raise TimeoutError("processes of a killed training live on")
    return os.waitstatus_to_exitcode(status)


def killed(child: int, folder: Path, rng: random.Random, duration: float) -> bool:
    """Kill a training, or some of it; False: it has ended before."""
    gone = lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # noqa: E731
    if rng.random() < 0.5:
        wait_for(gone, rng.uniform(0, duration))
    else:
        for _ in range(rng.randrange(1, 4)):
            wait_for(lambda: gone() or list(folder.glob("model_*.partial")))
            wait_for(lambda: gone() or not list(folder.glob("model_*.partial")), rng.uniform(0, 0.02))
    if gone():
        return False
    whom = members(child)
    for process in whom if rng.random() < 0.5 else rng.sample(whom, min(len(whom), 1)):
        os.kill(process, signal.SIGKILL)
    return True


def promised(folder: Path) -> int:
    """The iteration of the checkpoint that a resume takes; -1: none. CheckpointError unless it is whole."""
    path = last_checkpoint(str(folder), resume=True)
    return load_tensors(path)["iteration"] if path else -1


def attack(folder: Path, kills: int, seed: int) -> tuple[int, int]:
    """How many checkpoints were lost, and how many trainings differ."""
    torch.set_num_threads(1)
    shapes, rng = folder / "shapes", random.Random(seed)
    write_shapes(shapes, num_train=8, num_val=4, size=64, seed=0)
    straight, durations = {way: folder / way for way in WAYS}, {}
    for way, out in straight.items():
        begun = time.monotonic()
        assert ended(started(shapes, out, way)) == 0, Path(f"{out}.txt").read_text()[-2000:]
        durations[way] = time.monotonic() - begun
    done = lost = differ = runs = 0
    while done < kills:
        way, out, before = list(WAYS)[runs % 2], folder / f"run{runs}", -1
        runs += 1
        try:
            while True:
                child = started(shapes, out, way)
                hit = done < kills and killed(child, out, rng, durations[way])
                status = ended(child)
                if not hit:
                    break
                done += 1
                print(f"\r{done} of {kills} kills, {runs} trainings", end="", file=sys.stderr, flush=True)
                now = promised(out)
                if now < before:
                    raise CheckpointError(f"iteration {now} where {before} was saved")
                before = now
        except CheckpointError as error:
            lost += 1
            print(f"\nlost by training {runs}, {way}: {error}", flush=True)
            continue
        try:
            assert status == 0, Path(f"{out}.txt").read_text()[-2000:]
            assert_same_run(straight[way], out)
        except (AssertionError, OSError) as error:
            differ += 1
            print(f"\ntraining {runs}, {way}, differs: {error}", flush=True)
    print(f"\n{runs} trainings", file=sys.stderr)
    return lost, differ


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lost, differ = attack(Path(folder), args.kills, args.seed)
    print(f"{args.kills} kills: {lost} lost, {differ} differ")
    return 1 if lost or differ else 0


if __name__ == "__main__":
    sys.exit(main())
