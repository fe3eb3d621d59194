"""Parameters, multiply-adds and activations of a detector, part by part."""

import math
from typing import Any, NamedTuple

import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count

from dfm_d2.detection.detector import FlowDetector
from dfm_d2.export.formats import recording
from dfm_d2.framework import TracingAdapter


class PartCost(NamedTuple):
    """multiply_adds: of one image, in convolutions, matrix products, attention, norms, interpolation and
    RoIAlign's sums. activations: numbers that convolutions and matrix products answer.
    """

    part: str
    parameters: int
    multiply_adds: int
    activations: int


def analyze(model: FlowDetector, image: torch.Tensor) -> list[PartCost]:
    """The parts in the order in which an image passes them, then "total".

    model: in evaluation mode, its ops on the backend "torch". image: `(3, H, W)`.
    """
    adapter = TracingAdapter(model, [{"image": image, "image_id": 0}], allow_non_tensor=True)
    with recording():
        work = FlopCountAnalysis(adapter, adapter.flattened_inputs)
        work.set_op_handle("aten::embedding_bag", _embedding_bag)
        work.set_op_handle("aten::scaled_dot_product_attention", _attention)
        counts = [parameter_count(adapter)]
        for analysis in (work, ActivationCountAnalysis(adapter, adapter.flattened_inputs)):
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counts.append(analysis.by_module())

    def cost(part: str, module: str, without: str = "") -> PartCost:
        return PartCost(part, *(int(count[module] - (count[without] if without else 0)) for count in counts))

    # The pooler is one object, which all predictors share: its work is counted under the first of them.
    pooler = "model.predictors.0.pooler"
    return [
        cost("backbone", "model.backbone.bottom_up"),
        cost("FPN", "model.backbone", "model.backbone.bottom_up"),
        cost("RoIAlign", pooler),
        cost("predictor 0", "model.predictors.0", pooler),
        *(cost(f"predictor {d}", f"model.predictors.{d}") for d in range(1, model.num_predictors)),
        cost("total", ""),
    ]


def _embedding_bag(inputs: list[Any], outputs: list[Any]) -> int:
    """RoIAlign's weighted sums: one multiply-add for each sample and channel."""
    rows, samples = (value.type().sizes() for value in inputs[:2])
    return math.prod(samples) * rows[1]


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """The two products of attention, queries with keys and weights with values."""
    queries, keys = (value.type().sizes() for value in inputs[:2])
    return 2 * math.prod(queries) * keys[-2]
