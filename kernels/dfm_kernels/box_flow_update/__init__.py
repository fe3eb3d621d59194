"""One solver step: raw answers of D predictors to the next boxes. And the geometry that it is made of."""

from dfm_kernels.box_flow_update.op import box_flow_update
from dfm_kernels.box_flow_update.reference import (
    BoxFlowUpdate,
    aggregate,
    boxes_to_signal,
    cxcywh_to_xyxy,
    decode_endpoint,
    euler_step,
    expand_t,
    signal_to_boxes_xyxy,
    signal_to_cxcywh,
    xyxy_to_cxcywh,
)

__all__ = ["BoxFlowUpdate", "box_flow_update"]
__all__ += ["aggregate", "decode_endpoint", "euler_step", "expand_t"]
__all__ += ["boxes_to_signal", "signal_to_boxes_xyxy", "signal_to_cxcywh"]
__all__ += ["cxcywh_to_xyxy", "xyxy_to_cxcywh"]
