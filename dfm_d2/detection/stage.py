"""A backbone stage as a block of its own (BACKBONE_UPDATE "local").

Shapes: B images, N proposals, C channels of the head, C_s of the stage.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from dfm_d2.detection.head import FlowHead, HeadAnswer
from dfm_d2.flow import at_least_float32


class StagePredictor(nn.Module):
    """A projection of the stage's output, and a predictor that sees nothing else. Training needs it only.

    Args:
        in_channels: C_s. dim: C.
        head: its pooler has the one level of the stage.
    """

    def __init__(self, in_channels: int, dim: int, head: FlowHead):
        super().__init__()
        self.lateral = nn.Conv2d(in_channels, dim, 1)
        self.head = head

    def forward(self, feature: Tensor, boxes_xyxy: Tensor, x_t: Tensor, t: Tensor) -> HeadAnswer:
        """Answer at t `(B,)` for proposals `(B, N, 4)` in pixels and in signal, from `(B, C_s, H, W)`."""
        return self.head([at_least_float32(self.lateral(feature))], boxes_xyxy, x_t, t)


@contextmanager
def given_features(bottom_up: nn.Module, outputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it a bottom-up network answers `outputs`, computed stage by stage before, to the FPN on it."""
    bottom_up.forward = lambda _images: dict(outputs)
    try:
        yield
    finally:
        del bottom_up.forward
