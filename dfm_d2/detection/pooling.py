"""Pooling of proposals from the feature pyramid."""

from collections.abc import Sequence

from dfm_kernels.multilevel_roi_align import multilevel_roi_align
from torch import Tensor, nn


class FeaturePooler(nn.Module):
    """RoIAlign on the level that fits a proposal's size. No parameters.

    Args:
        scales: 1 / stride of each level, from fine to coarse.
        output_size: P. sampling_ratio: samples a cell and side, 0 is adaptive.
        canonical_size: side in pixels of a box that belongs on the level of stride 16.
    """

    def __init__(
        self,
        scales: Sequence[float],
        output_size: int,
        sampling_ratio: int,
        canonical_size: float = 224.0,
    ):
        super().__init__()
        self.scales = tuple(scales)
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.canonical_size = canonical_size

    def forward(self, features: Sequence[Tensor], boxes_xyxy: Tensor) -> Tensor:
        """L maps `(B, C, H_l, W_l)` and pixel boxes `(B, N, 4)` to `(B N, C, P, P)`."""
        return multilevel_roi_align(
            features,
            boxes_xyxy,
            self.scales,
            self.output_size,
            self.sampling_ratio,
            self.canonical_size,
        )
