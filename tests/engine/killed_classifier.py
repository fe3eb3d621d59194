"""Train a classifier straight, and another that is killed at its first checkpoint and resumed.

Usage: killed_classifier.py FOLDER ARGUMENTS... Each training is a forked child: they share the start-up.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import sklearn.datasets  # noqa: F401  (so that the children need not)

TOOL = Path(__file__).parents[2] / "tools/train_classifier.py"
run_command = runpy.run_path(str(TOOL))["run_command"]

from dfm_d2.engine.checkpoint import SafeCheckpointer  # noqa: E402  (the tool has put us on the path)


def train(name: str, kill: bool = False) -> None:
    """One training in a child; prints its name and its exit status or the signal that ended it."""
    child = os.fork()
    if child == 0:
        if kill:
            tag = SafeCheckpointer.tag_last_checkpoint

            def tag_and_die(self, file: str) -> None:
                tag(self, file)
                os.kill(os.getpid(), signal.SIGKILL)

            SafeCheckpointer.tag_last_checkpoint = tag_and_die
        os._exit(run_command([*sys.argv[2:], "OUTPUT_DIR", str(Path(sys.argv[1]) / name)]))
    status = os.waitpid(child, 0)[1]
    print(
        name,
        os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else os.WTERMSIG(status),
        file=sys.stderr,
    )


train("straight")
train("killed", kill=True)
assert not (Path(sys.argv[1]) / "killed/model_final.pth").exists()
train("killed")
