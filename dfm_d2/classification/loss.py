"""The local loss of one block of a classifier.

Shapes: B images, S points of the path an image, E embedding dimensions, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class EndpointLoss:
    """`mean w(t) |x_1_hat - x_1|^2 + w_r CE(<x_1_hat, e_k> / T)` (docs/classification.md, equation 3).

    Args:
        weighting: "velocity", `w(t) = min((1 - t)^-2, w_max)`, with which the first term is the error of the
            velocity `(x_1_hat - x_t) / (1 - t)`; or "plain", `w = 1`.
        velocity_max: w_max.
        readout_weight: w_r; 0 leaves the term out. temperature: T.
    """

    weighting: str = "plain"
    velocity_max: float = 25.0
    readout_weight: float = 1.0
    temperature: float = 0.1

    def __call__(
        self, x_1_hat: Tensor, target: Tensor, t: Tensor, embeddings: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Weighted scalars "flow" and "readout".

        Args:
            x_1_hat, target: `(B, S, E)`. t: `(B, S)`. embeddings: `(K, E)`. labels: `(B,)`.
        """
        # Detached: learned embeddings must not come to their endpoints, where all would be one.
        error = (x_1_hat - target.detach()).square().sum(-1)
        if self.weighting == "velocity":
            error = error * torch.clamp((1 - t) ** -2, max=self.velocity_max)
        losses = {"flow": error.mean()}
        if self.readout_weight > 0:
            logits = x_1_hat @ embeddings.T / self.temperature
            repeated = labels[:, None].expand(-1, x_1_hat.shape[1])
            term = cross_entropy(logits.flatten(0, 1), repeated.flatten())
            losses["readout"] = self.readout_weight * term
        return losses
