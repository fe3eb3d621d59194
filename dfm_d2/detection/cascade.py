"""CascadeDetector: the end-to-end backprop twin of FlowDetector.

The same backbone and the same D heads as a cascade with deep supervision, as in Sparse R-CNN (arXiv
2011.12450) and DiffusionDet (arXiv 2211.09788): each head refines the boxes of the one before (detached)
and receives its query features (not detached), so that one backward crosses all of them.
Shapes: B images, N proposals, D heads, K classes.
"""

from collections.abc import Iterator, Sequence

from dfm_kernels.box_flow_update import BoxFlowUpdate, euler_step
from torch import Tensor

from dfm_d2.detection.config import MEANING
from dfm_d2.detection.detector import FlowDetector
from dfm_d2.detection.head import HeadAnswer
from dfm_d2.detection.rollout import Prepared
from dfm_d2.flow import StepFunction, time_like
from dfm_d2.framework import META_ARCH_REGISTRY
from dfm_d2.local_update import BlockLosses, HandOver, predictor_block


@META_ARCH_REGISTRY.register()
class CascadeDetector(FlowDetector):
    """As FlowDetector, with heads in a row instead of predictors side by side: gradients cross them all.

    All heads have one t, in [0, 1) as DiffusionDet trains: one interval of a time that is not warped.
    """

    is_local = False
    meaning = MEANING  # its heads have always embedded t

    def _predictor_losses(
        self, features: Sequence[Tensor], prepared: Prepared, hand_over: HandOver
    ) -> Iterator[BlockLosses]:
        """One item: the losses of every head on its own refined boxes (deep supervision)."""
        begin, losses = prepared.path[0], {}
        names = tuple(predictor_block(d) for d in range(self.num_predictors))
        answers = self._answers(features, begin.x_t, begin.u, prepared.image_sizes)
        for name, (x, answer) in zip(names, answers):
            losses |= self._losses(name, answer, begin._replace(x_t=x), prepared)[0]
        yield BlockLosses(names, losses)

    def _answers(
        self, features: Sequence[Tensor], x: Tensor, t: Tensor, image_sizes: Tensor
    ) -> Iterator[tuple[Tensor, HeadAnswer]]:
        """Head by head: the boxes `(B, N, 4)` signal that entered it and its answer."""
        queries = None
        for head in self.predictors:
            answer = head(features, self.space.proposals(x, image_sizes), x, t, queries)
            yield x, answer
            x, queries = self.space.clamp(self.space.endpoint(x, answer.boxes).detach()), answer.queries

    def _step_function(self, features: Sequence[Tensor], image_sizes: Tensor) -> StepFunction:
        """One solver step towards the endpoint of the last head, after all the others."""

        def step(x_t: Tensor, t: float, t_next: float) -> BoxFlowUpdate:
            times = time_like(x_t, t), time_like(x_t, t_next)
            *_, (x, answer) = self._answers(features, x_t, times[0], image_sizes)
            last = self.solver_step(x, answer.boxes[None], answer.class_logits[None], *times, image_sizes)
            # The last head's answer is relative to its own boxes, the step starts from x_t.
            x_next = euler_step(x_t, last.x_1_hat, *times)
            return last._replace(x_next=x_next, boxes_xyxy=self.space.proposals(x_next, image_sizes))

        return step
