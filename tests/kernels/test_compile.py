"""torch.compile and torch.export see through the ops: one graph, the numbers of eager."""

import pytest
import torch
from dfm_kernels import ops

SCALES = (0.25, 0.125)


def cases():
    """Name: (function, its tensors)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    sizes = torch.tensor([[48.0, 64.0], [40.0, 60.0]])
    boxes = torch.tensor([4.0, 6.0, 30.0, 40.0]).expand(2, 5, 4) + torch.arange(5.0)[:, None]
    flow = {"signal_scale": 2.0, "prediction": "endpoint", "aggregation": "uniform"}
    loss = {"signal_scale": 2.0, "kind": "focal", "alpha": 0.25, "gamma": 2.0, "velocity_max": 25.0}
    half, whole = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0])
    return {
        "box_flow_update": (
            lambda *x: ops.box_flow_update(*x, **flow, box_weights=(2.0, 2.0, 1.0, 1.0)),
            (normal(2, 5, 4), normal(3, 2, 5, 4), normal(3, 2, 5, 7), half, whole, sizes),
        ),
        "sample_box_paths": (
            lambda *x: ops.sample_box_paths(*x, signal_scale=2.0),
            (torch.arange(2), torch.zeros((), dtype=torch.int64), normal(2, 5, 4), torch.rand(3, 2), sizes),
        ),
        "flow_loss": (
            lambda *x: ops.flow_loss(*x, **loss),
            (
                normal(2, 5, 7),
                normal(2, 5, 4),
                torch.arange(10).view(2, 5) % 8,
                normal(2, 5, 4),
                half,
                whole[0],
            ),
        ),
        "multilevel_roi_align": (
            lambda a, b, boxes: ops.multilevel_roi_align([a, b], boxes, SCALES, 3, 2, 28.0),
            (normal(2, 4, 12, 16), normal(2, 4, 6, 8), boxes.contiguous()),
        ),
        "dynamic_interaction": (
            lambda roi, a, b, g, h: ops.dynamic_interaction(roi, a, b, (g, g), (h, h)),
            (normal(3, 9, 8), normal(3, 8, 4), normal(3, 4, 8), normal(4), normal(8)),
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_an_op_compiles_to_one_graph(name):
    function, tensors = cases()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(as_tuple(compiled(*tensors)), as_tuple(function(*tensors)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", cases())
def test_an_op_exports(name):
    function, tensors = cases()[name]

    class Module(torch.nn.Module):
        def forward(self, *x):
            return as_tuple(function(*x))

    exported = torch.export.export(Module(), tensors).module()
    for found, expected in zip(exported(*tensors), as_tuple(function(*tensors)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def as_tuple(found) -> tuple:
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)
