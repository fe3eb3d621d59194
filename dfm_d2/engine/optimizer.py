"""The optimizer that a config asks for: which options each parameter has."""

import logging

import torch
from torch import nn

from dfm_d2.framework import CfgNode
from dfm_d2.local_update import BlockOptimizer, ProcessGrid, check_blocks

_logger = logging.getLogger(__name__)

# Parameters of these are not weight-decayed by SOLVER.WEIGHT_DECAY but by SOLVER.WEIGHT_DECAY_NORM.
NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def build_block_optimizer(
    cfg: CfgNode,
    model: nn.Module,
    scaler: torch.amp.GradScaler | None = None,
    grid: ProcessGrid | None = None,
) -> BlockOptimizer:
    """The optimizer of ``cfg.SOLVER`` over ``model.blocks()``.

    Weight decay of norms and biases is ``SOLVER.WEIGHT_DECAY_{NORM,BIAS}`` (a bias without one of its own
    has ``SOLVER.WEIGHT_DECAY``, as in Detectron2); the learning rate of the model's ``backbone_prefix`` is
    multiplied by ``SOLVER.BACKBONE_MULTIPLIER``, and by ``SOLVER.LAYER_DECAY`` for each later child of that;
    the learning rate of biases is multiplied by ``SOLVER.BIAS_LR_FACTOR``.
    """
    solver, blocks = cfg.SOLVER, model.blocks()
    check_blocks(blocks, [(name, p) for name, p in model.named_parameters() if p.requires_grad])
    modules = [module for module in model.modules() if isinstance(module, NORM_TYPES)]
    norms = {parameter for module in modules for parameter in module.parameters(recurse=False)}

    prefix = getattr(model, "backbone_prefix", ())
    inside = (
        name.removeprefix(f"{prefix}.") for name, _ in model.named_parameters() if name.startswith(prefix)
    )
    stages = list(dict.fromkeys(name.split(".")[0] for name in inside))

    def rate_and_decay(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        rate, decay = solver.BASE_LR, solver.WEIGHT_DECAY
        if name.startswith(prefix):
            stage = name.removeprefix(f"{prefix}.").split(".")[0]
            rate *= solver.BACKBONE_MULTIPLIER * solver.LAYER_DECAY ** (len(stages) - 1 - stages.index(stage))
        if name.rsplit(".", 1)[-1] == "bias":
            rate *= solver.BIAS_LR_FACTOR
            decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
        return rate, solver.WEIGHT_DECAY_NORM if parameter in norms else decay

    def make_optimizer(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        parameters: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in named:
            parameters.setdefault(rate_and_decay(name, parameter), []).append(parameter)
        groups = [
            {"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in parameters.items()
        ]
        if solver.OPTIMIZER == "adamw":
            return torch.optim.AdamW(groups, lr=solver.BASE_LR, fused=True)
        return torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, fused=True
        )

    optimizer = BlockOptimizer(blocks, make_optimizer, solver.BLOCK_CLIP_NORM, scaler, grid)
    sizes = {block: sum(p.numel() for p in parameters) for block, parameters in optimizer.blocks.items()}
    summary = ", ".join(f"{block} {size / 1e6:.2f}M" for block, size in sizes.items())
    _logger.info("%s, one per block: %s parameters", optimizer.kind, summary)
    return optimizer
