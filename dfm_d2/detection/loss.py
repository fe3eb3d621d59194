"""The local loss of one predictor.

Shapes: B images, N proposals, K classes.
"""

from dataclasses import dataclass

from dfm_kernels.flow_loss import flow_loss
from torch import Tensor

from dfm_d2.local_update.processes import mean_over_processes, world_size


@dataclass(frozen=True)
class BlockLoss:
    """`w_cls L_cls + w_l1 L_1 + w_giou L_giou + w_v L_v` (docs/math.md, equation 9).

    Args:
        signal_scale: s of the box space.
        focal_gamma: of the class loss, and with focal_alpha of the matching cost.
        cls_weight, l1_weight, giou_weight, velocity_weight: weights; a term of weight 0 is left out.
        velocity_max: w_max, bound of `(1 - t)^-2`.
    """

    signal_scale: float
    cls_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    velocity_weight: float = 0.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    velocity_max: float = 25.0

    def __call__(
        self, class_logits: Tensor, x_1_hat: Tensor, target_classes: Tensor, target_x_1: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Weighted scalars "cls", "l1", "giou", "velocity", each per foreground query of the batch.

        Args:
            class_logits: `(B, N, K)`. x_1_hat, target_x_1: `(B, N, 4)` signal.
            target_classes: `(B, N)`, K for background. t: `()` or `(B,)`.
        """
        # Of all processes together: W of them with B / W images give the loss of one with B.
        foreground = (target_classes < class_logits.shape[-1]).sum().to(x_1_hat.dtype)
        normalizer = mean_over_processes(foreground).clamp(min=1 / world_size())
        options = {"gamma": self.focal_gamma, "velocity_max": self.velocity_max}
        tensors = (class_logits, x_1_hat, target_classes, target_x_1, t, normalizer)
        terms = flow_loss(*tensors, signal_scale=self.signal_scale, **options)
        weights = (self.cls_weight, self.l1_weight, self.giou_weight, self.velocity_weight)
        return {name: w * term for name, w, term in zip(terms._fields, weights, terms) if w != 0}
