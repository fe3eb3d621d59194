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
from dfm_d2.detection.coupling import BACKGROUND_STD
from dfm_d2.flow import BoxSpace, ODESolver, SolverStep, Trajectory, keyed_normal, stream_key
from dfm_d2.flow.noise import STREAM_BACKGROUND
from dfm_d2.flow.solver import check_grid, warped_grid

# (x_t (B, N, 4), boxes_xyxy (B, N, 4), t, t_next) -> one step of the flow on the features of these images.
Flow = Callable[[Tensor, Tensor, float, float], BoxFlowUpdate]


@dataclass
class SamplerSettings:
    """What may change at test time without retraining. The keys are those of MODEL.DFM.SAMPLER."""

    num_proposals: int
    steps: int
    method: str = "euler"
    time_grid: Sequence[float] = ()
    predictors: Sequence[int] = ()
    seed: int = 0
    ensemble_steps: bool = False
    noise_passes: int = 1
    renewal_thresh: float = 0.0
    score_thresh: float = 0.0
    nms_thresh: float = 0.6
    detections_per_image: int = 100
    time_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_proposals", "steps", "noise_passes", "detections_per_image"):
            if getattr(self, name) < 1:
                raise ValueError(f"the sampler's {name} must be at least 1, got {getattr(self, name)}")
        if self.time_grid:
            check_grid(self.time_grid)
            if self.time_grid[0] != 0 or self.time_grid[-1] != 1:
                raise ValueError(
                    f"the sampler's time grid must run from 0 (noise) to 1 (data), got {list(self.time_grid)}"
                )

    @property
    def grid(self) -> tuple[float, ...]:
        """The time grid: the explicit one, else `steps` steps even in the predictors' intervals."""
        return check_grid(self.time_grid) if self.time_grid else warped_grid(self.steps, self.time_rate)


def initial_noise(
    image_ids: Sequence[int | str], seed: int, num_proposals: int, noise_passes: int = 1, device=None
) -> Tensor:
    """`x_0` `(B, P N, 4)` float32 of P noise passes, one after the other: of (seed, image id, pass) alone."""
    passes = [_noise_keys(image_ids, seed, noise_pass) for noise_pass in range(noise_passes)]
    return torch.cat([keyed_normal(keys, num_proposals, device=device) for keys in passes], dim=1)


def _noise_keys(image_ids: Sequence[int | str], seed: int, noise_pass: int) -> list[int]:
    return [stream_key("sampler", seed, image_id, noise_pass) for image_id in image_ids]


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
        """Candidates of all noise passes (and, with `ensemble_steps`, of all steps), concatenated.

        Args:
            make_flow: of features (L maps) and image sizes `(B, 2)` height, width.
            image_ids: what the noise depends on; with `x_0` they are not used.
            owner: what the flow depends on besides, see GraphCache; None: not to be captured.
            x_0: the noise of all passes, as `noise` makes it.

        Raises:
            ValueError: `x_0` with renewal, whose noise is made of the ids.
        """
        settings = self.settings
        if x_0 is not None and settings.renewal_thresh > 0:
            raise ValueError("noise that is given goes without renewal: set SAMPLER.RENEWAL_THRESH to 0")
        if x_0 is None:
            x_0 = self.noise(image_ids, image_sizes.device)

        def run(x_0: Tensor, image_sizes: Tensor, *features: Tensor) -> Candidates:
            flow = make_flow(features, image_sizes)
            trajectory = self._integrate(flow, x_0, image_sizes, keys, settings.ensemble_steps)
            steps = trajectory.steps if settings.ensemble_steps else [trajectory.last]
            found = [(step.x_1_hat, step.info.class_probs) for step in steps]
            return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*found)))

        found = []
        for noise_pass, noise in enumerate(x_0.chunk(settings.noise_passes, dim=1)):
            keys = self._keys(image_ids, noise_pass)
            inputs = (noise, image_sizes, *features)
            # Renewal's noise is made on the host for these very images.
            if owner is None or settings.renewal_thresh > 0:
                found.append(run(*inputs))
            else:
                found.append(Candidates(*self.graphs((owner, repr(settings)), run, inputs)))
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*found)))

    def trajectory(
        self,
        flow: Flow,
        image_sizes: Tensor,
        image_ids: Sequence[int | str],
        noise_pass: int = 0,
        return_intermediates: bool = False,
    ) -> Trajectory:
        """One pass from noise to boxes; the noise depends on (seed, image id, pass) alone.

        Args:
            image_sizes: `(B, 2)` height, width.
            return_intermediates: keep states and steps; `ensemble_steps` keeps them too.
        """
        keys = self._keys(image_ids, noise_pass)
        x_0 = keyed_normal(keys, self.settings.num_proposals, device=image_sizes.device)
        return self._integrate(
            flow, x_0, image_sizes, keys, return_intermediates or self.settings.ensemble_steps
        )

    def noise(self, image_ids: Sequence[int | str], device: torch.device) -> Tensor:
        """`initial_noise` of these settings."""
        settings = self.settings
        return initial_noise(image_ids, settings.seed, settings.num_proposals, settings.noise_passes, device)

    def _keys(self, image_ids: Sequence[int | str], noise_pass: int) -> list[int]:
        return _noise_keys(image_ids, self.settings.seed, noise_pass)

    def _integrate(
        self, flow: Flow, x_0: Tensor, image_sizes: Tensor, keys: Sequence[int], return_intermediates: bool
    ) -> Trajectory:
        settings = self.settings
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

        def renew(x: Tensor, step: SolverStep, t_next: float) -> Tensor:
            return self._renew(x, step.info.class_probs, t_next, keys)

        return ODESolver(settings.method).sample(
            velocity_field,
            x_0,
            settings.grid,
            return_intermediates=return_intermediates,
            after_step=renew if settings.renewal_thresh > 0 else None,
        )

    def _renew(self, x: Tensor, class_probs: Tensor, t_next: float, keys: Sequence[int]) -> Tensor:
        """Put proposals that found nothing back where training has its background: on the path from fresh
        noise to a random box, at `t_next`."""
        count, scale = x.shape[1], self.space.signal_scale
        fresh = [stream_key("renewal", key, repr(t_next)) for key in keys]
        noise = keyed_normal(fresh, count, device=x.device)
        background = keyed_normal(fresh, count, STREAM_BACKGROUND, x.device) * (2 * BACKGROUND_STD * scale)
        renewed = (1 - t_next) * noise + t_next * self.space.clamp(background)
        empty = class_probs.amax(-1, keepdim=True) < self.settings.renewal_thresh
        return torch.where(empty, renewed, x)
