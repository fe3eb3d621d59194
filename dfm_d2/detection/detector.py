"""FlowDetector: D local predictors on one backbone turn noise boxes into detections.

Shapes: B images, N proposals, D predictors, C channels, K classes, G ground-truth boxes.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from dfm_kernels.box_flow_update import euler_step
from torch import Tensor, nn

from dfm_d2.detection.assignment import DynamicK, assigned_targets
from dfm_d2.detection.config import MEANING
from dfm_d2.detection.coupling import build_slots, couple
from dfm_d2.detection.dense import DensePredictor
from dfm_d2.detection.from_config import detector_arguments, owners_in_bottom_up
from dfm_d2.detection.head import StagePredictor
from dfm_d2.detection.inference import BoxFlowModel
from dfm_d2.detection.loss import BlockLoss
from dfm_d2.detection.training import Prepared, disagreement, of_common_size, pad_ground_truth
from dfm_d2.flow import CondOTPath, keyed_normal, keyed_uniform, stream_key, warped_time
from dfm_d2.flow.noise import STREAM_POLICY, STREAM_STAGE_TIME
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
        on_policy: share of the images whose later predictors train where the earlier ones lead.
        coupling, assignment: see the config keys of those names.
        seed: of noise and t in training.
        freeze_backbone: the backbone neither learns nor moves its running statistics.
    """

    # Whether predictors are independent, so that they may be updated one by one.
    is_local = True
    # What the engine asks of a model, see Task.
    meaning, backbone_prefix = MEANING, "backbone.bottom_up"
    training_only = ("stage_predictors.", "dense_predictor.")

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
        on_policy: float,
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
        self.on_policy = on_policy
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
        """Images, targets and one path sample a predictor.

        Noise depends on (seed, iteration, image id), t besides on the predictor, and on nothing else.
        """
        images, image_sizes = self._images(batched_inputs)
        ground_truth = pad_ground_truth(batched_inputs, image_sizes, self.space, self.num_classes)
        keys = [stream_key("train", self.seed, iteration, i) for i in self.image_ids(batched_inputs)]
        x_0 = keyed_normal(keys, self.num_proposals, device=self.device).to(ground_truth.x_1.dtype)
        slots = build_slots(ground_truth, self.num_proposals, self.gt_repeat, keys, self.space.signal_scale)
        slots = couple(x_0, slots, self.coupling, keys)
        samples = [self.path.sample(x_0, slots.x_1, t) for t in self._times(keys)]
        if self.assignment == "path":
            gt_index = slots.gt_index
        elif self.predictors.time == "shared":
            # One assignment for all: predictors that are averaged must not pull a query to different objects.
            gt_index = self.assigner(ground_truth, samples[0].x_t)
        else:
            gt_index = None
        on_policy = keyed_uniform(keys, 1, STREAM_POLICY, self.device)[:, 0] < self.on_policy
        uniform = keyed_uniform(keys, len(self.stage_predictors), STREAM_STAGE_TIME, self.device)
        times = warped_time(uniform, self.predictors.rate).unbind(1)
        stage_samples = [self.path.sample(x_0, slots.x_1, t) for t in times]
        images, cells = of_common_size(images), None
        if self.dense_predictor is not None:
            cells = self.dense_predictor.cells(images.shape[-2:], image_sizes, ground_truth)
        return Prepared(images, image_sizes, ground_truth, samples, on_policy, gt_index, stage_samples, cells)

    def block_losses(self, prepared: Prepared, hand_over: HandOver) -> Iterator[BlockLosses]:
        """Of stages that are blocks, predictors and the shared block: scalars `loss_cls/predictor0`, ...

        With dynamic_k in shared time also the metric `disagreement/predictor0`, see training.disagreement.
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
        samples = dict(zip(self.stage_predictors, prepared.stage_samples))
        if self.assignment == "dynamic_k":  # stages are never averaged: each assigns for itself
            prepared = prepared._replace(gt_index=None)
        for child, stage in bottom_up.named_children():
            x = stage(x)
            if child in samples:
                sample = samples[child]
                answer = self._answer(self.stage_predictors[child], x, sample.x_t, sample.t, prepared)
                losses, _ = self._losses(child, *answer, sample.x_t, sample.t, prepared)
                del answer, _  # only what is yielded holds the graph
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
        """Predictor by predictor. Where an image is on-policy, the detached answer of one takes the place of
        the path in the input of the next: one solver step, as at inference."""
        if hand_over.together:
            yield self._losses_together(features, prepared)
            return
        x_t = prepared.samples[0].x_t
        for index, (predictor, sample) in enumerate(zip(self.predictors, prepared.samples)):
            block = predictor_block(index)
            if not hand_over.owns(block):
                continue
            if not self._is_chained:
                x_t = sample.x_t
            elif index > 0:
                x_t = hand_over.receive(index, x_t)
            answer = self._answer(predictor, features, x_t, sample.t, prepared)
            with hand_over.among_owners(block):
                losses, x_1_hat = self._losses(block, *answer, x_t, sample.t, prepared)
            if self._is_chained and index + 1 < self.num_predictors:
                x_t = self._next_input(index, x_t, x_1_hat, prepared)
                hand_over.send(index + 1, x_t)
            del answer, x_1_hat  # only what is yielded holds the graph
            yield BlockLosses((block,), losses)
            del losses

    @property
    def _is_chained(self) -> bool:
        """Whether a predictor's answers are an input of the next."""
        return self.on_policy > 0 and self.predictors.time == "partitioned"

    def _answer(
        self, predictor: nn.Module, features, x_t: Tensor, t: Tensor, prepared: Prepared
    ) -> tuple[Tensor, Tensor]:
        """Class logits `(B, N, K)` and raw box answer `(B, N, 4)` of a predictor, or of that of a stage."""
        answer = predictor(features, self.space.proposals(x_t, prepared.image_sizes), x_t, t)
        return answer.class_logits, answer.boxes

    def _next_input(self, index: int, x_t: Tensor, x_1_hat: Tensor, prepared: Prepared) -> Tensor:
        """x_t `(B, N, 4)` of predictor `index + 1` by the endpoint of predictor `index`, detached."""
        t, following = prepared.samples[index].t, prepared.samples[index + 1]
        x_next = euler_step(x_t, self.space.clamp(x_1_hat.detach()), t, following.t)
        return torch.where(prepared.on_policy[:, None, None], x_next, following.x_t)

    def _losses_together(self, features: Sequence[Tensor], prepared: Prepared) -> BlockLosses:
        """All predictors as one batched computation; if they train on-policy, after a pass without gradients
        that finds their inputs."""
        samples = prepared.samples
        inputs = [sample.x_t for sample in samples]
        if self._is_chained:
            with torch.no_grad():
                for index in range(self.num_predictors - 1):
                    predictor, x_t = self.predictors[index], inputs[index]
                    _, boxes = self._answer(predictor, features, x_t, samples[index].t, prepared)
                    inputs[index + 1] = self._next_input(
                        index, x_t, self.space.endpoint(x_t, boxes), prepared
                    )
        t = torch.stack([sample.t for sample in samples])
        boxes_xyxy = torch.stack([self.space.proposals(x_t, prepared.image_sizes) for x_t in inputs])
        answers = self.predictors.answer_together(features, boxes_xyxy, torch.stack(inputs), t)
        blocks, terms = tuple(predictor_block(d) for d in range(self.num_predictors)), {}
        for index, block in enumerate(blocks):
            answer = (part[index] for part in answers)
            terms |= self._losses(block, *answer, inputs[index], samples[index].t, prepared)[0]
        return BlockLosses(blocks, terms)

    def _losses(
        self, block: str, class_logits: Tensor, boxes: Tensor, x_t: Tensor, t: Tensor, prepared: Prepared
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses and metrics of a block by its raw answer at `(x_t, t)`, and its endpoint `(B, N, 4)`."""
        x_1_hat, class_logits = self.space.endpoint(x_t, boxes), class_logits.to(x_t.dtype)
        gt_index, metrics = prepared.gt_index, {}
        if self.assignment == "dynamic_k":
            own = self.assigner(prepared.ground_truth, x_1_hat, class_logits)
            if gt_index is None:
                gt_index = own
            else:
                metrics[f"disagreement/{block}"] = disagreement(own, gt_index)
        classes, target_x_1 = assigned_targets(prepared.ground_truth, gt_index, self.num_classes)
        losses = self.criterion(class_logits, x_1_hat, classes, target_x_1, t)
        return {f"loss_{key}/{block}": value for key, value in losses.items()} | metrics, x_1_hat

    def _times(self, keys: Sequence[int]) -> list[Tensor]:
        """t `(B,)` of every predictor, uniform in its interval of the warped time; one t in shared time."""
        uniform = keyed_uniform(keys, self.num_predictors, device=self.device).unbind(1)
        if self.predictors.time == "shared":
            return [uniform[0]] * self.num_predictors
        return [self.predictors.training_time(d, u) for d, u in enumerate(uniform)]
