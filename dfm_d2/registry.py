"""Registers the meta-architectures of both verticals, for programs that build models without a Task."""

from importlib import import_module

from dfm_d2.classification.task import CLASSIFICATION
from dfm_d2.detection.task import DETECTION

for _module in (*DETECTION.models, *CLASSIFICATION.models):
    import_module(_module)
