"""The two providers of dfm_d2.framework: where each name is in Detectron2 and in the builtin subset."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

# Name: its module in dfm_d2.framework._builtin, its module in detectron2.
PLACES = {
    "Backbone": ("backbone", "modeling"),
    "BoxMode": ("structures", "structures"),
    "Boxes": ("structures", "structures"),
    "CfgNode": ("config", "config"),
    "DatasetCatalog": ("catalog", "data"),
    "DatasetEvaluator": ("evaluation", "evaluation"),
    "DetectionCheckpointer": ("checkpoint", "checkpoint"),
    "EvalHook": ("hooks", "engine.hooks"),
    "EventStorage": ("events", "utils.events"),
    "HookBase": ("train_loop", "engine"),
    "ImageList": ("structures", "structures"),
    "Instances": ("structures", "structures"),
    "IterationTimer": ("hooks", "engine.hooks"),
    "JSONWriter": ("events", "utils.events"),
    "LRScheduler": ("hooks", "engine.hooks"),
    "META_ARCH_REGISTRY": ("registry", "modeling"),
    "MetadataCatalog": ("catalog", "data"),
    "PathManager": ("utils", "utils.file_io"),
    "PeriodicCheckpointer": ("hooks", "engine.hooks"),
    "PeriodicWriter": ("hooks", "engine.hooks"),
    "TensorboardXWriter": ("events", "utils.events"),
    "TracingAdapter": ("tracing", "export"),
    "TrainerBase": ("train_loop", "engine"),
    "batched_nms": ("layers", "layers"),
    "build_backbone": ("fpn", "modeling"),
    "build_lr_scheduler": ("solver", "solver"),
    "build_model": ("registry", "modeling"),
    "comm": ("comm", "utils.comm"),  # a module itself
    "configurable": ("config", "config"),
    "default_argument_parser": ("arguments", "engine"),
    "detector_postprocess": ("structures", "modeling"),
    "get_cfg": ("defaults", "config"),
    "get_event_storage": ("events", "utils.events"),
    "inference_on_dataset": ("evaluation", "evaluation"),
    "seed_all_rng": ("utils", "utils.env"),
}
CHOICES = ("auto", "detectron2", "builtin")
INSTALL_HINT = "pip install --no-build-isolation -r requirements-detectron2.txt"


class Provider:
    """A provider's names as attributes. What a name needs is imported when it is first asked for."""

    def __init__(self, name: str):
        """`name` is "builtin" or "detectron2"."""
        self.name = name

    def __getattr__(self, name: str) -> Any:
        if name not in PLACES:
            raise AttributeError(f"dfm_d2.framework has no {name!r}: it is a closed list of names")
        ours, theirs = PLACES[name]
        place = f"dfm_d2.framework._builtin.{ours}" if self.name == "builtin" else f"detectron2.{theirs}"
        module = importlib.import_module(place)
        value = module if name == "comm" else getattr(module, name)
        setattr(self, name, value)
        return value


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
