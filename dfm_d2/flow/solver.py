"""Euler's solver of the flow's ordinary differential equation `dx/dt = v(x, t)` over a time grid.

Shapes: B samples; any trailing dimensions. Static shapes, no host synchronisation.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from dfm_kernels.box_flow_update import euler_step
from torch import Tensor


class SolverStep(NamedTuple):
    """The answer at `(x_t, t)` for a step to `t_next`; another type may have more than these.

    x_next: the step's end. x_1_hat: the endpoint.
    """

    x_next: Tensor
    x_1_hat: Tensor


# (x_t, t, t_next) -> SolverStep; times are Python numbers, so that it may choose by them who answers
# without waiting for the device.
StepFunction = Callable[[Tensor, float, float], SolverStep]


class Trajectory(NamedTuple):
    """x: the answer `(B, ...)`. times: the grid. states: `x_t` at every time (empty unless asked for).

    steps: the answer of every step (empty unless asked for). last: that of the last step.
    """

    x: Tensor
    times: tuple[float, ...]
    states: list[Tensor]
    steps: list[SolverStep]
    last: SolverStep


def warped_time(u: float | Tensor, rate: float) -> float | Tensor:
    """`t = (1 - exp(-r u)) / (1 - exp(-r))`: even steps of u divide the noise left by about as much.

    `t = u` for a rate r of 0.
    """
    if rate == 0:
        return u
    expm1 = torch.expm1 if isinstance(u, Tensor) else math.expm1
    return expm1(-rate * u) / math.expm1(-rate)


def unwarped_time(t: float, rate: float) -> float:
    """The u of a t in [0, 1]: the inverse of warped_time."""
    return t if rate == 0 else -math.log1p(t * math.expm1(-rate)) / rate


def warped_grid(num_steps: int, rate: float = 0.0) -> tuple[float, ...]:
    """`t(0), t(1/K), ..., t(1)` of warped_time: from 0 to 1 in K steps, even ones for a rate of 0.

    Raises:
        ValueError: `num_steps` is not positive, or `rate` is negative.
    """
    if num_steps < 1:
        raise ValueError(f"a time grid needs at least one step, got {num_steps}")
    if not rate >= 0:
        raise ValueError(f"the rate of a time grid must be at least 0, got {rate}")
    return tuple(warped_time(k / num_steps, rate) for k in range(num_steps)) + (1.0,)


def time_like(x: Tensor, t: float) -> Tensor:
    """`t` as a tensor `(B,)` on the device of `x` `(B, ...)`, without host synchronisation."""
    return torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)


def endpoint_step_function(endpoint: Callable[[Tensor, Tensor], Tensor]) -> StepFunction:
    """The step function of a function `(x_t, t) -> x_1_hat`, t `(B,)`."""

    def step(x_t: Tensor, t: float, t_next: float) -> SolverStep:
        times, times_next = time_like(x_t, t), time_like(x_t, t_next)
        x_1_hat = endpoint(x_t, times)
        return SolverStep(euler_step(x_t, x_1_hat, times, times_next), x_1_hat)

    return step


class ODESolver:
    """Euler from the first to the last time of a grid: `x += (t_next - t) / (1 - t) (x_1_hat - x)`."""

    @staticmethod
    def sample(
        step_function: StepFunction,
        x_0: Tensor,
        time_grid: Sequence[float],
        *,
        return_intermediates: bool = False,
    ) -> Trajectory:
        """Integrate from `x_0`.

        Args:
            step_function: answers a SolverStep. x_0: `(B, ...)`, the state at `time_grid[0]`.
            return_intermediates: keep the states and the answers.

        Raises:
            ValueError: a grid of fewer than two times, not strictly increasing, or outside [0, 1].
        """
        grid = tuple(float(t) for t in time_grid)
        pairs = list(zip(grid, grid[1:]))
        if not pairs or not all(t < t_next for t, t_next in pairs) or grid[0] < 0 or grid[-1] > 1:
            raise ValueError(
                f"a time grid is at least two strictly increasing times within [0, 1], got {list(time_grid)}"
            )
        x, states, steps = x_0, [x_0], []
        for t, t_next in pairs:
            step = step_function(x, t, t_next)
            x = step.x_next
            if return_intermediates:
                states.append(x)
                steps.append(step)
        return Trajectory(x, grid, states if return_intermediates else [], steps, step)
