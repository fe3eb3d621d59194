"""The D predictors and who of them answers when. Shapes: B images, D predictors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfm_d2.detection.head import FlowHead
from dfm_d2.errors import UserError
from dfm_d2.flow import unwarped_time, warped_time


class PredictorStack(nn.ModuleList):
    """D predictors, `stack[d]`.

    Args:
        make_head: called D times.
        num_predictors: D.
        time: "partitioned" (predictor `floor(u D)` answers at `t(u)` and is trained on its own interval) or
            "shared" (every predictor answers at, and is trained on, all of [0, 1]).
        rate: of t(u), see dfm_d2.flow.warped_time.
    """

    def __init__(self, make_head: Callable[[], FlowHead], num_predictors: int, time: str, rate: float = 0.0):
        super().__init__(make_head() for _ in range(num_predictors))
        self.time = time
        self.rate = rate

    def training_time(self, index: int, uniform: Tensor) -> Tensor:
        """The t in its own interval that predictor `index` is trained on, from uniforms `(B,)` in [0, 1)."""
        return warped_time((index + uniform) / len(self), self.rate)

    def answering(self, t: float, chosen: Sequence[int] = ()) -> list[int]:
        """Indices of the predictors that answer at `t`.

        Args:
            chosen: a subset (TIME "shared" only); empty: all.

        Raises:
            UserError: a subset under "partitioned", where each interval has one predictor; or an index
                that is not there.
        """
        if self.time == "partitioned":
            if chosen:
                raise UserError(
                    "MODEL.DFM.SAMPLER.PREDICTORS must be empty with TIME 'partitioned': "
                    "no other predictor was trained on the interval of a dropped one"
                )
            # 1e-6: a time such as 3 * (1 / 6), or one in float32, must not fall short of its interval.
            u = unwarped_time(t, self.rate)
            return [min(int(u * len(self) + 1e-6), len(self) - 1)]
        wrong = [d for d in chosen if not 0 <= d < len(self)]
        if wrong:
            raise UserError(f"MODEL.DFM.SAMPLER.PREDICTORS names {wrong}, there are {len(self)} predictors")
        return list(chosen) or list(range(len(self)))

    def answer_together(
        self, features: Sequence[Tensor], boxes_xyxy: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All D predictors, each at its own boxes and time, as one batched computation.

        Their parameters are stacked, so that every linear layer is one batched product instead of D.

        Args:
            features: L maps `(B, C, H_l, W_l)`. boxes_xyxy: `(D, B, N, 4)` pixels.
            x_t: `(D, B, N, 4)` signal. t: `(D, B)`.

        Returns:
            Class logits `(D, B, N, K)` and raw box answers `(D, B, N, 4)`, those of one by one to rounding.
        """
        count, images, proposals = boxes_xyxy.shape[:3]
        # One launch pools for all: predictors are more proposals of the same images.
        pooled = self[0].pooler(features, boxes_xyxy.transpose(0, 1).flatten(1, 2))
        pooled = pooled.unflatten(0, (images, count, proposals)).transpose(0, 1).flatten(1, 2)
        names = [name for name, _ in self[0].named_parameters()]
        heads = [dict(head.named_parameters()) for head in self]
        stacked = {name: torch.stack([head[name] for head in heads]) for name in names}

        def answer(parameters: dict[str, Tensor], pooled: Tensor, x_t: Tensor, t: Tensor):
            found = functional_call(self[0], parameters, (None, None, x_t, t), {"pooled": pooled})
            return found.class_logits, found.boxes

        # The other kernels of attention have no batched form: vmap would call them in a loop.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.vmap(answer)(stacked, pooled, x_t, t)
