"""Attack all that reads files and config values: damaged and hostile ones, by the thousand.

    python tests/attack/fuzz.py --seconds 600 --seed 0

A case takes good files or a good config, spoils one place (bits flipped, pieces lost, values of another type,
calls in pickles and YAML tags, pipes and folders in the place of files) and reads it with dfm_d2 in a forked
process of limited time and memory. An answer is right, and so is an error message of one line. Code of the
file that runs, a crash, a traceback (or a long message) and a hang are not: the last line counts them, the
exit status is 1 if there are any. A case is a function of its seed and number.
"""

import argparse
import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# ruff: noqa: E402
from spoil import CANARY, Payload, put, spoilt
from targets import Target, make_targets

from dfm_d2.errors import UserError, input_errors
from dfm_d2.local_update import NonFiniteLossError

CPU_SECONDS, WALL_SECONDS, MEMORY = 10, 90, 3 * 2**30  # of a case; memory beyond what this process has
KINDS = ("code runs", "crashes", "tracebacks", "hangs")
OK, TRACEBACK, CODE = 0, 101, 102  # how a child ends
# What nothing here has a reason to do.
STARTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")


def in_child(
    read: Callable[[random.Random], Any], folder: Path, rng: random.Random, wall: float = WALL_SECONDS
) -> tuple[str, str]:
    """Read in a child in that folder: (which of KINDS it ended in, or "", and what it printed)."""
    folder.mkdir(exist_ok=True)
    log = folder.with_suffix(".txt")
    if not (child := os.fork()):
        ended = TRACEBACK
        try:
            ended = limited(read, folder, log, rng)
        finally:
            os._exit(ended)
    deadline, pid = time.monotonic() + wall, 0
    while not pid and time.monotonic() < deadline:
        time.sleep(0.002)
        pid, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with what it has started
    ended = os.waitstatus_to_exitcode(status if pid else os.waitpid(child, 0)[1])
    of_exit = {OK: "", TRACEBACK: "tracebacks", CODE: "code runs"}
    of_exit |= dict.fromkeys((-signal.SIGXCPU, -signal.SIGKILL), "hangs")
    return of_exit.get(ended, "crashes"), log.read_text(errors="replace")


def limited(read: Callable[[random.Random], Any], folder: Path, log: Path, rng: random.Random) -> int:
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: here + MEMORY,
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_FSIZE: 2**28,
    }
    for limit, value in (limits | {resource.RLIMIT_CORE: 0}).items():
        resource.setrlimit(limit, (value, value))

    def watch(event: str, arguments: tuple) -> None:
        if event in STARTS or (event == "os.mkdir" and Path(os.fsdecode(arguments[0])).name == CANARY):
            os.write(2, f"{event} {arguments}\n".encode())
            os._exit(CODE)

    sys.addaudithook(watch)
    faulthandler.dump_traceback_later(WALL_SECONDS - 2)
    try:
        with input_errors():
            read(rng)
    except (UserError, NonFiniteLossError) as error:
        print(ascii(error)[:2000])
        return TRACEBACK if "\n" in str(error) or len(str(error)) > 1500 else OK
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        return OK if isinstance(error, SystemExit) else TRACEBACK
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return OK


def preload(target: Target, folder: Path) -> None:
    """Check that the good files are read, and import here what that imports."""

    def read(rng: random.Random) -> None:
        target.read(rng)
        Path("modules").write_text("\n".join(sys.modules))

    for name, content in target.files.items():
        put(folder / name, content, random.Random(0))
    found, said = in_child(read, folder, random.Random(1))
    assert not found, said
    for module in (folder / "modules").read_text().split() if (folder / "modules").exists() else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a target: VOC, keys, ...")
    parser.add_argument("--case", type=int, help="run this one, print what it prints and leave its files")
    parser.add_argument("--self-test", action="store_true", help="plant one of each kind: all must be found")
    args, counts, seen = parser.parse_args(), Counter(), set()
    folder, start = Path(tempfile.mkdtemp(prefix="fuzz")), time.monotonic()
    torch.set_num_threads(1)
    if args.self_test:
        unsafe = partial(pickle.loads, pickle.dumps(Payload()))
        bad = (unsafe, faulthandler._sigsegv, partial({}.__getitem__, "a"), signal.pause)
        targets = {
            kind: Target({}, lambda _, run=run: run(), 1, spoil=False) for kind, run in zip(KINDS, bad)
        }
    else:
        targets = make_targets(folder, in_child)
        for name, target in targets.items():
            preload(target, folder / f"good {name}")
    gc.freeze()
    others = [content for target in targets.values() for content in target.files.values()]
    names = [name for name in targets for _ in range(targets[name].share) if args.only in (None, name)]
    number = args.case or 0
    while time.monotonic() < start + args.seconds and not (args.self_test and number == len(KINDS)):
        rng, name = random.Random(f"{args.seed} {number}"), names[number % len(names)]
        target, case = targets[name], folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        victim = rng.choice(sorted(target.files)) if target.spoil else ""
        for path, content in target.files.items():
            put(case / path, spoilt(path, content, rng, others) if path == victim else content, rng)
        found, said = in_child(target.read, case, rng, 5 if args.self_test else WALL_SECONDS)
        counts[found] += 1
        lines = [line.strip()[:150] for line in said.splitlines() if line.strip()] or [""]
        if found and (found, name, lines[-1]) not in seen or args.case is not None:
            seen.add((found, name, lines[-1]))
            where = [line for line in lines if line.startswith("File ")][-1:]
            print(f"{found}: case {number} ({name} {victim}): {lines[-1]} {where} {lines[0]}", flush=True)
        number += 1
        if args.case is not None:
            print(said[-5000:], f"The files are in {case}")
            return 0
    shutil.rmtree(folder)
    print(f"{number} cases: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    return int(any(counts[kind] != args.self_test for kind in KINDS))


if __name__ == "__main__":
    sys.exit(main())
