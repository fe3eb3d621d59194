"""The arguments of a command."""

import argparse
import os
import sys


def default_argument_parser() -> argparse.ArgumentParser:
    """A parser of Detectron2's options, with trailing KEY VALUE overrides as `opts`."""
    examples = (
        f"examples:\n  {sys.argv[0]} --config-file cfg.yaml\n"
        f"  {sys.argv[0]} --config-file cfg.yaml --eval-only MODEL.WEIGHTS model.pth SEED 1"
    )
    parser = argparse.ArgumentParser(epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="a YAML config file")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR, if there is one")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, do not train")
    add("--num-gpus", type=int, default=1, help="number of processes on this machine, one per GPU")
    add("--num-machines", type=int, default=1, help="number of machines")
    add("--machine-rank", type=int, default=0, help="which of the machines this is, from 0")
    # One port per user: two users on one machine do not meet, and a process left over is noticed.
    user = os.getuid() if hasattr(os, "getuid") else 1
    port = 2**15 + 2**14 + hash(user) % 2**14
    add("--dist-url", default=f"tcp://127.0.0.1:{port}", help="where the processes meet")
    add("opts", nargs=argparse.REMAINDER, default=None, help="config overrides: KEY VALUE KEY VALUE ...")
    return parser
