"""The classification task: what the engine needs to know of it."""

from dfm_d2.classification import config
from dfm_d2.engine.task import Imported, Task

_REGISTRATION = "dfm_d2.classification.data.registration"
_LOADER = "dfm_d2.classification.data.loader"
_EVALUATION = "dfm_d2.classification.evaluation"


def _evaluator(cfg, name, folder):
    return Imported(_EVALUATION, "ClassificationEvaluator")(name, folder)


CLASSIFICATION = Task(
    keys=config.KEYS,
    removed=config.REMOVED,
    complete=config.choose_method,
    problems=config.problems,
    models=("dfm_d2.classification.flow_classifier", "dfm_d2.classification.baselines"),
    find_data=Imported(_REGISTRATION, "locate_class_sets"),
    register=Imported(_REGISTRATION, "register_class_sets"),
    train_loader=Imported(_LOADER, "build_class_train_loader"),
    test_loader=Imported(_LOADER, "build_class_test_loader"),
    evaluator=_evaluator,
    summary=Imported(_EVALUATION, "class_summary"),
    after_training=Imported("dfm_d2.classification.training_pictures", "write_class_pictures"),
)
