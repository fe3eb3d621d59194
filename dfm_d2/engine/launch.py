"""Several processes of one run: started here, as Detectron2's `launch` does, or by torchrun; GPUs or CPUs."""

import argparse
import contextlib
import os
import signal
import socket
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dfm_d2.engine.folder import locked
from dfm_d2.engine.run import evaluate_only, train
from dfm_d2.engine.setup import setup_run, uses_gpu
from dfm_d2.engine.stop import Stopped, StopSignals
from dfm_d2.engine.task import Task
from dfm_d2.errors import UserError, output_errors, report
from dfm_d2.framework import comm, default_argument_parser
from dfm_d2.local_update.processes import TIMEOUT, NonFiniteLossError


def run_processes(task: Task, cfg, args: argparse.Namespace) -> int:
    """Train or evaluate in ``num_gpus`` x ``num_machines`` processes, or in those that torchrun started.

    One GPU a process where the config computes on GPUs; else they share the cores of the CPU.
    Returns the exit status of a command: 0 done, 2 something that the user can put right, 1 else. Raises
    UserError for numbers of processes that cannot be.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_process(int(os.environ.get("LOCAL_RANK", 0)), task, cfg, args, {})
    _check(args, uses_gpu(cfg))
    world = args.num_gpus * args.num_machines
    if world <= 1:
        return _run_process(0, task, cfg, args)
    if not uses_gpu(cfg) and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // args.num_gpus, 1))
    rank, meeting = args.machine_rank * args.num_gpus, _meeting_point(args)
    arguments = (task, cfg, args, {"init_method": meeting, "world_size": world, "rank": rank})
    return _wait(mp.start_processes(_worker, arguments, args.num_gpus, join=False, start_method="spawn"))


def _check(args: argparse.Namespace, on_gpu: bool) -> None:
    if args.num_gpus < 1 or args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} --machine-rank "
            f"{args.machine_rank}: give at least one of each, and ranks from 0."
        )
    if on_gpu and args.num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus is {args.num_gpus}, but this machine has {torch.cuda.device_count()} GPUs: give as "
            "many as there are, or MODEL.DEVICE cpu for processes on the CPU."
        )


def _meeting_point(args: argparse.Namespace) -> str:
    # The parser's default is one port a user: two runs of one user would meet each other.
    if args.dist_url not in ("", "auto", default_argument_parser().get_default("dist_url")):
        return args.dist_url
    if args.num_machines > 1:
        raise UserError(
            "--num-machines needs --dist-url: the address of machine 0, such as tcp://10.0.0.1:29500."
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def _worker(local_rank: int, task: Task, cfg, args: argparse.Namespace, place: dict[str, Any]) -> None:
    place["rank"] += local_rank
    sys.exit(_run_process(local_rank, task, cfg, args, place))


def _run_process(
    local_rank: int, task: Task, cfg, args: argparse.Namespace, place: dict[str, Any] | None = None
) -> int:
    """One process of a run. Its exit status; errors that say all there is to say become one line.

    place: where it meets the others; empty: torchrun's environment says; None: there are no others.
    """
    status = 0
    try:
        if place is not None:
            _join(local_rank, uses_gpu(cfg), place)
        alone = locked(cfg.OUTPUT_DIR) if comm.is_main_process() else contextlib.nullcontext()
        with alone, output_errors():
            classes = setup_run(task, cfg, args)
            if args.eval_only:
                evaluate_only(task, cfg, classes, args.resume)
            else:
                train(task, cfg, classes, args.resume)
                if comm.is_main_process():
                    task.after_training(cfg, classes)
    except Stopped as stop:  # in all processes, and the main one has said so
        status = 128 + stop.args[0] if comm.is_main_process() else 0
    except KeyboardInterrupt:  # at once
        return 128 + signal.SIGINT
    except (UserError, NonFiniteLossError) as error:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return report(error, f" (process {rank})" if rank else "")
    if place is not None:  # where one failed the others are stopped, not waited for
        dist.destroy_process_group()
    return status


def _join(local_rank: int, on_gpu: bool, place: dict[str, Any]) -> None:
    if on_gpu:
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, **place)
    except (RuntimeError, ValueError, dist.DistError) as error:
        where = place.get("init_method", "the address of torchrun")
        raise UserError(f"the processes could not meet at {where}: {error}") from error


def _wait(context: mp.ProcessContext) -> int:
    """Wait for the processes; when one ends badly, stop the others and say which it was."""
    with StopSignals(tell=context.processes) as signals:
        try:
            while not context.join(timeout=1.0):
                pass
        except mp.ProcessExitedException as error:
            if error.signal_name is None:
                return error.exit_code  # it has said why
            if not signals.caught:
                who = f"error: process {error.error_index} was killed ({error.signal_name}), the others were "
                what = "stopped: --resume continues from the last checkpoint, if one was saved."
                print(who + what, file=sys.stderr)
                return 1
    return 128 + signals.caught if signals.caught else 0
