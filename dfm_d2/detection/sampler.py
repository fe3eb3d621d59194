"""Inference: noise boxes flow along the predictors' velocities to detections.

Shapes: B images, N proposals, D predictors, K classes, M candidate detections.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dfm_d2.detection.captured import GraphCache
from dfm_d2.flow import ODESolver, StepFunction, keyed_normal, stream_key


@dataclass
class SamplerSettings:
    """What may change at test time without retraining. The keys are those of MODEL.DFM.SAMPLER.

    ValueError for fewer than one proposal, step, pass or detection.
    """

    num_proposals: int
    steps: int
    members: Sequence[int] = ()
    seed: int = 0
    noise_passes: int = 1
    score_thresh: float = 0.0
    nms_thresh: float = 0.6
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        if min(self.num_proposals, self.steps, self.noise_passes, self.detections_per_image) < 1:
            raise ValueError(f"proposals, steps, passes and detections must be at least 1, got {self}")


class Candidates(NamedTuple):
    """Before NMS. x_1_hat: `(B, M, 4)` signal. class_probs: `(B, M, K)`."""

    x_1_hat: Tensor
    class_probs: Tensor


@dataclass
class BoxSampler:
    """Carries noise boxes to endpoints.

    Args:
        settings: may be replaced between calls. graphs: of the shapes that were captured.
    """

    settings: SamplerSettings
    graphs: GraphCache = field(default_factory=GraphCache)

    def sample(
        self,
        make_step_function: Callable[[Sequence[Tensor], Tensor], StepFunction],
        features: Sequence[Tensor],
        image_sizes: Tensor,
        x_0: Tensor,
        time_grid: Sequence[float],
        owner: Hashable | None = None,
    ) -> Candidates:
        """Candidates of all noise passes, concatenated.

        Args:
            make_step_function: of features (L maps) and image sizes `(B, 2)`; steps are BoxFlowUpdates.
            x_0: the noise of all passes, as `noise` makes it. time_grid: of every pass.
            owner: what the steps depend on besides, see GraphCache; None: not to be captured.
        """
        settings = self.settings

        def run(x_0: Tensor, image_sizes: Tensor, *features: Tensor) -> Candidates:
            step_function = make_step_function(features, image_sizes)
            last = ODESolver.sample(step_function, x_0, time_grid).last
            return Candidates(last.x_1_hat, last.class_probs)

        found = []
        for noise in x_0.chunk(settings.noise_passes, dim=1):
            inputs = (noise, image_sizes, *features)
            is_captured = owner is not None
            found.append(self.graphs((owner, repr(settings)), run, inputs) if is_captured else run(*inputs))
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*found)))

    def noise(self, image_ids: Sequence[int | str], device: torch.device | None = None) -> Tensor:
        """`x_0` `(B, P N, 4)` float32 of P passes, one after the other: of (seed, image id, pass) alone."""
        settings, passes = self.settings, []
        for number in range(settings.noise_passes):
            keys = [stream_key("sampler", settings.seed, image_id, number) for image_id in image_ids]
            passes.append(keyed_normal(keys, settings.num_proposals, device=device))
        return torch.cat(passes, dim=1)
