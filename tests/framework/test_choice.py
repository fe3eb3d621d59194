"""Which provider is chosen, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from require_detectron2 import detectron2_provider

from dfm_d2.framework._choice import choose_provider

ROOT = Path(__file__).resolve().parents[2]
PRINT_PROVIDER = "import dfm_d2.framework as f; print(f.PROVIDER, f.Boxes.__module__)"
# Python code that makes `import detectron2` impossible, as on a machine without it.
HIDE = (
    "import importlib.util as u; find = u.find_spec; "
    "u.find_spec = lambda name, package=None: None if name == 'detectron2' else find(name, package); "
)


def _run(code: str, choice: str | None, extra_path: Path | None = None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "DFM_FRAMEWORK"}
    paths = [extra_path, ROOT, ROOT / "kernels", env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    if choice is not None:
        env["DFM_FRAMEWORK"] = choice
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
    )


@pytest.fixture
def broken_detectron2(tmp_path):
    """A folder with a package detectron2 that is present but cannot be imported."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('this Detectron2 is broken')\n")
    return tmp_path


def test_auto_without_detectron2_is_builtin():
    done = _run(HIDE + PRINT_PROVIDER, None)
    assert done.stdout.split() == ["builtin", "dfm_d2.framework._builtin.boxes"], done.stderr


def test_builtin_where_detectron2_is_importable(broken_detectron2):
    """That the broken one does no harm proves that it is not imported. The choice is logged."""
    code = "import logging; logging.basicConfig(level=logging.INFO); " + PRINT_PROVIDER
    done = _run(code, "builtin", broken_detectron2)
    assert done.stdout.split() == ["builtin", "dfm_d2.framework._builtin.boxes"], done.stderr
    assert "provider builtin" in done.stderr


def test_detectron2_asked_for_and_absent():
    done = _run(HIDE + PRINT_PROVIDER, "detectron2")
    assert done.returncode != 0
    assert "DFM_FRAMEWORK is 'detectron2' but Detectron2 is not installed" in done.stderr
    assert "requirements-detectron2.txt" in done.stderr


@pytest.mark.parametrize("choice", ["auto", "detectron2"])
def test_present_but_broken_raises(choice, broken_detectron2):
    done = _run(PRINT_PROVIDER, choice, broken_detectron2)
    assert done.returncode != 0
    assert "this Detectron2 is broken" in done.stderr


def test_bad_value():
    done = _run(PRINT_PROVIDER, "detectron")
    assert done.returncode != 0
    assert "DFM_FRAMEWORK is 'detectron': set it to one of auto, detectron2, builtin" in done.stderr


@pytest.mark.d2
@pytest.mark.parametrize("choice", [None, "detectron2"])
def test_the_real_detectron2_is_used(choice):
    detectron2_provider()
    done = _run(PRINT_PROVIDER, choice)
    assert done.stdout.split() == ["detectron2", "detectron2.structures.boxes"], done.stderr


def test_presence_is_asked_only_where_it_matters():
    assert choose_provider("auto", lambda: True) == "detectron2"
    assert choose_provider("auto", lambda: False) == "builtin"
    assert choose_provider("builtin", lambda: pytest.fail("asked")) == "builtin"
