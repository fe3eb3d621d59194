"""tools/train_net.py in two processes, the second of which meets something bad; for test_faults.py.

Usage: bad_training.py KIND ITERATION ARGUMENTS...; KIND is "nan" (an image) or "data" (a file).
"""

import dataclasses
import errno
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dfm_d2.detection.task import DETECTION  # noqa: E402
from dfm_d2.engine.launch import run_processes  # noqa: E402
from dfm_d2.engine.setup import run_task  # noqa: E402
from dfm_d2.framework import default_argument_parser  # noqa: E402


def spoil(cfg, position: int, kind: str, iteration: int):
    """The batches of this process, that of ``iteration`` spoilt in process 1."""
    for number, batch in enumerate(DETECTION.train_loader(cfg, position)):
        if number == iteration and dist.get_rank() == 1:
            if kind == "data":
                raise OSError(errno.EACCES, "Permission denied", "bad.jpg")
            batch[0]["image"] = torch.full(batch[0]["image"].shape, float("nan"))
            print(f"spoilt: {batch[0]['image_id']}", flush=True)
        yield batch


def main(args) -> None:
    """Runs in each process."""
    kind, iteration = args.bad
    loader = lambda cfg, position: spoil(cfg, position, kind, int(iteration))  # noqa: E731
    run_task(dataclasses.replace(DETECTION, train_loader=loader), args)


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args(sys.argv[3:])
    arguments.bad = sys.argv[1:3]
    sys.exit(run_processes(main, arguments, on_gpu=False))
