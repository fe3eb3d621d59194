"""The flow predictor of a block of a classifier: from pooled features, a point and a time to an endpoint.

Shapes: B images, S points of the path an image, C channels of the pooled features, E embedding dimensions.
"""

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from dfm_d2.flow.time_embedding import TimeEmbedding


class ClassPredictor(nn.Module):
    """Two residual layers, the second modulated by the time.

    Args:
        in_channels: C. embed_dim: E. hidden_dim: width, even.
    """

    def __init__(self, *, in_channels: int, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(in_channels)
        self.features = nn.Linear(in_channels, hidden_dim)
        self.state = nn.Linear(embed_dim, hidden_dim)
        self.time_embedding = TimeEmbedding(hidden_dim)
        self.time_modulation = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.norm_hidden, self.hidden = nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.norm_out, self.answer = nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, embed_dim)
        nn.init.zeros_(self.time_modulation.weight)  # begin as a predictor that ignores the time
        nn.init.zeros_(self.time_modulation.bias)
        # Begin near the middle of the classes: an answer of the length of noise is wrong, and sure of it.
        nn.init.normal_(self.answer.weight, std=0.01)
        nn.init.zeros_(self.answer.bias)

    def forward(self, features: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The raw answer `(B, S, E)`.

        Args:
            features: `(B, C)`. x_t: `(B, S, E)`. t: `(B, S)` in [0, 1].
        """
        dtype = self.features.weight.dtype
        seen = self.features(gelu(self.norm_in(features.to(dtype))))
        stream = seen[:, None] + self.state(x_t.to(dtype))
        time = self.time_embedding(t.reshape(-1)).view(*t.shape, -1)
        scale, shift = self.time_modulation(silu(time)).chunk(2, dim=-1)
        stream = stream + gelu(self.hidden(self.norm_hidden(stream) * (1 + scale) + shift))
        return self.answer(self.norm_out(stream))
