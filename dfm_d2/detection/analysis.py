"""Parameters, multiply-adds and activations of a detector, room by room.

Shapes: B images, N proposals, D predictors, S samples of a cell of RoIAlign's grid.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from dfm_kernels import kernels
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count

from dfm_d2.detection.detector import FlowDetector
from dfm_d2.framework import TracingAdapter


@dataclass(frozen=True)
class RoomCost:
    """room: a part of the detector. parameters: their number. multiply_adds: of one image, in convolutions,
    matrix products, attention, norms, interpolation and RoIAlign's sums. activations: numbers that
    convolutions and matrix products answer.
    """

    room: str
    parameters: int
    multiply_adds: int
    activations: int


def analyze(model: FlowDetector, image: torch.Tensor) -> list[RoomCost]:
    """The rooms in the order in which an image passes them, then "total".

    Args:
        model: in evaluation mode. image: `(3, H, W)`.
    """
    adapter = TracingAdapter(model, [{"image": image, "image_id": 0}], allow_non_tensor=True)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with kernels("torch"), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            flops = FlopCountAnalysis(adapter, adapter.flattened_inputs)
            flops.set_op_handle("aten::embedding_bag", _embedding_bag)
            flops.set_op_handle("aten::scaled_dot_product_attention", _attention)
            work = flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_module()
            activations = ActivationCountAnalysis(adapter, adapter.flattened_inputs)
            numbers = activations.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_module()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    parameters = parameter_count(model)
    # The pooler is one object, which all predictors share: its work is counted under the first of them.
    rooms = {"backbone.bottom_up": "backbone", "backbone": "FPN", "predictors.0.pooler": "RoIAlign"}
    rooms |= {f"predictors.{d}": f"predictor {d}" for d in range(model.num_predictors)}
    costs = [
        RoomCost(name, parameters[module], int(work[f"model.{module}"]), int(numbers[f"model.{module}"]))
        for module, name in rooms.items()
    ]
    costs[1], costs[3] = _without(costs[1], costs[0]), _without(costs[3], costs[2])
    total = RoomCost("total", parameters[""], int(work[""]), int(numbers[""]))
    return [*costs, total]


def _without(whole: RoomCost, part: RoomCost) -> RoomCost:
    return RoomCost(
        whole.room,
        whole.parameters - part.parameters,
        whole.multiply_adds - part.multiply_adds,
        whole.activations - part.activations,
    )


def _size(value: Any) -> list[int]:
    return value.type().sizes()


def _embedding_bag(inputs: list[Any], outputs: list[Any]) -> int:
    """RoIAlign's weighted sums: one multiply-add for each sample and channel."""
    channels, samples = _size(inputs[0])[1], _size(inputs[1])
    return math.prod(samples) * channels


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """The two products of attention, queries with keys and weights with values."""
    queries, keys = _size(inputs[0]), _size(inputs[1])
    return 2 * math.prod(queries) * keys[-2]
