"""Inference of a flow detector: noise boxes flow to detections.

Shapes: B images, N proposals, D predictors, C channels, K classes.
"""

from collections.abc import Hashable, Sequence
from functools import partial

import torch
from dfm_kernels import use_triton
from dfm_kernels.box_flow_update import BoxFlowUpdate, box_flow_update
from dfm_kernels.multilevel_roi_align import size_tensor
from torch import Tensor, nn

from dfm_d2.detection.postprocess import detections
from dfm_d2.detection.sampler import BoxSampler, Candidates
from dfm_d2.detection.stack import PredictorStack
from dfm_d2.flow import (
    BoxSpace,
    ODESolver,
    StepFunction,
    Trajectory,
    at_least_float32,
    time_like,
    unwarped_time,
    warped_grid,
)
from dfm_d2.framework import Backbone, ImageList


class BoxFlowModel(nn.Module):
    """What a trained detector needs: backbone, predictors, and the sampler that carries noise by them.

    Args:
        backbone: a Detectron2 backbone. in_features: names of its outputs that are pooled.
        predictors: the stack of D. num_classes: K.
        space: meaning of raw answers. sampler: of inference.
        pixel_mean, pixel_std: per channel, in INPUT.FORMAT order.

    Buffers, which dfm_d2.detection.calibration sets: temperature of the scores; threshold of those that are
    worth showing, 0 where it is not known.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        predictors: PredictorStack,
        num_classes: int,
        space: BoxSpace,
        sampler: BoxSampler,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__()
        self.backbone = backbone
        self.in_features = list(in_features)
        self.predictors = predictors
        self.num_classes = num_classes
        self.space = space
        numbers = {"signal_scale": space.signal_scale, "box_weights": space.box_weights}
        self.solver_step = partial(box_flow_update, **numbers)
        self.sampler = sampler
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("threshold", torch.zeros(()))
        # Not persistent: they come from the config, and a checkpoint must not override it silently.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def num_predictors(self) -> int:
        """D."""
        return len(self.predictors)

    @property
    def time_grid(self) -> tuple[float, ...]:
        """Of the sampler: its steps, even in the predictors' intervals."""
        return warped_grid(self.sampler.settings.steps, self.predictors.rate)

    @torch.no_grad()
    def inference(self, batched_inputs: Sequence[dict], x_0: Tensor | None = None) -> list[dict]:
        """Detections `[{"instances": Instances}]`, in original image coordinates.

        Args:
            x_0: the noise, see `candidates`; None: made of the ids of the images.
        """
        pixels, image_sizes = self._images(batched_inputs)
        if x_0 is None:
            x_0 = self.sampler.noise(self.image_ids(batched_inputs), self.device)
        candidates = self.candidates(pixels, image_sizes, x_0)
        return detections(candidates, self.space, image_sizes, batched_inputs, self.sampler.settings)

    def candidates(self, pixels: Tensor, image_sizes: Tensor, x_0: Tensor) -> Candidates:
        """What the sampler finds, before NMS. Tensors in and out, of shapes that no data decides.

        Args:
            pixels: `(B, 3, H, W)` normalised, zero where padded; H and W multiples of the backbone's
                `size_divisibility`. image_sizes: `(B, 2)` height, width without the padding.
            x_0: `(B, P N, 4)` noise of P = SAMPLER.NOISE_PASSES passes.
        """
        features = self._features(pixels)
        ways = self.time_grid, self._graph_owner()
        found = self.sampler.sample(self._step_function, features, image_sizes, x_0, *ways)
        return found._replace(class_probs=self.calibrated(found.class_probs))

    def calibrated(self, scores: Tensor) -> Tensor:
        """`sigmoid(logit(s) / T)`, in a form that is exactly `s` at T = 1 and finite for 0 and 1."""
        yes, no = scores ** (1 / self.temperature), (1 - scores) ** (1 / self.temperature)
        return yes / (yes + no)

    def _graph_owner(self) -> Hashable | None:
        """What a captured sampler depends on besides its inputs; None where it cannot be one CUDA graph."""
        # The reference's RoIAlign brings numbers of the host to the device, which a graph cannot record.
        recording = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if self.device.type != "cuda" or self.training or recording:
            return None
        if not use_triton("the sampler", self.pixel_mean):
            return None
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return autocast, tuple(p.data_ptr() for p in self.predictors.parameters())

    @torch.no_grad()
    def trajectory(self, batched_inputs: Sequence[dict]) -> tuple[Trajectory, Tensor, StepFunction]:
        """States and answers of every solver step of the first noise pass, the `(B, 2)` image sizes to decode
        them with, and the step function that answered.

        That may be asked again, at any time of the grid; it follows SAMPLER.MEMBERS as it is then.
        """
        settings = self.sampler.settings
        pixels, image_sizes = self._images(batched_inputs)
        step_function = self._step_function(self._features(pixels), image_sizes)
        x_0 = self.sampler.noise(self.image_ids(batched_inputs), self.device)[:, : settings.num_proposals]
        trajectory = ODESolver.sample(step_function, x_0, self.time_grid, return_intermediates=True)
        return trajectory, image_sizes, step_function

    def _step_function(self, features: Sequence[Tensor], image_sizes: Tensor) -> StepFunction:
        """On these features: one solver step by the predictors that answer at its time."""
        stack, last = self.predictors, []
        # What each place in an interval answered last, and what crossed into every interval that was entered.
        queries: dict[int, Tensor] = {}
        entered: dict[int, dict[int, Tensor]] = {}

        def step(x_t: Tensor, t: float, t_next: float) -> BoxFlowUpdate:
            # The last update has already made the pixel boxes of the state that it led to.
            known = last and last[0].x_next is x_t
            boxes_xyxy = last[0].boxes_xyxy if known else self.space.proposals(x_t, image_sizes)
            indices = stack.answering(t, self.sampler.settings.members)
            crossed = entered.setdefault(stack.interval(t), dict(queries))
            # They all look at the same boxes, and share one pooler.
            pooled = stack[0].pooler(features, boxes_xyxy)
            u, answers = time_like(x_t, unwarped_time(t, stack.rate)), []
            for d in indices:
                place = d % stack.num_members
                answers.append(stack[d](features, boxes_xyxy, x_t, u, crossed.get(place), pooled=pooled))
                if stack.crosses:
                    queries[place] = answers[-1].queries
            boxes = torch.stack([answer.boxes for answer in answers])
            class_logits = torch.stack([answer.class_logits for answer in answers])
            times = time_like(x_t, t), time_like(x_t, t_next)
            last[:] = [self.solver_step(x_t, boxes, class_logits, *times, image_sizes)]
            return last[0]

        return step

    def _images(self, batched_inputs: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """Normalised pixels `(B, 3, H, W)`, zero where padded, and image sizes `(B, 2)` height, width."""
        backbone = self.backbone
        images = ImageList.from_tensors(
            [(x["image"].to(self.device).float() - self.pixel_mean) / self.pixel_std for x in batched_inputs],
            backbone.size_divisibility,
            padding_constraints=backbone.padding_constraints,
        )
        return images.tensor, size_tensor(images.image_sizes, self.device, self.pixel_mean.dtype)

    @staticmethod
    def image_ids(batched_inputs: Sequence[dict]) -> list[int | str]:
        """What the noise of each image depends on."""
        # Without an id the place in the batch must do; noise then depends on it.
        return [x.get("image_id", x.get("file_name", i)) for i, x in enumerate(batched_inputs)]

    def _features(self, pixels: Tensor) -> list[Tensor]:
        features = self.backbone(pixels)
        found = [at_least_float32(features[name]) for name in self.in_features]
        if not use_triton("RoIAlign", found[0]):
            return found
        # The RoIAlign kernel reads pixels of all channels: laid out once here, not once a predictor and step.
        return [f.contiguous(memory_format=torch.channels_last) for f in found]
