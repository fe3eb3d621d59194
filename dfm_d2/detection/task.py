"""The detection task: what the engine needs to know of it."""

from dfm_d2.config import add_dfm_config
from dfm_d2.detection.checks import check_detector_start, config_problems
from dfm_d2.detection.data.loader import build_test_loader, build_train_loader
from dfm_d2.detection.data.registration import register_datasets
from dfm_d2.detection.evaluation.evaluator import DetectionEvaluator, format_table
from dfm_d2.engine.task import Task

DETECTION = Task(
    add_config=add_dfm_config,
    complete=lambda cfg: None,
    problems=config_problems,
    register=register_datasets,
    train_loader=build_train_loader,
    test_loader=build_test_loader,
    evaluator=lambda cfg, name, folder: DetectionEvaluator(name, folder, cfg.TEST.AP),
    summary=format_table,
    check_start=check_detector_start,
    before_evaluation=lambda cfg, model: None,
    without_pretrained=lambda cfg: cfg,
)
