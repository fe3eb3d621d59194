"""Classes as points: every class is an embedding, and an endpoint is read out by the nearest one.

Shapes: B samples, K classes, E embedding dimensions.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class LabelSpace(nn.Module):
    """Class embeddings of one norm, so that the nearest is the one with the greatest inner product.

    Args:
        embeddings: `(K, E)`, normalised to length `radius`.
        learned: whether the embeddings are trained (they are normalised at every use).
        radius: length of every embedding; noise `N(0, I)` has length about `sqrt(E)`.

    Raises:
        ValueError: not a matrix, a row that is zero or not finite, or a radius that is not positive.
    """

    def __init__(self, embeddings: Tensor, *, learned: bool = False, radius: float = 1.0):
        super().__init__()
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be (K, E), got {tuple(embeddings.shape)}")
        lengths = embeddings.norm(dim=1)
        rows = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"embeddings must have a direction, but those of classes {rows} are zero or not finite"
            )
        if not radius > 0:
            raise ValueError(f"radius must be positive, got {radius}")
        self.radius = radius
        if learned:
            self.weight = nn.Parameter(embeddings.clone())
        else:
            self.register_buffer("weight", embeddings.clone())

    @classmethod
    def orthonormal(cls, num_classes: int, dim: int, *, seed: int = 0, radius: float = 1.0) -> "LabelSpace":
        """Fixed orthonormal embeddings, random by `seed`.

        Raises:
            ValueError: more classes than dimensions.
        """
        if not 1 <= num_classes <= dim:
            raise ValueError(f"{num_classes} orthonormal classes need at least as many dimensions, got {dim}")
        generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(dim, num_classes, generator=generator, dtype=torch.float64))
        return cls(basis.T.to(torch.float32), radius=radius)

    @property
    def embeddings(self) -> Tensor:
        """`(K, E)`, each of length `radius`."""
        return normalize(self.weight, dim=1) * self.radius

    def encode(self, labels: Tensor) -> Tensor:
        """Labels `(B,)` int64 to points `(B, E)`."""
        return self.embeddings[labels]

    def logits(self, x_1_hat: Tensor) -> Tensor:
        """Minus half the squared distance to every embedding, up to a constant: `(B, E)` to `(B, K)`."""
        return x_1_hat @ self.embeddings.to(x_1_hat.dtype).T

    def decode(self, x_1_hat: Tensor) -> Tensor:
        """The nearest class: `(B, E)` to `(B,)` int64."""
        return self.logits(x_1_hat).argmax(-1)
