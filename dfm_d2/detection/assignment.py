"""Assignment: which ground-truth box each query answers for.

`path` is the coupled one (Slots.gt_index). `dynamic_k` is SimOTA (YOLOX, arXiv 2107.08430, section 2):
every box takes its k cheapest queries, k from the IoUs it finds.
Shapes: B images, N proposals, G ground-truth boxes, K classes.
"""

from dataclasses import dataclass

import torch
from dfm_kernels.box_flow_update import cxcywh_to_xyxy, signal_to_cxcywh
from dfm_kernels.flow_loss import pairwise_giou
from torch import Tensor

from dfm_d2.detection.coupling import GroundTruth
from dfm_d2.detection.loss import BlockLoss
from dfm_d2.flow import at_least_float32


def assigned_targets(ground_truth: GroundTruth, gt_index: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Class targets `(B, N)` (K for background) and box targets `(B, N, 4)` signal of an assignment."""
    index = gt_index.clamp(min=0)
    classes = ground_truth.classes.gather(1, index)
    classes = torch.where(gt_index >= 0, classes, torch.full_like(classes, num_classes))
    return classes, ground_truth.x_1.gather(1, index[..., None].expand(*index.shape, 4))


@dataclass(frozen=True)
class DynamicK:
    """SimOTA's assignment.

    Args:
        loss: the matching cost has its signal scale, its weights, and focal_alpha and focal_gamma.
        max_k: the greatest number of IoUs that are summed to k.
    """

    loss: BlockLoss
    max_k: int = 5

    # Cost of a query whose centre lies outside the box: worse than any other disagreement.
    _OUTSIDE = 100.0

    @torch.no_grad()
    def __call__(self, ground_truth: GroundTruth, x: Tensor, class_logits: Tensor | None = None) -> Tensor:
        """Assign.

        Args:
            x: `(B, N, 4)` signal: predicted endpoints, or `x_t` for costs that no predictor enters.
            class_logits: `(B, N, K)` or None (no class cost).

        Returns:
            gt_index `(B, N)` int64, -1 for background. While queries last, every box has at least one.
        """
        cost, iou = self._cost(ground_truth, at_least_float32(x), class_logits)
        valid = ground_truth.mask[:, None]
        top = iou.topk(min(self.max_k, cost.shape[1]), dim=1).values
        k = top.sum(1).to(torch.int64).clamp(min=1)
        rank = cost.argsort(1).argsort(1)
        matched = (rank < k[:, None]) & valid
        # A query that several boxes chose answers for the cheapest of them.
        cheapest = cost.masked_fill(~matched, torch.inf).argmin(2)
        gt_index = torch.where(matched.any(2), cheapest, -1)
        return self._serve_the_unmatched(gt_index, cost, ground_truth.mask)

    def _cost(
        self, ground_truth: GroundTruth, x: Tensor, class_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        loss = self.loss
        box_hat = signal_to_cxcywh(x, loss.signal_scale)
        box = signal_to_cxcywh(at_least_float32(ground_truth.x_1), loss.signal_scale)
        corners = cxcywh_to_xyxy(box)
        pairs = (pairwise_giou(a, b) for a, b in zip(cxcywh_to_xyxy(box_hat), corners))
        iou, giou = (torch.stack(values) for values in zip(*pairs))
        l1 = torch.cdist(box_hat, box, p=1)
        center = box_hat[:, :, None, :2]
        inside = ((center > corners[:, None, :, :2]) & (center < corners[:, None, :, 2:])).all(-1)
        cost = loss.l1_weight * l1 - loss.giou_weight * giou + self._OUTSIDE * (~inside)
        if class_logits is not None:
            p = at_least_float32(class_logits).sigmoid()
            positive = -loss.focal_alpha * (1 - p) ** loss.focal_gamma * (p + 1e-8).log()
            negative = -(1 - loss.focal_alpha) * p**loss.focal_gamma * (1 - p + 1e-8).log()
            index = ground_truth.classes[:, None].expand(-1, x.shape[1], -1)
            cost = cost + loss.cls_weight * (positive - negative).gather(2, index)
        # Padding must lose every comparison, yet stay finite for argsort; a NaN must not win one.
        cost = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)
        valid = ground_truth.mask[:, None]
        return cost.masked_fill(~valid, 1e9), torch.nan_to_num(iou).masked_fill(~valid, 0.0)

    @staticmethod
    def _serve_the_unmatched(gt_index: Tensor, cost: Tensor, mask: Tensor) -> Tensor:
        """Give boxes that lost all their queries the cheapest free ones, one round a conflict."""
        num_boxes = mask.shape[1]
        while True:
            taken = torch.nn.functional.one_hot(gt_index + 1, num_boxes + 1)[..., 1:].any(1)
            waiting = mask & ~taken
            free = gt_index < 0
            wanted = waiting & free.any(1, keepdim=True)
            if not bool(wanted.any()):
                return gt_index
            open_cost = cost.masked_fill(~(free[..., None] & wanted[:, None]), torch.inf)
            best_query = open_cost.argmin(1)
            proposes = torch.zeros_like(open_cost, dtype=torch.bool).scatter_(1, best_query[:, None], True)
            proposes &= torch.isfinite(open_cost)
            winner = open_cost.masked_fill(~proposes, torch.inf).argmin(2)
            gt_index = torch.where(proposes.any(2), winner, gt_index)
