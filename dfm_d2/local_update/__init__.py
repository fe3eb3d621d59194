"""Training a model block by block: blocks, update modes, one optimizer a block, processes. Torch only.

A model offers ``blocks``, ``prepare`` and ``block_losses`` (LocallyTrainable); ``SequentialUpdate().step``
trains it block by block, ``JointUpdate().step`` by one backward, with the same gradients.
"""

# ruff: noqa: F401
from dfm_d2.local_update.activations import SavedActivations
from dfm_d2.local_update.block_optimizer import BlockOptimizer
from dfm_d2.local_update.blocks import (
    SHARED_BLOCK,
    BlockLosses,
    LocallyTrainable,
    check_blocks,
    predictor_block,
    predictor_index,
    sum_losses,
)
from dfm_d2.local_update.hand_over import HandOver, Leaves
from dfm_d2.local_update.processes import NonFiniteLossError, ProcessGrid
from dfm_d2.local_update.ranks import RanksUpdate
from dfm_d2.local_update.updates import JointUpdate, SequentialUpdate, Update, attached_losses, build_update
