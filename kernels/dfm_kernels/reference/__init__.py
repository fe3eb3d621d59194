"""Reference implementations in plain torch. They are the specification of the kernels."""

from dfm_kernels.reference.box_flow_update import (
    BoxFlowUpdate,
    aggregate,
    box_flow_update,
    boxes_to_signal,
    cxcywh_to_xyxy,
    decode_endpoint,
    euler_step,
    expand_t,
    signal_to_boxes_xyxy,
    signal_to_cxcywh,
    velocity_from_endpoint,
    xyxy_to_cxcywh,
)
from dfm_kernels.reference.dynamic_interaction import dynamic_interaction
from dfm_kernels.reference.flow_loss import FlowLoss, flow_loss, paired_giou, pairwise_giou
from dfm_kernels.reference.multilevel_roi_align import assign_levels, multilevel_roi_align
from dfm_kernels.reference.path_sample import BoxPathSample, path_sample, sample_box_paths
from dfm_kernels.reference.philox import philox_4x32, philox_normal, philox_uniform
from dfm_kernels.reference.recorded import size_tensor

__all__ = [
    "BoxFlowUpdate",
    "BoxPathSample",
    "FlowLoss",
    "aggregate",
    "assign_levels",
    "box_flow_update",
    "boxes_to_signal",
    "cxcywh_to_xyxy",
    "decode_endpoint",
    "dynamic_interaction",
    "euler_step",
    "expand_t",
    "flow_loss",
    "multilevel_roi_align",
    "paired_giou",
    "pairwise_giou",
    "path_sample",
    "philox_4x32",
    "philox_normal",
    "philox_uniform",
    "sample_box_paths",
    "signal_to_boxes_xyxy",
    "signal_to_cxcywh",
    "size_tensor",
    "velocity_from_endpoint",
    "xyxy_to_cxcywh",
]
