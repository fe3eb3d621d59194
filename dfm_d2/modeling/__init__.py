"""The meta-architectures: importing this room registers them in META_ARCH_REGISTRY."""

from dfm_d2.modeling.backprop_classifier import BackpropClassifier
from dfm_d2.modeling.cascade import CascadeDetector
from dfm_d2.modeling.classifier import FlowClassifier
from dfm_d2.modeling.detector import FlowDetector
from dfm_d2.modeling.forward_forward import ForwardForwardClassifier
from dfm_d2.modeling.sampler import BoxSampler, SamplerSettings
from dfm_d2.modeling.stochastic_forward_forward import StochasticForwardForwardClassifier

__all__ = [
    "BackpropClassifier",
    "BoxSampler",
    "CascadeDetector",
    "FlowClassifier",
    "FlowDetector",
    "ForwardForwardClassifier",
    "SamplerSettings",
    "StochasticForwardForwardClassifier",
]
