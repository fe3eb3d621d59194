"""Running Detectron2's own scripts, unchanged, on configs that have keys of ours."""

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dfm_d2.framework._choice import INSTALL_HINT


def run_detectron2_script(path: str, arguments: Sequence[str], add_keys: Callable[[object], None]) -> None:
    """Run the file as a program of its own, where ``get_cfg()`` answers a config that `add_keys` completed.

    Raises FileNotFoundError where there is no such file, ImportError where Detectron2 is not the provider.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a script of Detectron2, as tools/analyze_model.py."
        )
    from dfm_d2.framework import PROVIDER  # not above: the package imports this file

    if PROVIDER != "detectron2":
        raise ImportError(
            f"{path} needs Detectron2, but the framework is {PROVIDER}: run `{INSTALL_HINT}`, or unset "
            "DFM_FRAMEWORK."
        )
    from dfm_d2.framework import _detectron2

    before = sys.argv
    sys.argv = [str(path), *arguments]
    try:
        with _detectron2.completed_configs(add_keys):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
