"""Inference: noise boxes flow along the predictors' velocities to detections.

Shapes: B images, N proposals, D predictors, K classes, M candidate detections.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from dfm_kernels.box_flow_update import BoxFlowUpdate
from torch import Tensor

from dfm_d2.detection.captured import GraphCache
from dfm_d2.errors import UserError
from dfm_d2.flow import BoxSpace, ODESolver, SolverStep, Trajectory, keyed_normal, stream_key
from dfm_d2.flow.solver import warped_grid

# (x_t (B, N, 4), boxes_xyxy (B, N, 4), t, t_next) -> one step of the flow on the features of these images.
Flow = Callable[[Tensor, Tensor, float, float], BoxFlowUpdate]


@dataclass
class SamplerSettings:
    """What may change at test time without retraining. The keys are those of MODEL.DFM.SAMPLER."""

    num_proposals: int
    steps: int
    method: str = "euler"
    predictors: Sequence[int] = ()
    seed: int = 0
    noise_passes: int = 1
    score_thresh: float = 0.0
    nms_thresh: float = 0.6
    detections_per_image: int = 100
    time_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_proposals", "steps", "noise_passes", "detections_per_image"):
            if getattr(self, name) < 1:
                raise UserError(f"the sampler's {name} must be at least 1, got {getattr(self, name)}")

    @property
    def grid(self) -> tuple[float, ...]:
        """The time grid: `steps` steps even in the predictors' intervals."""
        return warped_grid(self.steps, self.time_rate)


def initial_noise(
    image_ids: Sequence[int | str], seed: int, num_proposals: int, noise_passes: int = 1, device=None
) -> Tensor:
    """`x_0` `(B, P N, 4)` float32 of P noise passes, one after the other: of (seed, image id, pass) alone."""
    passes = [
        keyed_normal(
            [stream_key("sampler", seed, image_id, noise_pass) for image_id in image_ids],
            num_proposals,
            device=device,
        )
        for noise_pass in range(noise_passes)
    ]
    return torch.cat(passes, dim=1)


class Candidates(NamedTuple):
    """Before NMS. x_1_hat: `(B, M, 4)` signal. class_probs: `(B, M, K)`."""

    x_1_hat: Tensor
    class_probs: Tensor


class _StepInfo(NamedTuple):
    class_probs: Tensor
    boxes_xyxy: Tensor


@dataclass
class BoxSampler:
    """Integrates noise boxes to endpoints.

    Args:
        space: the box space. settings: may be replaced between calls.
        graphs: of the shapes that were captured.
    """

    space: BoxSpace
    settings: SamplerSettings
    graphs: GraphCache = field(default_factory=GraphCache)

    def sample(
        self,
        make_flow: Callable[[Sequence[Tensor], Tensor], Flow],
        features: Sequence[Tensor],
        image_sizes: Tensor,
        image_ids: Sequence[int | str],
        owner: Hashable | None = None,
        x_0: Tensor | None = None,
    ) -> Candidates:
        """Candidates of all noise passes, concatenated.

        Args:
            make_flow: of features (L maps) and image sizes `(B, 2)` height, width.
            image_ids: what the noise depends on; with `x_0` they are not used.
            owner: what the flow depends on besides, see GraphCache; None: not to be captured.
            x_0: the noise of all passes, as `noise` makes it.
        """
        settings = self.settings
        if x_0 is None:
            x_0 = self.noise(image_ids, image_sizes.device)

        def run(x_0: Tensor, image_sizes: Tensor, *features: Tensor) -> Candidates:
            last = self._integrate(make_flow(features, image_sizes), x_0, image_sizes).last
            return Candidates(last.x_1_hat, last.info.class_probs)

        found = []
        for noise in x_0.chunk(settings.noise_passes, dim=1):
            inputs = (noise, image_sizes, *features)
            if owner is None:
                found.append(run(*inputs))
            else:
                found.append(Candidates(*self.graphs((owner, repr(settings)), run, inputs)))
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*found)))

    def trajectory(
        self,
        flow: Flow,
        image_sizes: Tensor,
        image_ids: Sequence[int | str],
        return_intermediates: bool = False,
    ) -> Trajectory:
        """The first noise pass from noise to boxes.

        Args:
            image_sizes: `(B, 2)` height, width.
            return_intermediates: keep states and steps.
        """
        x_0 = initial_noise(
            image_ids, self.settings.seed, self.settings.num_proposals, device=image_sizes.device
        )
        return self._integrate(flow, x_0, image_sizes, return_intermediates)

    def noise(self, image_ids: Sequence[int | str], device: torch.device) -> Tensor:
        """`initial_noise` of these settings."""
        settings = self.settings
        return initial_noise(image_ids, settings.seed, settings.num_proposals, settings.noise_passes, device)

    def _integrate(
        self, flow: Flow, x_0: Tensor, image_sizes: Tensor, return_intermediates: bool = False
    ) -> Trajectory:
        last: list[SolverStep] = []

        def velocity_field(x_t: Tensor, t: float, t_next: float) -> SolverStep:
            # The last update has already made the pixel boxes of the state that it led to.
            if last and last[0].x_next is x_t:
                boxes_xyxy = last[0].info.boxes_xyxy
            else:
                boxes_xyxy = self.space.proposals(x_t, image_sizes)
            update = flow(x_t, boxes_xyxy, t, t_next)
            info = _StepInfo(update.class_probs, update.boxes_xyxy)
            last[:] = [SolverStep(update.x_next, update.x_1_hat, update.velocity, info)]
            return last[0]

        settings = self.settings
        return ODESolver(settings.method).sample(
            velocity_field, x_0, settings.grid, return_intermediates=return_intermediates
        )
