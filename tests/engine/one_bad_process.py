"""Two processes, of which the second finds a loss that is not finite; started by test_processes.py."""

import argparse
import sys

import torch
import torch.distributed as dist

from dfm_d2.engine.launch import run_processes
from dfm_d2.local_update.updates import check_finite


def main(_: argparse.Namespace) -> None:
    check_finite({"loss_cls/predictor0": torch.tensor(float("nan") if dist.get_rank() == 1 else 1.0)})
    dist.barrier()  # nobody gets here


if __name__ == "__main__":
    arguments = argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    sys.exit(run_processes(main, arguments, on_gpu=False))
