"""What there is to see of one image's flow: boxes at every time, who moved them, the field around one.

Shapes: N proposals, D predictors, K solver steps, K + 1 times, M field points.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dfm_d2.detection.detector import FlowDetector
from dfm_d2.detection.sampler import Flow
from dfm_d2.framework import Instances

# Points of the velocity field along the longer side of an image.
_FIELD_POINTS = 12


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


@torch.no_grad()
def record_flow(model: FlowDetector, item: dict, with_field: bool = True) -> FlowRecord:
    """Run one image and keep everything.

    Args:
        item: the model's input dict; height and width are those of the original image.
        with_field: also the velocity field of the box that ends with the greatest score: its centre is put on
            a grid of places, one after another, while all other boxes stay where they are.
    """
    trajectory, image_sizes = model.trajectory([item])
    flow, _ = model.field([item])
    detections = model.inference([item])[0]["instances"].to("cpu")
    height, width = item.get("height"), item.get("width")
    seen = image_sizes[0].tolist()
    scale = torch.tensor([(width or seen[1]) / seen[1], (height or seen[0]) / seen[0]] * 2)

    def pixels(x: Tensor) -> Tensor:
        return model.space.decode(x, image_sizes)[0].cpu() * scale

    answers, classes, scores = [], [], []
    for k, step in enumerate(trajectory.steps):
        answers.append(list(_answers(model, flow, image_sizes, trajectory, k, pixels)))
        score, label = step.info.class_probs[0].cpu().max(-1)
        classes.append(label)
        scores.append(score)
    followed = int(scores[-1].argmax()) if with_field else -1
    points = _grid(image_sizes) if with_field else torch.zeros(0, 2)
    field = [
        _field(model, flow, image_sizes, trajectory, k, followed, points) * scale[:2]
        for k in range(len(trajectory.steps) if with_field else 0)
    ]
    return FlowRecord(
        times=trajectory.times,
        states=[pixels(x) for x in trajectory.states],
        answers=answers,
        classes=classes,
        scores=scores,
        detections=detections,
        followed=followed,
        field_points=points.cpu() * scale[:2],
        field=field,
    )


@contextmanager
def _only(model: FlowDetector, index: int) -> Iterator[None]:
    """Within it predictor `index` answers alone; where one answers anyway, nothing changes."""
    before = model.sampler.settings
    if model.is_local and model.predictors.time == "shared":
        model.sampler.settings = replace(before, predictors=(index,))
    try:
        yield
    finally:
        model.sampler.settings = before


def _answers(
    model: FlowDetector, flow: Flow, image_sizes: Tensor, trajectory, k: int, pixels
) -> Iterator[Answer]:
    x_t, t, t_next = trajectory.states[k], trajectory.times[k], trajectory.times[k + 1]
    boxes_xyxy = model.space.proposals(x_t, image_sizes)
    # The heads of a cascade answer one after another: what leaves is the last one's.
    indices = model.predictors.answering(t, model.sampler.settings.predictors) if model.is_local else [-1]
    for index in indices:
        with _only(model, index):
            update = flow(x_t, boxes_xyxy, t, t_next)
        score, label = update.class_probs[0].cpu().max(-1)
        yield Answer(index % model.num_predictors, pixels(update.x_1_hat), label, score)


def _grid(image_sizes: Tensor) -> Tensor:
    """Centres `(M, 2)` of even cells of the image as the network sees it."""
    height, width = image_sizes[0].tolist()
    step = max(height, width) / _FIELD_POINTS
    rows, columns = max(round(height / step), 1), max(round(width / step), 1)
    y = (torch.arange(rows) + 0.5) * height / rows
    x = (torch.arange(columns) + 0.5) * width / columns
    return torch.cartesian_prod(y, x).flip(1).to(image_sizes.device)


def _field(
    model: FlowDetector, flow: Flow, image_sizes: Tensor, trajectory, k: int, box: int, points: Tensor
) -> Tensor:
    """`(M, 2)` pixels of the network's image from each point to the centre of the endpoint found there."""
    t, t_next = trajectory.times[k], trajectory.times[k + 1]
    sides = model.space.decode(trajectory.states[k], image_sizes)[0, box]
    half = (sides[2:] - sides[:2]).abs() / 2
    moved = []
    for point in points:
        x_t = trajectory.states[k].clone()
        there = torch.cat([point - half, point + half])
        x_t[0, box] = model.space.encode(there[None, None], image_sizes)[0, 0]
        end = flow(x_t, model.space.proposals(x_t, image_sizes), t, t_next).x_1_hat
        corners = model.space.decode(end, image_sizes)[0, box]
        moved.append((corners[:2] + corners[2:]) / 2 - point)
    return torch.stack(moved).cpu()
