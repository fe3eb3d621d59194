"""The subset of Detectron2 that dfm_d2 calls, under Detectron2's names, for machines without Detectron2.

Written on fvcore, iopath and torchvision. Same config keys, parameter names, checkpoints and numbers:
contract and golden tests (tests/framework) hold it to the real Detectron2.
"""

from dfm_d2.framework._builtin import comm
from dfm_d2.framework._builtin.arguments import default_argument_parser
from dfm_d2.framework._builtin.backbone import (
    META_ARCH_REGISTRY,
    Backbone,
    build_backbone,
    build_model,
)
from dfm_d2.framework._builtin.boxes import Boxes, BoxMode
from dfm_d2.framework._builtin.catalog import DatasetCatalog, MetadataCatalog
from dfm_d2.framework._builtin.checkpoint import DetectionCheckpointer
from dfm_d2.framework._builtin.config import CfgNode, configurable, get_cfg
from dfm_d2.framework._builtin.env import seed_all_rng
from dfm_d2.framework._builtin.evaluation import DatasetEvaluator, inference_on_dataset
from dfm_d2.framework._builtin.events import (
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from dfm_d2.framework._builtin.file_io import PathManager
from dfm_d2.framework._builtin.fpn import build_resnet_fpn_backbone  # registers itself
from dfm_d2.framework._builtin.hooks import (
    EvalHook,
    IterationTimer,
    LRScheduler,
    PeriodicCheckpointer,
    PeriodicWriter,
)
from dfm_d2.framework._builtin.image_list import ImageList
from dfm_d2.framework._builtin.instances import Instances
from dfm_d2.framework._builtin.layers import batched_nms
from dfm_d2.framework._builtin.postprocessing import detector_postprocess
from dfm_d2.framework._builtin.resnet import build_resnet_backbone  # registers itself
from dfm_d2.framework._builtin.solver import build_lr_scheduler
from dfm_d2.framework._builtin.tracing import TracingAdapter
from dfm_d2.framework._builtin.train_loop import HookBase, TrainerBase

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
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "comm",
    "configurable",
    "default_argument_parser",
    "detector_postprocess",
    "get_cfg",
    "get_event_storage",
    "inference_on_dataset",
    "seed_all_rng",
]
