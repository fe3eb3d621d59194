"""The D predictors and who of them answers when.

Shapes: B images, N proposals, S intervals of time, D predictors, E = D / S in each interval, C channels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfm_d2.detection.head import FlowHead
from dfm_d2.errors import UserError
from dfm_d2.flow import unwarped_time, warped_time


class PredictorStack(nn.ModuleList):
    """D predictors in S even intervals of the warped time u: member e of interval i is `stack[i E + e]`.

    The members of an interval are trained on it and average their velocities in it. S = 1: an ensemble, all
    answer at every time; S = D: a chain of specialists, one at a time.

    Args:
        make_head: called D times.
        num_predictors: D. intervals: S, a divisor of D.
        rate: of t(u), see dfm_d2.flow.warped_time.
        crosses: queries cross from an interval to the next; not where predictors train on the path.
    """

    def __init__(
        self,
        make_head: Callable[[], FlowHead],
        num_predictors: int,
        intervals: int,
        rate: float = 0.0,
        crosses: bool = True,
    ):
        super().__init__(make_head() for _ in range(num_predictors))
        self.intervals = intervals
        self.rate = rate
        self.crosses = crosses

    @property
    def num_members(self) -> int:
        """E, the predictors of an interval."""
        return len(self) // self.intervals

    def t(self, u: Tensor) -> Tensor:
        """t(u)."""
        return warped_time(u, self.rate)

    def members(self, interval: int) -> range:
        """Indices of the predictors of an interval."""
        return range(interval * self.num_members, (interval + 1) * self.num_members)

    def interval(self, t: float) -> int:
        """The interval of time `t`."""
        # 1e-6: a time such as 3 * (1 / 6), or one in float32, must not fall short of its interval.
        return min(int(unwarped_time(t, self.rate) * self.intervals + 1e-6), self.intervals - 1)

    def answering(self, t: float, chosen: Sequence[int] = ()) -> list[int]:
        """Indices of the predictors that answer at `t`.

        Args:
            chosen: members of every interval, from 0 to E - 1; empty: all.

        Raises:
            UserError: a member that is not there.
        """
        wrong = [e for e in chosen if not 0 <= e < self.num_members]
        if wrong:
            raise UserError(
                f"MODEL.DFM.SAMPLER.MEMBERS names {wrong}, an interval has {self.num_members} predictors"
            )
        members = self.members(self.interval(t))
        return [members[e] for e in chosen] or list(members)

    def answer_together(
        self,
        features: Sequence[Tensor],
        boxes_xyxy: Tensor,
        x_t: Tensor,
        u: Tensor,
        queries: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """All D predictors, each at its own boxes and time, as one batched computation.

        Their parameters are stacked, so that every linear layer is one batched product instead of D.

        Args:
            features: L maps `(B, C, H_l, W_l)`. boxes_xyxy: `(D, B, N, 4)` pixels.
            x_t: `(D, B, N, 4)` signal. u: `(D, B)`. queries: `(B, N, C)` of each or None, see FlowHead.

        Returns:
            Class logits `(D, B, N, K)` and raw box answers `(D, B, N, 4)`, those of one by one to rounding.
        """
        count, images, proposals = boxes_xyxy.shape[:3]
        # One launch pools for all: predictors are more proposals of the same images.
        pooled = self[0].pooler(features, boxes_xyxy.transpose(0, 1).flatten(1, 2))
        pooled = pooled.unflatten(0, (images, count, proposals)).transpose(0, 1).flatten(1, 2)
        given = [
            self[0].own_queries(own).view(images, proposals, -1) if q is None else q
            for q, own in zip(queries, pooled)
        ]
        names = [name for name, _ in self[0].named_parameters()]
        heads = [dict(head.named_parameters()) for head in self]
        stacked = {name: torch.stack([head[name] for head in heads]) for name in names}

        def answer(parameters: dict[str, Tensor], pooled: Tensor, x_t: Tensor, u: Tensor, queries: Tensor):
            found = functional_call(self[0], parameters, (None, None, x_t, u, queries), {"pooled": pooled})
            return found.class_logits, found.boxes

        # The other kernels of attention have no batched form: vmap would call them in a loop.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.vmap(answer)(stacked, pooled, x_t, u, torch.stack(given))
