"""What there is to see of one image's flow: boxes at every time, who moved them, the field around one.

Shapes: N proposals, D predictors, K solver steps, K + 1 times, M field points.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dfm_d2.framework import Instances


class Answer(NamedTuple):
    """What one predictor answers to one state: endpoints (N, 4) pixels, its best class and score (N,)."""

    predictor: int
    endpoints_xyxy: Tensor
    classes: Tensor
    scores: Tensor


@dataclass
class FlowRecord:
    """All boxes are xyxy in pixels of the original image, on the CPU, not clipped to it.

    times: K + 1 numbers. states: K + 1 tensors `(N, 4)`. answers: of each of K steps, those who answered.
    classes, scores: K tensors `(N,)`, the averaged answer of each step. detections: after NMS.
    followed: index of the box whose field was computed, or -1.
    field_points: `(M, 2)` centres in pixels. field: K tensors `(M, 2)`: where the followed box's centre would
    be heading from there, in pixels until t = 1 (velocity times the time that is left).
    """

    times: tuple[float, ...]
    states: list[Tensor]
    answers: list[list[Answer]]
    classes: list[Tensor]
    scores: list[Tensor]
    detections: Instances
    followed: int
    field_points: Tensor
    field: list[Tensor]

    def step_of(self, place: int) -> int:
        """The step whose answers say what the boxes of state `place` are; for the last state, the last."""
        return min(place, len(self.answers) - 1)

    def leader(self, place: int) -> Tensor:
        """`(N,)` index of the most confident predictor of each box of a state."""
        answers = self.answers[self.step_of(place)]
        best = torch.stack([answer.scores for answer in answers]).argmax(0)
        return torch.tensor([answer.predictor for answer in answers])[best]
