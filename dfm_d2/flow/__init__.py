"""Path, solver, box space, label space and keyed noise: torch and dfm_kernels, no framework."""
# ruff: noqa: F401  (what is imported here is what the package offers)

from dfm_d2.flow.box_space import BoxSpace
from dfm_d2.flow.label_space import LabelSpace
from dfm_d2.flow.noise import keyed_normal, keyed_uniform, stream_key
from dfm_d2.flow.path import CondOTPath, PathSample
from dfm_d2.flow.precision import at_least_float32
from dfm_d2.flow.solver import (
    ODESolver,
    SolverStep,
    StepFunction,
    Trajectory,
    endpoint_step_function,
    time_like,
    unwarped_time,
    warped_grid,
    warped_time,
)
