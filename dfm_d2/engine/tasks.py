"""What differs between training a detector and a classifier; the rest of the engine is common."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dfm_d2.data.class_loader import build_class_test_loader, build_class_train_loader
from dfm_d2.data.class_registration import HELD_OUT, register_class_sets
from dfm_d2.data.loader import build_test_loader, build_train_loader
from dfm_d2.data.registration import register_datasets
from dfm_d2.engine.calibration import calibrate
from dfm_d2.engine.validate import check_detector_start
from dfm_d2.engine.validate_classifier import check_classifier_start
from dfm_d2.evaluation.classification import ClassificationEvaluator, class_summary
from dfm_d2.evaluation.detection import DetectionEvaluator, format_table
from dfm_d2.framework import META_ARCH_REGISTRY, CfgNode, DatasetEvaluator


@dataclass(frozen=True)
class Task:
    """register: read and register the data sets of a config.
    train_loader: of a config and a position. test_loader: of a config and the name of a set.
    evaluator: of a config, a set and a folder. summary: its results as text.
    check_start: ValueError if training from scratch would leave random layers untrained.
    before_evaluation: of a config and a model, what its evaluation wants done first.
    """

    register: Callable[[CfgNode], Any]
    train_loader: Callable[[CfgNode, int], Iterable[list[dict]]]
    test_loader: Callable[[CfgNode, str], Any]
    evaluator: Callable[[CfgNode, str, Any], DatasetEvaluator]
    summary: Callable[[Mapping[str, Any]], str]
    check_start: Callable[[CfgNode], None]
    before_evaluation: Callable[[CfgNode, nn.Module], None]


def _nothing(cfg: CfgNode, model: nn.Module) -> None:
    """A detector is evaluated as it is."""


def _calibrate(cfg: CfgNode, model: nn.Module) -> None:
    if cfg.DATASETS.HOLD_OUT > 0:
        calibrate(cfg, model, build_class_test_loader(cfg, HELD_OUT))


DETECTION = Task(
    register=register_datasets,
    train_loader=build_train_loader,
    test_loader=build_test_loader,
    evaluator=lambda cfg, name, folder: DetectionEvaluator(name, folder, cfg.TEST.AP),
    summary=format_table,
    check_start=check_detector_start,
    before_evaluation=_nothing,
)
CLASSIFICATION = Task(
    register=register_class_sets,
    train_loader=build_class_train_loader,
    test_loader=build_class_test_loader,
    evaluator=lambda cfg, name, folder: ClassificationEvaluator(name, folder),
    summary=class_summary,
    check_start=check_classifier_start,
    before_evaluation=_calibrate,
)
TASKS = {"detection": DETECTION, "classification": CLASSIFICATION}


def task_of(cfg: CfgNode) -> Task:
    """The task of MODEL.META_ARCHITECTURE, by the class's attribute `task`; detection where it has none."""
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return TASKS[getattr(model, "task", "detection")]
