"""Both providers for tests: the builtin subset, and Detectron2 where it is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest

from dfm_d2.framework._providers import Provider

BUILTIN = Provider("builtin")


def detectron2_provider() -> Provider:
    """Skips the test where Detectron2 is absent; fails it where DFM_REQUIRE_D2=1 demands it."""
    if importlib.util.find_spec("detectron2") is None:
        if os.environ.get("DFM_REQUIRE_D2") == "1":
            pytest.fail("DFM_REQUIRE_D2=1, but Detectron2 is not installed (make test-detectron2)")
        pytest.skip("needs the real Detectron2 (make test-detectron2)")
    return Provider("detectron2")


def run_python(*arguments: str, folder=None, first=(), **environment: str) -> subprocess.CompletedProcess:
    """Another interpreter in the folder, which imports from where this one does, from `first` before that."""
    paths = os.pathsep.join(os.path.abspath(path) for path in (*first, *sys.path))
    env = {**os.environ, "PYTHONPATH": paths, **environment}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
