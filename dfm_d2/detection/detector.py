"""FlowDetector: D local predictors on one backbone turn noise boxes into detections.

Shapes: B images, N proposals, D predictors, S intervals, C channels, K classes, G ground-truth boxes.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dfm_d2.detection.assignment import DynamicK, assigned_targets
from dfm_d2.detection.config import MEANING, meant
from dfm_d2.detection.coupling import build_slots, couple
from dfm_d2.detection.dense import DensePredictor
from dfm_d2.detection.from_config import detector_arguments, owners_in_bottom_up
from dfm_d2.detection.head import HeadAnswer, StagePredictor
from dfm_d2.detection.inference import BoxFlowModel
from dfm_d2.detection.loss import BlockLoss
from dfm_d2.detection.rollout import Prepared, Rollout, State, Told
from dfm_d2.detection.training import disagreement, member_iou, of_common_size, pad_ground_truth
from dfm_d2.flow import CondOTPath, keyed_normal, keyed_uniform, stream_key
from dfm_d2.flow.noise import STREAM_STAGE_TIME, STREAM_STATE
from dfm_d2.framework import META_ARCH_REGISTRY, configurable, get_event_storage
from dfm_d2.local_update import SHARED_BLOCK, BlockLosses, HandOver, attached_losses, predictor_block


@META_ARCH_REGISTRY.register()
class FlowDetector(BoxFlowModel):
    """The multi-predictor flow detector.

    `forward` is Detectron2's: a dict of losses in training mode, else a list of {"instances": Instances}.
    The update modes of dfm_d2.local_update drive `block_losses`.

    Args (besides those of BoxFlowModel):
        stage_predictors: of the backbone's stages that are blocks of their own, by name.
        dense_predictor: what the shared block loses by itself; None: nothing.
        criterion, assigner: loss of a block, dynamic_k.
        num_proposals: N in training. gt_repeat: see coupling.build_slots.
        rollout: R, the states of an interval that its predictors train at; 0: on the path.
        coupling, assignment: see the config keys of those names.
        seed: of noise and t in training.
        freeze_backbone: the backbone neither learns nor moves its running statistics.
    """

    # Whether predictors are independent, so that they may be updated one by one.
    is_local = True
    # What the engine asks of a model, see Task.
    meaning = (*MEANING, "MODEL.DFM.TIME", "MODEL.DFM.ROLLOUT")
    meant, backbone_prefix = staticmethod(meant), "backbone.bottom_up"
    set_by_config = ("temperature", "threshold")
    training_only = ("stage_predictors.", "dense_predictor.", *set_by_config)  # not in older checkpoints

    @configurable
    def __init__(
        self,
        *,
        stage_predictors: Mapping[str, StagePredictor],
        dense_predictor: DensePredictor | None,
        criterion: BlockLoss,
        assigner: DynamicK,
        num_proposals: int,
        gt_repeat: int,
        rollout: int,
        coupling: str,
        assignment: str,
        seed: int,
        freeze_backbone: bool,
        **inference,
    ):
        super().__init__(**inference)
        self.stage_predictors = nn.ModuleDict(stage_predictors)
        self.dense_predictor = dense_predictor
        self.criterion = criterion
        self.assigner = assigner
        self.num_proposals = num_proposals
        self.gt_repeat = gt_repeat
        self.rollout = rollout
        self.coupling = coupling
        self.assignment = assignment
        self.seed = seed
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            self.backbone.requires_grad_(False)
        self.path = CondOTPath()
        self._steps = 0  # of forward in training mode where no event storage counts them

    @classmethod
    def from_config(cls, cfg) -> dict:
        return detector_arguments(cfg)

    def train(self, mode: bool = True) -> "FlowDetector":
        """Set the mode; a frozen backbone stays in evaluation mode, or its batch norms would go on moving."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, batched_inputs: Sequence[dict]) -> dict[str, Tensor] | list[dict]:
        """Detections `[{"instances": Instances}]`, in original image coordinates; in training mode the losses
        of all blocks, whose sum is the loss of UPDATE "joint".

        The noise of a training step depends on its iteration: the event storage's, else counted.
        """
        if not self.training:
            return self.inference(batched_inputs)
        try:
            iteration = get_event_storage().iter
        except AssertionError:  # there is none
            iteration = self._steps
        self._steps += 1
        terms = attached_losses(self, self.prepare(batched_inputs, iteration))
        return {key: value for key, value in terms.items() if key.startswith("loss")}

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters, by full name, of each block: "shared" (backbone and FPN), "predictor0", ...

        "shared" is empty where the backbone is frozen. With stage predictors each of their stages is a block,
        "res2", ..., and "shared" is the FPN. A dense predictor belongs to "shared".
        """
        stage_names = list(self.stage_predictors)
        names = [*stage_names, SHARED_BLOCK, *(predictor_block(d) for d in range(self.num_predictors))]
        blocks: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in names}
        owner = owners_in_bottom_up(self.backbone.bottom_up, stage_names) if stage_names else {}
        for name, parameter in self.named_parameters():
            part, child, *rest = name.split(".")
            block = SHARED_BLOCK
            if part == "predictors":
                block = predictor_block(int(child))
            elif part == "stage_predictors":
                block = child
            elif child == "bottom_up":
                block = owner.get(rest[0], SHARED_BLOCK)
            if parameter.requires_grad:
                blocks[block].append((name, parameter))
        return blocks

    @torch.no_grad()
    def prepare(self, batched_inputs: Sequence[dict], iteration: int) -> Prepared:
        """Images, targets and one path sample an interval.

        Noise depends on (seed, iteration, image id), the time besides on the interval, and on nothing else.
        """
        images, image_sizes = self._images(batched_inputs)
        ground_truth = pad_ground_truth(batched_inputs, image_sizes, self.space, self.num_classes)
        keys = [stream_key("train", self.seed, iteration, i) for i in self.image_ids(batched_inputs)]
        x_0 = keyed_normal(keys, self.num_proposals, device=self.device).to(ground_truth.x_1.dtype)
        slots = build_slots(ground_truth, self.num_proposals, self.gt_repeat, keys, self.space.signal_scale)
        slots = couple(x_0, slots, self.coupling, keys)
        S, R = self.predictors.intervals, max(self.rollout, 1)
        within = keyed_uniform(keys, S, device=self.device)[..., None]
        steps = torch.arange(S * R, device=self.device).view(S, R)
        # One solver step of S R an entry, as at inference: interval i begins with step i R.
        u = (steps + within) / (S * R)
        stop = (keyed_uniform(keys, S, STREAM_STATE, self.device) * R).long()
        path = [self._on_path(x_0, slots.x_1, first) for first in u[..., 0].unbind(1)]
        stage_u = keyed_uniform(keys, len(self.stage_predictors), STREAM_STAGE_TIME, self.device).unbind(1)
        stage_states = [self._on_path(x_0, slots.x_1, own) for own in stage_u]
        gt_index = slots.gt_index if self.assignment == "path" else None
        images, cells = of_common_size(images), None
        if self.dense_predictor is not None:
            cells = self.dense_predictor.cells(images.shape[-2:], image_sizes, ground_truth)
        ways = path, u, stop, gt_index, stage_states
        return Prepared(images, image_sizes, ground_truth, *ways, cells)

    def _on_path(self, x_0: Tensor, x_1: Tensor, u: Tensor) -> State:
        """The path sample at t(u) as the state of predictors."""
        x_t = self.path.sample(x_0, x_1, self.predictors.t(u)).x_t
        return State(x_t, u, [None] * self.predictors.num_members)

    def block_losses(self, prepared: Prepared, hand_over: HandOver) -> Iterator[BlockLosses]:
        """Of stages that are blocks, predictors and the shared block: scalars `loss_cls/predictor0`, ...

        Of every member of an interval but the first also the metrics `disagreement/predictor1` (with
        dynamic_k) and `member_iou/predictor1`, see dfm_d2.detection.training.
        """
        own = hand_over.own(prepared)
        if self.stage_predictors:
            features = yield from self._stage_losses(own)
        else:
            with torch.set_grad_enabled(not self.freeze_backbone and torch.is_grad_enabled()):
                features = self._features(own.images)
        features = hand_over.open(features)
        yield from self._predictor_losses(features, prepared, hand_over)
        del features
        losses = None
        if self.dense_predictor is not None:
            losses = partial(self.dense_predictor.losses, cells=own.cells, ground_truth=own.ground_truth)
        yield from hand_over.close(losses)

    def _stage_losses(self, prepared: Prepared) -> Iterator[BlockLosses]:
        """The local losses of backbone stages, each by its own predictor; returns the features, L maps
        `(B, C, H_l, W_l)`."""
        bottom_up, x, outputs = self.backbone.bottom_up, prepared.images, {}
        states = dict(zip(self.stage_predictors, prepared.stage_states))
        for child, stage in bottom_up.named_children():
            x = stage(x)
            if child in states:
                state = states[child]
                proposals = self.space.proposals(state.x_t, prepared.image_sizes)
                answer = self.stage_predictors[child](x, proposals, state.x_t, state.u)
                losses, _ = self._losses(child, answer, state, prepared)
                del answer  # only what is yielded holds the graph
                yield BlockLosses((child,), losses)
                del losses
                x = x.detach()
            outputs[child] = x
        # The FPN asks its bottom-up network for what is there already.
        bottom_up.forward = lambda _: {name: outputs[name] for name in bottom_up.output_shape()}
        try:
            return self._features(prepared.images)
        finally:
            del bottom_up.forward

    def _predictor_losses(
        self, features: Sequence[Tensor], prepared: Prepared, hand_over: HandOver
    ) -> Iterator[BlockLosses]:
        """Interval by interval, member by member. In an interval the first member assigns for all."""
        rollout = Rollout(self, features, prepared, self.rollout > 0, hand_over)
        if hand_over.together:
            yield self._losses_together(rollout, features, prepared)
            return
        for interval in range(self.predictors.intervals):
            rollout.enter(interval)
            for d in self.predictors.members(interval):
                block, told, item = predictor_block(d), None, None
                if hand_over.owns(block):
                    answer = rollout.answer(d)
                    with hand_over.among_owners(block):
                        losses, gt_index = self._losses(block, answer, rollout.state, prepared, rollout.first)
                    told, item = rollout.told(answer, gt_index), BlockLosses((block,), losses)
                    del answer, losses  # only what is yielded holds the graph
                rollout.tell(d, told)
                if item is not None:
                    yield item
                del item

    def _losses_together(
        self, rollout: Rollout, features: Sequence[Tensor], prepared: Prepared
    ) -> BlockLosses:
        """All predictors as one batched computation, after a pass without gradients for their states."""
        states = []
        for interval in range(self.predictors.intervals):
            rollout.enter(interval)
            states.append(rollout.state)
            rollout.ask()
        each = [(state, e) for state in states for e in range(self.predictors.num_members)]
        x_t, u = (torch.stack([state[part] for state, _ in each]) for part in (0, 1))
        boxes_xyxy = torch.stack([self.space.proposals(x, prepared.image_sizes) for x in x_t])
        queries = [state.queries[e] for state, e in each]
        answers = self.predictors.answer_together(features, boxes_xyxy, x_t, u, queries)
        first, terms = None, {}
        for d, ((state, e), *answer) in enumerate(zip(each, *answers)):
            answer = HeadAnswer(*answer, queries=state.x_t)  # nobody asks for them any more
            first = first if e else None
            losses, gt_index = self._losses(predictor_block(d), answer, state, prepared, first)
            first = first or rollout.told(answer, gt_index)
            terms |= losses
        return BlockLosses(tuple(predictor_block(d) for d in range(self.num_predictors)), terms)

    def _losses(
        self, block: str, answer: HeadAnswer, state: State, prepared: Prepared, first: Told | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses and metrics of a block by its answer at a state, and its assignment `(B, N)`.

        first: what the first member of the interval told, whose assignment this one has; None: it assigns.
        """
        x_t, t = state.x_t, self.predictors.t(state.u)
        x_1_hat, class_logits = self.space.endpoint(x_t, answer.boxes), answer.class_logits.to(x_t.dtype)
        gt_index, metrics = prepared.gt_index, {}
        if self.assignment == "dynamic_k":
            gt_index = self.assigner(prepared.ground_truth, x_1_hat, class_logits)
        if first is not None:
            if self.assignment == "dynamic_k":
                metrics[f"disagreement/{block}"] = disagreement(gt_index, first.gt_index)
            gt_index = first.gt_index
            endpoints = x_1_hat.detach(), self.space.endpoint(x_t, first.boxes)
            boxes_xyxy = (self.space.proposals(x, prepared.image_sizes) for x in endpoints)
            metrics[f"member_iou/{block}"] = member_iou(*boxes_xyxy, gt_index)
        classes, target_x_1 = assigned_targets(prepared.ground_truth, gt_index, self.num_classes)
        losses = self.criterion(class_logits, x_1_hat, classes, target_x_1, t)
        return {f"loss_{key}/{block}": value for key, value in losses.items()} | metrics, gt_index
