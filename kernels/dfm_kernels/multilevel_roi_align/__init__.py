"""RoIAlign over the levels of a feature pyramid, equal to Detectron2's `ROIPooler("ROIAlignV2")`."""

from dfm_kernels.multilevel_roi_align.op import multilevel_roi_align
from dfm_kernels.multilevel_roi_align.reference import assign_levels, size_tensor

__all__ = ["assign_levels", "multilevel_roi_align", "size_tensor"]
