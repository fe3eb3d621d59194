"""The learning rate over the iterations, as a factor on each parameter group's own rate."""

import logging

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

logger = logging.getLogger(__name__)


class LRMultiplier(torch.optim.lr_scheduler.LRScheduler):
    """`lr_g(i) = base_lr_g * multiplier(i / max_iter)` for each parameter group g."""

    def __init__(self, optimizer: torch.optim.Optimizer, multiplier: ParamScheduler, max_iter: int):
        self._multiplier, self._max_iter = multiplier, max_iter
        super().__init__(optimizer)

    def state_dict(self) -> dict:
        # The multiplier is a pure function and belongs to the config, not to the state.
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float]:
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base_lr * factor for base_lr in self.base_lrs]


def build_lr_scheduler(cfg, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Build the schedule `cfg.SOLVER.LR_SCHEDULER_NAME`: "WarmupMultiStepLR" or "WarmupCosineLR".

    Raises ValueError for another name or warm-up method.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        if len(steps) < len(solver.STEPS):
            logger.warning("SOLVER.STEPS beyond SOLVER.MAX_ITER (%d) are left out", solver.MAX_ITER)
        values = [solver.GAMMA**count for count in range(len(steps) + 1)]
        schedule = MultiStepParamScheduler(values, milestones=steps, num_updates=solver.MAX_ITER)
    elif solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        schedule = CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR)
    else:
        raise ValueError(f"SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME!r} does not exist.")
    length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    start = solver.WARMUP_FACTOR * schedule(0.0)
    if solver.WARMUP_METHOD == "linear":
        warmup = LinearParamScheduler(start, schedule(0.0 if solver.RESCALE_INTERVAL else length))
    elif solver.WARMUP_METHOD == "constant":
        warmup = ConstantParamScheduler(start)
    else:
        raise ValueError(f"SOLVER.WARMUP_METHOD {solver.WARMUP_METHOD!r} does not exist.")
    multiplier = CompositeParamScheduler(
        [warmup, schedule],
        lengths=[length, 1 - length],
        # "fixed": the schedule goes on where the warm-up ends, as if there had been none.
        interval_scaling=["rescaled", "rescaled" if solver.RESCALE_INTERVAL else "fixed"],
    )
    return LRMultiplier(optimizer, multiplier, solver.MAX_ITER)
