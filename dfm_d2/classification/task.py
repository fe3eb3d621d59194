"""The classification task: what the engine needs to know of it."""

from torch import nn

from dfm_d2.classification.calibration import calibrate
from dfm_d2.classification.checks import check_classifier_start, choose_method
from dfm_d2.classification.data.loader import build_class_test_loader, build_class_train_loader
from dfm_d2.classification.data.registration import HELD_OUT, register_class_sets
from dfm_d2.classification.evaluation import ClassificationEvaluator, class_summary
from dfm_d2.config import add_dfm_config
from dfm_d2.detection.checks import config_problems
from dfm_d2.engine.task import Task
from dfm_d2.framework import CfgNode


def _calibrate(cfg: CfgNode, model: nn.Module) -> None:
    if cfg.DATASETS.HOLD_OUT > 0:
        calibrate(cfg, model, build_class_test_loader(cfg, HELD_OUT))


def _without_pretrained(cfg: CfgNode) -> CfgNode:
    """timm's file of weights need not be there any more."""
    changed = cfg.clone()
    changed.defrost()
    changed.MODEL.CLASSIFIER.TIMM.WEIGHTS = ""
    return changed


CLASSIFICATION = Task(
    add_config=add_dfm_config,
    complete=choose_method,
    problems=config_problems,
    register=register_class_sets,
    train_loader=build_class_train_loader,
    test_loader=build_class_test_loader,
    evaluator=lambda cfg, name, folder: ClassificationEvaluator(name, folder),
    summary=class_summary,
    check_start=check_classifier_start,
    before_evaluation=_calibrate,
    without_pretrained=_without_pretrained,
)
