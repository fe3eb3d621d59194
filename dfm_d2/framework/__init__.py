"""The closed list of what dfm_d2 uses of Detectron2, from Detectron2 itself or from the builtin subset.

The environment variable DFM_FRAMEWORK (auto, detectron2 or builtin; default auto) is read once, here, at the
first import; PROVIDER says what was chosen. Nothing else in dfm_d2 imports detectron2.
"""

import logging
import os

from dfm_d2.framework._choice import choose_provider

PROVIDER = choose_provider(os.environ.get("DFM_FRAMEWORK", "auto"))

if PROVIDER == "detectron2":
    from dfm_d2.framework import _detectron2 as _provider
else:
    from dfm_d2.framework import _builtin as _provider

logging.getLogger(__name__).info("dfm_d2.framework: provider %s", PROVIDER)

# config
CfgNode = _provider.CfgNode
configurable = _provider.configurable
get_cfg = _provider.get_cfg
# structures
Boxes = _provider.Boxes
BoxMode = _provider.BoxMode
ImageList = _provider.ImageList
Instances = _provider.Instances
# layers
batched_nms = _provider.batched_nms
# modeling
META_ARCH_REGISTRY = _provider.META_ARCH_REGISTRY
Backbone = _provider.Backbone
build_backbone = _provider.build_backbone
build_model = _provider.build_model
detector_postprocess = _provider.detector_postprocess
# data
DatasetCatalog = _provider.DatasetCatalog
MetadataCatalog = _provider.MetadataCatalog
# solver
build_lr_scheduler = _provider.build_lr_scheduler
# engine
EvalHook = _provider.EvalHook
HookBase = _provider.HookBase
IterationTimer = _provider.IterationTimer
LRScheduler = _provider.LRScheduler
PeriodicCheckpointer = _provider.PeriodicCheckpointer
PeriodicWriter = _provider.PeriodicWriter
TrainerBase = _provider.TrainerBase
default_argument_parser = _provider.default_argument_parser
# events
EventStorage = _provider.EventStorage
get_event_storage = _provider.get_event_storage
JSONWriter = _provider.JSONWriter
TensorboardXWriter = _provider.TensorboardXWriter
# evaluation
DatasetEvaluator = _provider.DatasetEvaluator
inference_on_dataset = _provider.inference_on_dataset
# checkpoint
DetectionCheckpointer = _provider.DetectionCheckpointer
# export
TracingAdapter = _provider.TracingAdapter
# utils
PathManager = _provider.PathManager
comm = _provider.comm
seed_all_rng = _provider.seed_all_rng

# ours, the same on both providers; below the names because it uses PathManager
from dfm_d2.framework._config_files import merge_config_file, merge_config_opts  # noqa: E402
from dfm_d2.framework._scripts import run_detectron2_script  # noqa: E402

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
    "PROVIDER",
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
    "merge_config_file",
    "merge_config_opts",
    "run_detectron2_script",
    "seed_all_rng",
]
