"""Which of the two providers of dfm_d2.framework is used: the real Detectron2 or the builtin subset."""

import importlib.util
from collections.abc import Callable

CHOICES = ("auto", "detectron2", "builtin")
INSTALL_HINT = "pip install --no-build-isolation -r requirements-detectron2.txt"


def choose_provider(wanted: str, is_present: Callable[[], bool] | None = None) -> str:
    """Answer "detectron2" or "builtin" for a value of the environment variable DFM_FRAMEWORK.

    "auto" answers "builtin" only where the package detectron2 is absent. A Detectron2 that is present but
    broken is chosen all the same, so that importing it raises: a silent switch would hide a broken install.

    Raises ValueError for a value that is not one of CHOICES, and ImportError where "detectron2" is asked for
    and absent.
    """
    if wanted not in CHOICES:
        raise ValueError(f"DFM_FRAMEWORK is {wanted!r}: set it to one of {', '.join(CHOICES)}, or unset it.")
    if wanted == "builtin":
        return "builtin"
    present = (is_present or _detectron2_is_present)()
    if wanted == "detectron2" and not present:
        raise ImportError(
            f"DFM_FRAMEWORK is 'detectron2' but Detectron2 is not installed: run `{INSTALL_HINT}`, "
            "or unset DFM_FRAMEWORK to use the builtin subset."
        )
    return "detectron2" if present else "builtin"


def _detectron2_is_present() -> bool:
    return importlib.util.find_spec("detectron2") is not None
