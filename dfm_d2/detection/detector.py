"""FlowDetector: D local predictors on one backbone turn noise boxes into detections.

Shapes: B images, N proposals, D predictors, C channels, K classes, G ground-truth boxes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from dfm_d2.detection.assignment import DynamicK, assigned_targets
from dfm_d2.detection.coupling import build_slots, couple, noisy_endpoints
from dfm_d2.detection.from_config import detector_arguments, owners_in_bottom_up
from dfm_d2.detection.inference import BoxFlowModel
from dfm_d2.detection.loss import BlockLoss
from dfm_d2.detection.stage import StagePredictor
from dfm_d2.detection.training import Prepared, disagreement, of_common_size, pad_ground_truth
from dfm_d2.flow import (
    CondOTPath,
    keyed_normal,
    keyed_uniform,
    stream_key,
    warped_time,
)
from dfm_d2.flow.noise import STREAM_FROM_NOISE, STREAM_POLICY, STREAM_STAGE_TIME
from dfm_d2.framework import META_ARCH_REGISTRY, configurable

# Takes the name and the losses of a backbone stage as soon as they are there.
OnStage = Callable[[str, dict[str, Tensor]], None]


@META_ARCH_REGISTRY.register()
class FlowDetector(BoxFlowModel):
    """The multi-predictor flow detector.

    In training, `engine.local_update` calls `prepare`, `extract_features` and `block_losses` block by block.
    In evaluation, `forward` returns Detectron2's list of {"instances": Instances}.

    Args (besides those of BoxFlowModel):
        stage_predictors: of the backbone's stages that are blocks of their own, by name.
        criterion, assigner: loss of a block, dynamic_k.
        num_proposals: N in training. gt_repeat: see losses.coupling.build_slots.
        endpoint_noise: see losses.coupling.noisy_endpoints.
        on_policy: share of the images whose later predictors train where the earlier ones lead.
        from_noise: share of the images that start at t = 0, as inference does.
        coupling, assignment: see the config keys of those names.
        seed: of noise and t in training.
        freeze_backbone: the backbone neither learns nor moves its running statistics.
    """

    # Whether predictors are independent, so that they may be updated one by one.
    is_local = True

    @configurable
    def __init__(
        self,
        *,
        stage_predictors: Mapping[str, StagePredictor],
        criterion: BlockLoss,
        assigner: DynamicK,
        num_proposals: int,
        gt_repeat: int,
        endpoint_noise: float,
        on_policy: float,
        from_noise: float,
        coupling: str,
        assignment: str,
        seed: int,
        freeze_backbone: bool,
        **inference,
    ):
        super().__init__(**inference)
        self.stage_predictors = nn.ModuleDict(stage_predictors)
        self.criterion = criterion
        self.assigner = assigner
        self.num_proposals = num_proposals
        self.gt_repeat = gt_repeat
        self.endpoint_noise = endpoint_noise
        self.on_policy = on_policy
        self.from_noise = from_noise
        self.coupling = coupling
        self.assignment = assignment
        self.seed = seed
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            self.backbone.requires_grad_(False)
        self.path = CondOTPath()

    @classmethod
    def from_config(cls, cfg) -> dict:
        return detector_arguments(cfg)

    def train(self, mode: bool = True) -> "FlowDetector":
        """Set the mode; a frozen backbone stays in evaluation mode, or its batch norms would go on moving."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters, by full name, of each block: "shared" (backbone and FPN), "p0", "p1", ...

        "shared" is empty where the backbone is frozen. With stage predictors each of their stages is a block,
        "res2", ..., and "shared" is the FPN.
        """
        blocks: dict[str, list[tuple[str, nn.Parameter]]] = {stage: [] for stage in self.stage_predictors}
        blocks |= {"shared": []} | {f"p{d}": [] for d in range(self.num_predictors)}
        stages = list(self.stage_predictors)
        owner = owners_in_bottom_up(self.backbone.bottom_up, stages) if stages else {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                blocks[self._block_of(name.split("."), owner)].append((name, parameter))
        return blocks

    @staticmethod
    def _block_of(name: Sequence[str], stages: Mapping[str, str]) -> str:
        if name[0] == "predictors":
            return f"p{name[1]}"
        if name[0] == "stage_predictors":
            return name[1]
        return stages.get(name[2], "shared") if name[:2] == ["backbone", "bottom_up"] else "shared"

    # ---------------------------------------------------------------- training

    @torch.no_grad()
    def prepare(self, batched_inputs: Sequence[dict], iteration: int) -> Prepared:
        """Images, targets and one path sample a predictor.

        Noise depends on (seed, iteration, image id), t besides on the predictor, and on nothing else.
        """
        images = of_common_size(self._images(batched_inputs))
        image_sizes = self._image_sizes(images)
        ground_truth = pad_ground_truth(batched_inputs, image_sizes, self.space, self.num_classes)
        ids = self.image_ids(batched_inputs)
        keys = [stream_key("train", self.seed, iteration, image_id) for image_id in ids]
        x_0 = keyed_normal(keys, self.num_proposals, device=self.device).to(ground_truth.x_1.dtype)
        slots = build_slots(ground_truth, self.num_proposals, self.gt_repeat, keys, self.space.signal_scale)
        slots = couple(x_0, slots, self.coupling, keys)
        x_1 = noisy_endpoints(slots.x_1, self.endpoint_noise, keys, self.space.signal_scale)
        samples = [self.path.sample(x_0, x_1, t) for t in self._times(keys)]
        if self.assignment == "path":
            gt_index = slots.gt_index
        elif self.predictors.time == "shared":
            # One assignment for all: predictors that are averaged must not pull a query to different objects.
            gt_index = self.assigner(ground_truth, samples[0].x_t)
        else:
            gt_index = None
        inputs = [sample.x_t for sample in samples]
        on_policy = self._drawn(keys, STREAM_POLICY, self.on_policy)
        stages = keyed_uniform(keys, len(self.stage_predictors), STREAM_STAGE_TIME, self.device)
        times = warped_time(stages, self.predictors.rate).unbind(1)
        stage_samples = [self.path.sample(x_0, x_1, t) for t in times]
        return Prepared(
            images, image_sizes, ground_truth, samples, inputs, on_policy, gt_index, stage_samples
        )

    def extract_features(self, prepared: Prepared, on_stage: OnStage | None = None) -> list[Tensor]:
        """The shared block: L maps `(B, C, H_l, W_l)`, float32 or more: gradients of blocks add up in them.

        Args:
            on_stage: called with each stage that is a block and its losses `loss_cls/res2`, ...; the next
                stage and the FPN get the stage's output detached.
        """
        with ExitStack() as hooks:
            for index, name in enumerate(self.stage_predictors):

                def end_block(
                    _module, _inputs, output: Tensor, index: int = index, name: str = name
                ) -> Tensor:
                    if on_stage is not None:
                        on_stage(name, self._stage_losses(index, name, output, prepared))
                    return output.detach()

                handle = getattr(self.backbone.bottom_up, name).register_forward_hook(end_block)
                hooks.callback(handle.remove)
            return self._features(prepared.images.tensor)

    def _stage_losses(self, index: int, name: str, feature: Tensor, prepared: Prepared) -> dict[str, Tensor]:
        """The local loss of a backbone stage, by its own predictor."""
        sample = prepared.stage_samples[index]
        boxes_xyxy = self.space.proposals(sample.x_t, prepared.image_sizes)
        answer = self.stage_predictors[name](feature, boxes_xyxy, sample.x_t, sample.t)
        # Stages are never averaged: with dynamic_k each assigns for itself.
        gt_index = prepared.gt_index if self.assignment == "path" else None
        losses, _ = self._losses(answer.class_logits, answer.boxes, sample.x_t, sample.t, prepared, gt_index)
        return {f"loss_{key}/{name}": value for key, value in losses.items()}

    def chained_inputs(self, prepared: Prepared) -> list[Tensor] | None:
        """`x_t` `(B, N, 4)` of every predictor where each makes that of the next; None where none needs
        another's."""
        return prepared.inputs if self._is_chained else None

    @property
    def _is_chained(self) -> bool:
        return self.on_policy > 0 and self.predictors.time == "partitioned"

    def block_losses(self, index: int, features: Sequence[Tensor], prepared: Prepared) -> dict[str, Tensor]:
        """The local loss of predictor `index`: weighted scalars `loss_cls/p0`, ...

        With dynamic_k in shared time also the metric `disagreement/p0`, see modeling.training.disagreement.

        Where an image is on-policy, the detached answer then takes the place of the path in the input of the
        next predictor: one solver step, as at inference.
        """
        x_t, t = prepared.inputs[index], prepared.samples[index].t
        boxes_xyxy = self.space.proposals(x_t, prepared.image_sizes)
        answer = self.predictors[index](features, boxes_xyxy, x_t, t)
        terms, x_1_hat = self._block_terms(index, answer.class_logits, answer.boxes, prepared)
        if self._is_chained and index + 1 < self.num_predictors:
            following = prepared.samples[index + 1]
            x_next = self.path.step(x_t, self.space.clamp(x_1_hat.detach()), t, following.t)
            prepared.inputs[index + 1] = torch.where(prepared.on_policy[:, None, None], x_next, following.x_t)
        return terms

    def all_losses(self, features: Sequence[Tensor], prepared: Prepared) -> dict[str, Tensor]:
        """The losses of all predictors, for the joint update."""
        losses: dict[str, Tensor] = {}
        for index in range(self.num_predictors):
            losses |= self.block_losses(index, features, prepared)
        return losses

    def all_losses_together(
        self, features: Sequence[Tensor], prepared: Prepared, batched: bool | None = None
    ) -> dict[str, Tensor]:
        """As all_losses, the predictors evaluated as one batched computation.

        Where they train on-policy, each needs the answers before it: these are then found first, one by one
        and without gradients.

        Args:
            batched: None: on a GPU only; a CPU is slower at many small products than at few large ones
                (docs/memory.md), and takes the predictors one by one.
        """
        if not (self.device.type == "cuda" if batched is None else batched):
            return self.all_losses(features, prepared)
        if self._is_chained:
            with torch.no_grad():
                for index in range(self.num_predictors - 1):
                    self.block_losses(index, features, prepared)
        x_t = torch.stack(prepared.inputs)
        t = torch.stack([sample.t for sample in prepared.samples])
        boxes_xyxy = torch.stack([self.space.proposals(x, prepared.image_sizes) for x in prepared.inputs])
        boxes, class_logits = self.predictors.answer_together(features, boxes_xyxy, x_t, t)
        terms: dict[str, Tensor] = {}
        for index in range(self.num_predictors):
            terms |= self._block_terms(index, class_logits[index], boxes[index], prepared)[0]
        return terms

    def _block_terms(
        self, index: int, class_logits: Tensor, boxes: Tensor, prepared: Prepared
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses and metrics of the raw answer of predictor `index`, and its endpoint `(B, N, 4)`."""
        x_t, t = prepared.inputs[index], prepared.samples[index].t
        losses, x_1_hat = self._losses(class_logits, boxes, x_t, t, prepared, prepared.gt_index)
        terms = {f"loss_{name}/p{index}": value for name, value in losses.items()}
        if self.assignment == "dynamic_k" and prepared.gt_index is not None:
            terms[f"disagreement/p{index}"] = disagreement(self.assigner, prepared, class_logits, x_1_hat)
        return terms, x_1_hat

    def _losses(
        self, class_logits: Tensor, boxes: Tensor, x_t: Tensor, t: Tensor, prepared: Prepared, gt_index
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of one raw answer at `(x_t, t)`, and its endpoint `(B, N, 4)`."""
        x_1_hat = self.flow.endpoint(x_t, boxes, t)
        class_logits = class_logits.to(x_t.dtype)
        if gt_index is None:
            gt_index = self.assigner(prepared.ground_truth, x_1_hat, class_logits)
        classes, target_x_1 = assigned_targets(prepared.ground_truth, gt_index, self.num_classes)
        return self.criterion(class_logits, x_1_hat, classes, target_x_1, t), x_1_hat

    def _drawn(self, keys: Sequence[int], stream: int, share: float) -> Tensor:
        """`(B,)` bool, true for a share of the images."""
        return keyed_uniform(keys, 1, stream, self.device)[:, 0] < share

    def _times(self, keys: Sequence[int]) -> list[Tensor]:
        """t `(B,)` of every predictor; of images from noise, the beginning of its interval."""
        uniform = keyed_uniform(keys, self.num_predictors, device=self.device)
        uniform = uniform.masked_fill(self._drawn(keys, STREAM_FROM_NOISE, self.from_noise)[:, None], 0.0)
        if self.predictors.time == "shared":
            return [uniform[:, 0]] * self.num_predictors
        return [self.predictors.training_time(d, uniform[:, d]) for d in range(self.num_predictors)]
