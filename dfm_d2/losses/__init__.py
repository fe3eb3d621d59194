"""Coupling, assignment and the loss of one block."""

from dfm_d2.losses.assignment import DynamicK, assigned_targets
from dfm_d2.losses.block_loss import BlockLoss
from dfm_d2.losses.coupling import COUPLINGS, Slots, build_slots, couple, noisy_endpoints
from dfm_d2.losses.endpoint_loss import EndpointLoss
from dfm_d2.losses.ground_truth import GroundTruth

__all__ = [
    "COUPLINGS",
    "BlockLoss",
    "DynamicK",
    "EndpointLoss",
    "GroundTruth",
    "Slots",
    "assigned_targets",
    "build_slots",
    "couple",
    "noisy_endpoints",
]
