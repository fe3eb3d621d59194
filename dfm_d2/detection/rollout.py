"""The states that predictors train at: those of inference, where solver steps along detached answers lead.

Shapes: B images, N proposals, S intervals of E predictors, R states of an interval, C channels, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dfm_d2.detection.coupling import GroundTruth
from dfm_d2.detection.dense import Cells
from dfm_d2.detection.head import HeadAnswer
from dfm_d2.detection.inference import BoxFlowModel
from dfm_d2.local_update import HandOver, predictor_block


class State(NamedTuple):
    """Where predictors answer.

    x_t: `(B, N, 4)` signal. u: `(B,)` warped time. queries: of each member of an interval, those `(B, N, C)`
    that the member of its place gave at the end of the interval before; None: it makes its own.
    """

    x_t: Tensor
    u: Tensor
    queries: Sequence[Tensor | None]


class Told(NamedTuple):
    """What a predictor tells the others, detached: its raw answer, its queries and its assignment.

    class_logits: `(B, N, K)`. boxes: `(B, N, 4)`. queries: `(B, N, C)`. gt_index: `(B, N)` int64.
    """

    class_logits: Tensor
    boxes: Tensor
    queries: Tensor
    gt_index: Tensor


class Prepared(NamedTuple):
    """All that one training step needs, without gradients; nothing changes it.

    images: `(B, 3, H, W)` padded, normalised. image_sizes: `(B, 2)` height, width. ground_truth: padded.
    path: where every interval begins for those who train on the path. u: `(B, S, R)` times of a rollout.
    stop: `(B, S)` int, at which of the R an image trains in an interval.
    gt_index: the coupled assignment `(B, N)`; None where predictors assign.
    stage_states: of every backbone stage that is a block; there are none but with BACKBONE_UPDATE "local".
    cells: of the dense predictor; None: there is none.
    """

    images: Tensor
    image_sizes: Tensor
    ground_truth: GroundTruth
    path: list[State]
    u: Tensor
    stop: Tensor
    gt_index: Tensor | None
    stage_states: list[State]
    cells: Cells | None

    def part(self, images: slice) -> "Prepared":
        """The same of some of the images; their padding stays what it is."""
        return tree_map_only(Tensor, lambda value: value[images], self)


class Rollout:
    """One training step's way through the intervals.

    Args:
        model: whose predictors answer, and whose solver steps are made.
        features: L maps `(B, C, H_l, W_l)`. leads: answers lead on; else every interval begins on the path.
        hand_over: tells answers to other processes.

    Attributes:
        state: of the interval that was entered last.
    """

    def __init__(
        self,
        model: BoxFlowModel,
        features: Sequence[Tensor],
        prepared: Prepared,
        leads: bool,
        hand_over: HandOver,
    ):
        self._model, self._features, self._prepared = model, features, prepared
        self._leads, self._hand_over = leads, hand_over
        self.state = prepared.path[0]
        self._interval = 0
        self._answers: list[Told] = []
        x_t = self.state.x_t
        shape, channels = x_t.shape[:2], features[0].shape[1]
        logits, queries = (x_t.new_empty(*shape, size) for size in (model.num_classes, channels))
        self._like = Told(logits, x_t, queries, torch.empty(shape, dtype=torch.int64, device=x_t.device))

    @property
    def _leads_on(self) -> bool:
        """Whether the next interval begins where the answers of this one lead."""
        return self._leads and self._interval + 1 < self._model.predictors.intervals

    @property
    def first(self) -> Told | None:
        """What the first member of the interval told; None: nobody told anything yet."""
        return self._answers[0] if self._answers else None

    def enter(self, interval: int) -> None:
        """Go to the state that each image trains at in an interval, by what was told in the one before."""
        u, state = self._prepared.u[:, interval], self._prepared.path[interval]
        if not isinstance(state.x_t, list):
            state = state._replace(x_t=[state.x_t] * self._model.predictors.num_members)
        if interval > 0 and self._leads:
            queries = [told.queries for told in self._answers]
            state = State(self._moved(u[:, 0]), u[:, 0], queries)
        self.state, self._interval = state, interval
        for step in range(1, u.shape[1]):
            self._answers = []
            self._ask()
            goes = self._prepared.stop[:, interval] >= step
            moved = self._moved(u[:, step])
            x_t = [torch.where(goes[:, None, None], m, x) for m, x in zip(moved, self.state.x_t)]
            self.state = State(x_t, torch.where(goes, u[:, step], self.state.u), self.state.queries)
        self._answers = []

    @torch.no_grad()
    def _moved(self, u_next: Tensor) -> Tensor:
        """x_t `(B, N, 4)` after the solver step to `u_next` `(B,)` by the aggregated answers."""
        stack, state = self._model.predictors, self.state
        times = stack.t(state.u), stack.t(u_next)
        step = self._model.solver_step
        sizes = self._prepared.image_sizes
        return [
            step(x, a.boxes[None], a.class_logits[None], *times, sizes).x_next
            for x, a in zip(state.x_t, self._answers)
        ]

    def answer(self, d: int) -> HeadAnswer:
        """What predictor `d` answers at the state."""
        model, state = self._model, self.state
        state = self.state_of(d)
        proposals = model.space.proposals(state.x_t, self._prepared.image_sizes)
        queries = state.queries[d % model.predictors.num_members]
        return model.predictors[d](self._features, proposals, state.x_t, state.u, queries)

    def state_of(self, d: int) -> State:
        return self.state._replace(x_t=self.state.x_t[d % self._model.predictors.num_members])

    def told(self, answer: HeadAnswer, gt_index: Tensor | None = None) -> Told:
        """An answer, and an assignment where there is one, as the others may have it."""
        parts = (part.detach().to(self.state.x_t[0].dtype) for part in answer)
        return Told(*parts, self._like.gt_index if gt_index is None else gt_index)

    def tell(self, d: int, told: Told | None) -> None:
        """Keep what predictor `d` told where it is needed; None: another process has it."""
        assigns = self._model.predictors.num_members > 1 and not self._answers
        if assigns or self._leads_on:
            self._answers.append(self._hand_over.tell(d, told, self._like))

    def ask(self) -> None:
        """Keep what all members answer, if anybody needs it."""
        if self._leads_on:
            self._ask()

    @torch.no_grad()
    def _ask(self) -> None:
        for d in self._model.predictors.members(self._interval):
            owned = self._hand_over.owns(predictor_block(d))
            own = self.told(self.answer(d)) if owned else None
            self._answers.append(self._hand_over.tell(d, own, self._like))
