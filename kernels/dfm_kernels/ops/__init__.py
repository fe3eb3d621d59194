"""The ops of the flow head: each chooses between its reference and its Triton kernel (see dispatch)."""

from dfm_kernels.ops.box_flow_update import box_flow_update
from dfm_kernels.ops.dynamic_interaction import dynamic_interaction
from dfm_kernels.ops.flow_loss import flow_loss
from dfm_kernels.ops.multilevel_roi_align import multilevel_roi_align
from dfm_kernels.ops.path_sample import sample_box_paths

__all__ = ["box_flow_update", "dynamic_interaction", "flow_loss", "multilevel_roi_align", "sample_box_paths"]
