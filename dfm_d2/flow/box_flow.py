"""How raw answers of predictors move boxes: the settings of dfm_kernels' box-flow update, in one place.

Shapes: B images, N proposals, D predictors, K classes.
"""

from dataclasses import dataclass

from dfm_kernels.box_flow_update import BoxFlowUpdate, box_flow_update, decode_endpoint
from torch import Tensor


@dataclass(frozen=True)
class BoxFlow:
    """Args:
    signal_scale: s of the box space. box_weights: divide box deltas.
    aggregation: "uniform" or "confidence".
    """

    signal_scale: float
    box_weights: tuple[float, float, float, float] = (2.0, 2.0, 1.0, 1.0)
    aggregation: str = "uniform"

    def endpoint(self, x_t: Tensor, answer: Tensor) -> Tensor:
        """`x_1_hat` `(B, N, 4)` signal, not clamped, of one raw answer `(B, N, 4)` at `x_t`."""
        answer = answer.to(x_t.dtype)
        return decode_endpoint(x_t, answer, signal_scale=self.signal_scale, box_weights=self.box_weights)

    def update(
        self,
        x_t: Tensor,
        answers: Tensor,
        class_logits: Tensor,
        t: Tensor,
        t_next: Tensor,
        image_sizes: Tensor,
    ) -> BoxFlowUpdate:
        """One Euler step along the aggregated velocity; see dfm_kernels.box_flow_update."""
        return box_flow_update(
            x_t,
            answers,
            class_logits,
            t,
            t_next,
            image_sizes,
            signal_scale=self.signal_scale,
            box_weights=self.box_weights,
            aggregation=self.aggregation,
        )
