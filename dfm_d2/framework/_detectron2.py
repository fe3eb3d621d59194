"""The names of dfm_d2.framework as the real Detectron2 has them. The only file that imports detectron2."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import detectron2.config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, TrainerBase, default_argument_parser
from detectron2.engine.hooks import (
    EvalHook,
    IterationTimer,
    LRScheduler,
    PeriodicCheckpointer,
    PeriodicWriter,
)
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.export import TracingAdapter
from detectron2.layers import batched_nms
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_backbone,
    build_model,
    detector_postprocess,
)
from detectron2.solver import build_lr_scheduler
from detectron2.structures import Boxes, BoxMode, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import (
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from detectron2.utils.file_io import PathManager

__all__ = [
    "Backbone",
    "BoxMode",
    "Boxes",
    "CfgNode",
    "DatasetCatalog",
    "DatasetEvaluator",
    "DetectionCheckpointer",
    "EvalHook",
    "EventStorage",
    "HookBase",
    "ImageList",
    "Instances",
    "IterationTimer",
    "JSONWriter",
    "LRScheduler",
    "META_ARCH_REGISTRY",
    "MetadataCatalog",
    "PathManager",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "TensorboardXWriter",
    "TracingAdapter",
    "TrainerBase",
    "batched_nms",
    "build_backbone",
    "build_lr_scheduler",
    "build_model",
    "comm",
    "configurable",
    "default_argument_parser",
    "detector_postprocess",
    "get_cfg",
    "get_event_storage",
    "inference_on_dataset",
    "seed_all_rng",
]


@contextmanager
def completed_configs(add_keys: Callable[[CfgNode], None]) -> Iterator[None]:
    """Within it, the ``get_cfg`` of detectron2.config answers configs that `add_keys` completed."""

    def completed() -> CfgNode:
        cfg = get_cfg()
        add_keys(cfg)
        return cfg

    detectron2.config.get_cfg = completed
    try:
        yield
    finally:
        detectron2.config.get_cfg = get_cfg
