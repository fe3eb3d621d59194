"""The optimizer that a config asks for: which options each parameter has."""

import logging
from functools import partial

import torch
from torch import nn

from dfm_d2.framework import CfgNode
from dfm_d2.local_update import BlockOptimizer, ProcessGrid, check_blocks

BACKBONE_PREFIX = "backbone.bottom_up"

# Parameters of these are not weight-decayed by SOLVER.WEIGHT_DECAY but by SOLVER.WEIGHT_DECAY_NORM.
NORM_TYPES = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def build_block_optimizer(
    cfg: CfgNode,
    model: nn.Module,
    scaler: torch.amp.GradScaler | None = None,
    grid: ProcessGrid | None = None,
) -> BlockOptimizer:
    """The optimizer of ``cfg.SOLVER`` over ``model.blocks()``.

    Weight decay of norms and biases is ``SOLVER.WEIGHT_DECAY_{NORM,BIAS}`` (a bias without one of its own
    has ``SOLVER.WEIGHT_DECAY``, as in Detectron2); the learning rate of ``backbone.bottom_up`` is multiplied
    by ``SOLVER.BACKBONE_MULTIPLIER`` and that of biases by ``SOLVER.BIAS_LR_FACTOR``.
    """
    solver = cfg.SOLVER
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    blocks = model.blocks()
    check_blocks(blocks, trainable)
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, NORM_TYPES)
        for parameter in module.parameters(recurse=False)
    }

    def options(name: str, parameter: nn.Parameter) -> dict[str, float]:
        rate, decay = solver.BASE_LR, solver.WEIGHT_DECAY
        is_bias = name.rsplit(".", 1)[-1] == "bias"
        if name.startswith(BACKBONE_PREFIX):
            rate *= solver.BACKBONE_MULTIPLIER
        if is_bias:
            rate *= solver.BIAS_LR_FACTOR
            decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
        if parameter in norms:
            decay = solver.WEIGHT_DECAY_NORM
        return {"lr": rate, "weight_decay": decay}

    def make_optimizer(groups: list[dict]) -> torch.optim.Optimizer:
        sgd = partial(torch.optim.SGD, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
        kinds = {"adamw": torch.optim.AdamW, "sgd": sgd}
        return kinds[solver.OPTIMIZER](groups, lr=solver.BASE_LR, fused=True)

    optimizer = BlockOptimizer(blocks, make_optimizer, options, solver.BLOCK_CLIP_NORM, scaler, grid)
    sizes = {block: sum(p.numel() for p in parameters) for block, parameters in optimizer.blocks.items()}
    summary = ", ".join(f"{block} {size / 1e6:.2f}M" for block, size in sizes.items())
    logging.getLogger(__name__).info("%s, one per block: %s parameters", optimizer.kind, summary)
    return optimizer
