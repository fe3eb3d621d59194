"""The detection task: what the engine needs to know of it."""

from dfm_d2.detection import config
from dfm_d2.engine.task import Imported, Task

_REGISTRATION = "dfm_d2.detection.data.registration"
_LOADER = "dfm_d2.detection.data.loader"
_EVALUATOR = "dfm_d2.detection.evaluation.evaluator"


def _evaluator(cfg, name, folder):
    return Imported(_EVALUATOR, "DetectionEvaluator")(name, folder)


DETECTION = Task(
    keys=config.KEYS,
    removed=config.REMOVED,
    problems=config.problems,
    check_start=config.check_start,
    models=("dfm_d2.detection.cascade",),  # FlowDetector, too
    find_data=Imported(_REGISTRATION, "locate_datasets"),
    register=Imported("dfm_d2.detection.data.overview", "register_and_show"),
    train_loader=Imported(_LOADER, "build_train_loader"),
    test_loader=Imported(_LOADER, "build_test_loader"),
    evaluator=_evaluator,
    summary=Imported(_EVALUATOR, "format_table"),
    calibrate=Imported("dfm_d2.detection.calibration", "calibrate"),
    after_training=Imported("dfm_d2.detection.flow_pictures", "write_root_pictures"),
)
