"""FlowDetector: D local predictors on one backbone turn noise boxes into detections.

Shapes: B images, N proposals, D predictors, C channels, K classes, G ground-truth boxes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from dfm_kernels.reference import BoxFlowUpdate
from torch import Tensor, nn

from dfm_d2.core import (
    BoxFlow,
    BoxSpace,
    CondOTPath,
    PathSample,
    Trajectory,
    keyed_normal,
    keyed_uniform,
    stream_key,
    time_like,
)
from dfm_d2.framework import META_ARCH_REGISTRY, Backbone, ImageList, configurable
from dfm_d2.losses import (
    BlockLoss,
    DynamicK,
    GroundTruth,
    assigned_targets,
    build_slots,
    couple,
    noisy_endpoints,
)
from dfm_d2.modeling.from_config import detector_arguments
from dfm_d2.modeling.postprocess import detections
from dfm_d2.modeling.sampler import BoxSampler, Flow
from dfm_d2.predictors import PredictorStack


class Prepared(NamedTuple):
    """All that one training step needs, without gradients.

    images: padded, normalised. image_sizes: `(B, 2)` height, width. ground_truth: padded.
    samples: the path sample of every predictor. gt_index: the coupled (or, for TIME "shared" with
    dynamic_k, the predictor-independent) assignment `(B, N)`; None where each predictor assigns.
    """

    images: ImageList
    image_sizes: Tensor
    ground_truth: GroundTruth
    samples: list[PathSample]
    gt_index: Tensor | None


@META_ARCH_REGISTRY.register()
class FlowDetector(nn.Module):
    """The multi-predictor flow detector.

    In training, `engine.local_update` calls `prepare`, `extract_features` and `block_losses` block by block.
    In evaluation, `forward` returns Detectron2's list of {"instances": Instances}.

    Args:
        backbone: a Detectron2 backbone. in_features: names of its outputs that are pooled.
        predictors: the stack of D. num_classes: K.
        space, flow, sampler: box space, meaning of raw answers, inference.
        criterion, assigner: loss of a block, dynamic_k.
        num_proposals: N in training. gt_repeat: see losses.coupling.build_slots.
        endpoint_noise: see losses.coupling.noisy_endpoints.
        coupling, assignment: see the config keys of those names.
        seed: of noise and t in training.
        freeze_backbone: the backbone neither learns nor moves its running statistics.
        pixel_mean, pixel_std: per channel, in INPUT.FORMAT order.
    """

    # Whether predictors are independent, so that they may be updated one by one.
    is_local = True

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        predictors: PredictorStack,
        num_classes: int,
        space: BoxSpace,
        flow: BoxFlow,
        sampler: BoxSampler,
        criterion: BlockLoss,
        assigner: DynamicK,
        num_proposals: int,
        gt_repeat: int,
        endpoint_noise: float,
        coupling: str,
        assignment: str,
        seed: int,
        freeze_backbone: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__()
        self.backbone = backbone
        self.in_features = list(in_features)
        self.predictors = predictors
        self.num_classes = num_classes
        self.space = space
        self.flow = flow
        self.sampler = sampler
        self.criterion = criterion
        self.assigner = assigner
        self.num_proposals = num_proposals
        self.gt_repeat = gt_repeat
        self.endpoint_noise = endpoint_noise
        self.coupling = coupling
        self.assignment = assignment
        self.seed = seed
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            backbone.requires_grad_(False)
        self.path = CondOTPath()
        # Not persistent: they come from the config, and a checkpoint must not override it silently.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        return detector_arguments(cfg)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def num_predictors(self) -> int:
        """D."""
        return len(self.predictors)

    def train(self, mode: bool = True) -> "FlowDetector":
        """Set the mode; a frozen backbone stays in evaluation mode, or its batch norms would go on moving."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters, by full name, of each block: "shared" (backbone and FPN), "p0", "p1", ...

        "shared" is empty where the backbone is frozen.
        """
        blocks: dict[str, list[tuple[str, nn.Parameter]]] = {"shared": []}
        blocks |= {f"p{d}": [] for d in range(self.num_predictors)}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                owner = f"p{name.split('.')[1]}" if name.startswith("predictors.") else "shared"
                blocks[owner].append((name, parameter))
        return blocks

    # ---------------------------------------------------------------- training

    @torch.no_grad()
    def prepare(self, batched_inputs: Sequence[dict], iteration: int) -> Prepared:
        """Images, targets and one path sample a predictor.

        Noise depends on (seed, iteration, image id), t besides on the predictor, and on nothing else.
        """
        images = self._images(batched_inputs)
        image_sizes = self._image_sizes(images)
        ground_truth = self._ground_truth(batched_inputs, image_sizes)
        ids = self._image_ids(batched_inputs)
        keys = [stream_key("train", self.seed, iteration, image_id) for image_id in ids]
        x_0 = keyed_normal(keys, self.num_proposals, device=self.device)
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
        return Prepared(images, image_sizes, ground_truth, samples, gt_index)

    def extract_features(self, prepared: Prepared) -> list[Tensor]:
        """The shared block: L maps `(B, C, H_l, W_l)`, float32 so that gradients of blocks add up in it."""
        return self._features(prepared.images)

    def block_losses(self, index: int, features: Sequence[Tensor], prepared: Prepared) -> dict[str, Tensor]:
        """The local loss of predictor `index`: weighted scalars `loss_cls/p0`, ..."""
        sample = prepared.samples[index]
        boxes_xyxy = self.space.proposals(sample.x_t, prepared.image_sizes)
        answer = self.predictors[index](features, boxes_xyxy, sample.x_t, sample.t)
        losses, _ = self._losses(
            answer.class_logits, answer.boxes, sample.x_t, sample.t, prepared, prepared.gt_index
        )
        return {f"loss_{name}/p{index}": value for name, value in losses.items()}

    def all_losses(self, features: Sequence[Tensor], prepared: Prepared) -> dict[str, Tensor]:
        """The losses of all predictors, for the joint update."""
        losses: dict[str, Tensor] = {}
        for index in range(self.num_predictors):
            losses |= self.block_losses(index, features, prepared)
        return losses

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

    def _times(self, keys: Sequence[int]) -> list[Tensor]:
        """t `(B,)` of every predictor."""
        uniform = keyed_uniform(keys, self.num_predictors, device=self.device)
        if self.predictors.time == "shared":
            return [uniform[:, 0]] * self.num_predictors
        return [self.predictors.training_time(d, uniform[:, d]) for d in range(self.num_predictors)]

    def _ground_truth(self, batched_inputs: Sequence[dict], image_sizes: Tensor) -> GroundTruth:
        x_1, classes = [], []
        for index, (item, size) in enumerate(zip(batched_inputs, image_sizes)):
            if "instances" not in item:
                raise ValueError(
                    f"training input {item.get('file_name', index)!r} has no 'instances' to learn from"
                )
            instances = item["instances"].to(self.device)
            labels = instances.gt_classes
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"{item.get('file_name', index)!r} has a class outside [0, {self.num_classes}): "
                    "set MODEL.DFM.NUM_CLASSES to the data set's number of classes"
                )
            x_1.append(self.space.encode(instances.gt_boxes.tensor, size))
            classes.append(labels)
        return GroundTruth.pad(x_1, classes)

    # --------------------------------------------------------------- inference

    def forward(self, batched_inputs: Sequence[dict]) -> list[dict]:
        """Detections `[{"instances": Instances}]`, in original image coordinates.

        In training mode use `engine.local_update`, or `prepare`, `extract_features` and `all_losses`.

        Raises:
            RuntimeError: in training mode, which needs an iteration to key its noise.
        """
        if self.training:
            raise RuntimeError(
                "FlowDetector.forward is inference: train through dfm_d2.engine (or call prepare, "
                "extract_features and all_losses), or call eval() first"
            )
        return self.inference(batched_inputs)

    @torch.no_grad()
    def inference(self, batched_inputs: Sequence[dict]) -> list[dict]:
        """As forward in evaluation mode, whatever the mode."""
        images = self._images(batched_inputs)
        image_sizes = self._image_sizes(images)
        ids = self._image_ids(batched_inputs)
        flow = self._flow(self._features(images), image_sizes)
        candidates = self.sampler.sample(flow, image_sizes, ids)
        return detections(candidates, self.space, image_sizes, batched_inputs, self.sampler.settings)

    @torch.no_grad()
    def trajectory(self, batched_inputs: Sequence[dict]) -> tuple[Trajectory, Tensor]:
        """States and answers of every solver step, and the `(B, 2)` image sizes to decode them with."""
        images = self._images(batched_inputs)
        image_sizes = self._image_sizes(images)
        ids = self._image_ids(batched_inputs)
        flow = self._flow(self._features(images), image_sizes)
        return self.sampler.trajectory(flow, image_sizes, ids, return_intermediates=True), image_sizes

    def _flow(self, features: Sequence[Tensor], image_sizes: Tensor) -> Flow:
        """One solver step on these features, by the predictors that answer at its time."""

        def flow(x_t: Tensor, boxes_xyxy: Tensor, t: float, t_next: float) -> BoxFlowUpdate:
            times = time_like(x_t, t)
            indices = self.predictors.answering(t, self.sampler.settings.predictors)
            answers, class_logits = self.predictors.answer(indices, features, boxes_xyxy, x_t, times)
            return self.flow.update(x_t, answers, class_logits, times, time_like(x_t, t_next), image_sizes)

        return flow

    # ------------------------------------------------------------------ shared

    def _images(self, batched_inputs: Sequence[dict]) -> ImageList:
        images = [
            (x["image"].to(self.device).float() - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        return ImageList.from_tensors(
            images, self.backbone.size_divisibility, padding_constraints=self.backbone.padding_constraints
        )

    def _image_sizes(self, images: ImageList) -> Tensor:
        return torch.tensor(images.image_sizes, dtype=torch.float32, device=self.device)

    @staticmethod
    def _image_ids(batched_inputs: Sequence[dict]) -> list[int | str]:
        # Without an id the place in the batch must do; noise then depends on it.
        return [x.get("image_id", x.get("file_name", i)) for i, x in enumerate(batched_inputs)]

    def _features(self, images: ImageList) -> list[Tensor]:
        features = self.backbone(images.tensor)
        return [features[name].float() for name in self.in_features]
