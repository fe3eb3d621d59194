"""Registers the meta-architectures of both verticals in META_ARCH_REGISTRY."""

import dfm_d2.classification.backprop
import dfm_d2.classification.flow_classifier
import dfm_d2.classification.forward_forward
import dfm_d2.classification.stochastic_forward_forward
import dfm_d2.detection.cascade  # noqa: F401
