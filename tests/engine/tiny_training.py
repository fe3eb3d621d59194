"""tools/train_net.py on a tiny detector and generated images: in this process, in several, as a command."""

import dataclasses
import errno
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.setup import run_tool

ROOT = Path(__file__).parents[2]
PREDICTOR_PARALLEL = ("MODEL.DFM.UPDATE=parallel", "MODEL.DFM.PREDICTOR_RANKS=2")
# GroupNorm: batch norm's statistics are a process's own. SGD: AdamW amplifies rounding. The small rate: a
# larger one carries what a convolution rounds otherwise with another number of images over ReLUs' kinks.
TINY = (
    "SEED 1 SOLVER.IMS_PER_BATCH 4 SOLVER.LOG_PERIOD 1 MODEL.DFM.NUM_PREDICTORS 2 MODEL.DFM.NUM_PROPOSALS 8 "
    "MODEL.DFM.HEAD.FEEDFORWARD_DIM 32 TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 0 SOLVER.OPTIMIZER sgd "
    "SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR SOLVER.STEPS () SOLVER.BASE_LR 0.00001 SOLVER.WARMUP_ITERS 0 "
    "SOLVER.AMP.ENABLED False MODEL.RESNETS.NORM GN MODEL.FPN.NORM GN MODEL.DEVICE cpu "
    "MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.STEM_OUT_CHANNELS 32 MODEL.RESNETS.WIDTH_PER_GROUP 32 "
    "MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.FPN.OUT_CHANNELS 32 MODEL.DFM.HEAD.HIDDEN_DIM 32"
).split()


def words(shapes: Path, out: Path, *arguments: str) -> list[str]:
    """Of a command line: arguments KEY=VALUE are overrides, the others flags."""
    flags = [a for a in arguments if "=" not in a]
    options = [part for a in arguments if "=" in a for part in a.split("=")]
    data = ["DATASETS.VOC_ROOT", str(shapes), "OUTPUT_DIR", str(out)]
    return ["--config-file", str(ROOT / "configs/shapes_flow_r18.yaml"), *flags, *TINY, *data, *options]


def train(shapes: Path, out: Path, *arguments: str, fault: tuple[str, int] | None = None) -> int:
    """The exit status of train_net; what several processes print is in out/process<rank>.txt."""
    loader = functools.partial(spoil, *fault) if fault else DETECTION.train_loader
    register = functools.partial(print_apart, out)
    task = dataclasses.replace(DETECTION, register=register, train_loader=loader)
    return run_tool(task, words(shapes, out, *arguments))


def print_apart(out: Path, cfg) -> None:
    """Register the data sets; of several processes each prints into a file of its own."""
    if dist.is_initialized():
        torch.set_num_threads(1)
        printed = os.open(out / f"process{dist.get_rank()}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        (out / f"process{dist.get_rank()}.pid").write_text(str(os.getpid()))
    DETECTION.register(cfg)


def spoil(kind: str, iteration: int, cfg, position: int):
    """The batches of this process, that of ``iteration`` spoilt in process 1."""
    for number, batch in enumerate(DETECTION.train_loader(cfg, position)):
        if number == iteration and dist.get_rank() == 1:
            last = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
            while cfg.SOLVER.CHECKPOINT_PERIOD == 1 and f"{iteration - 1:07d}" not in last.read_text():
                time.sleep(0.01)  # the first process is still at it
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "data":
                raise OSError(errno.EACCES, "Permission denied", "bad.jpg")
            batch[0]["image"] = torch.full(batch[0]["image"].shape, float("nan"))
            print(f"spoilt: {batch[0]['image_id']}", flush=True)
        yield batch


def as_torchrun_starts(rank: int, shapes: Path, out: Path, port: int, *arguments: str) -> None:
    """One of two processes that somebody else started."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()})
    sys.exit(train(shapes, out, *arguments))


def command(shapes: Path, out: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """The real command."""
    return [sys.executable, *launcher, str(ROOT / "tools/train_net.py"), *words(shapes, out, *arguments)]


def run(arguments: list[str], folder=None, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def assert_same(out: Path, other: Path) -> None:
    """The parameters of two runs, to float32's rounding. Biases begin at zero: a wrong share of the batch or
    place in the stream would change all of them. test_processes.py also compares in float64, to 1e-9."""
    found, expected = (torch.load(o / "model_final.pth", weights_only=True)["model"] for o in (out, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm()
        assert error <= 1e-3 * value.norm() + 1e-12, f"{name}: {error / value.norm():.2e}"
