"""The meta-architectures: importing this room registers them in META_ARCH_REGISTRY."""

from dfm_d2.modeling.backprop_classifier import BackpropClassifier
from dfm_d2.modeling.cascade import CascadeDetector
from dfm_d2.modeling.classifier import FlowClassifier
from dfm_d2.modeling.detector import FlowDetector
from dfm_d2.modeling.sampler import BoxSampler, SamplerSettings

__all__ = [
    "BackpropClassifier",
    "BoxSampler",
    "CascadeDetector",
    "FlowClassifier",
    "FlowDetector",
    "SamplerSettings",
]
