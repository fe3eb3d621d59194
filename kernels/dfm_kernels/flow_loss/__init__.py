"""The loss of one predictor, and the IoU that it is made of."""

from dfm_kernels.flow_loss.op import flow_loss
from dfm_kernels.flow_loss.reference import FlowLoss, paired_giou, pairwise_giou

__all__ = ["FlowLoss", "flow_loss", "paired_giou", "pairwise_giou"]
