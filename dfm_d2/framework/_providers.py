"""The two providers of dfm_d2.framework: where each name is in Detectron2 and in the builtin subset."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

# Module in dfm_d2.framework._builtin, module in detectron2: the names that are taken from it.
_NAMES = {
    ("arguments", "engine"): "default_argument_parser",
    ("checkpoint", "checkpoint"): "DetectionCheckpointer",
    ("comm", "utils.comm"): "comm",  # the module itself
    ("config", "config"): "CfgNode configurable get_cfg",
    ("events", "utils.events"): "EventStorage JSONWriter TensorboardXWriter get_event_storage",
    ("fpn", "modeling"): "BACKBONE_REGISTRY FPN build_backbone",
    ("hooks", "engine.hooks"): "EvalHook IterationTimer LRScheduler PeriodicWriter",
    ("layers", "layers"): "ShapeSpec batched_nms",
    ("layers", "modeling"): "Backbone",
    ("loops", "engine"): "HookBase TrainerBase",
    ("loops", "evaluation"): "DatasetEvaluator inference_on_dataset",
    ("registered", "data"): "DatasetCatalog MetadataCatalog",
    ("registered", "modeling"): "META_ARCH_REGISTRY build_model",
    ("solver", "solver"): "build_lr_scheduler",
    ("structures", "modeling"): "detector_postprocess",
    ("structures", "structures"): "BoxMode Boxes ImageList Instances",
    ("tracing", "export"): "TracingAdapter",
    ("utils", "utils.env"): "seed_all_rng",
    ("utils", "utils.file_io"): "PathManager",
}
PLACES = {name: modules for modules, names in _NAMES.items() for name in names.split()}
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
    present = is_present() if is_present else importlib.util.find_spec("detectron2") is not None
    if wanted == "detectron2" and not present:
        raise ImportError(
            f"DFM_FRAMEWORK is 'detectron2' but Detectron2 is not installed: run `{INSTALL_HINT}`, "
            "or unset DFM_FRAMEWORK to use the builtin subset."
        )
    return "detectron2" if present else "builtin"
