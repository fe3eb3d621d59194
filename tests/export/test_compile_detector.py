"""torch.compile sees the whole detector as one graph."""

import pytest
import torch
from small_detector import small_cfg, small_detector

from dfm_d2.detection.exportable import TensorDetector


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand(2, 3, 96, 128, generator=generator)
    sizes = torch.tensor([[90.0, 128.0], [96.0, 100.0]])
    return images, sizes, torch.randn(2, 24, 4, generator=generator)


def test_the_whole_detector_is_one_graph(inputs):
    detector = TensorDetector(small_detector(small_cfg()), constant_noise=False)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(detector, fullgraph=True, backend="eager")
        for found, wanted in zip(compiled(*inputs), detector(*inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("FlowDetector", {"TIME": "shared", "SAMPLER__METHOD": "heun", "SAMPLER__STEPS": 2}),
        ("CascadeDetector", {}),
    ],
)
def test_before_nms_is_one_graph(inputs, architecture, options):
    model = small_detector(small_cfg(architecture, **options))
    images, sizes, x_0 = inputs
    compiled = torch.compile(model.candidates, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model.candidates(images / 100, sizes, x_0)
        for found, wanted in zip(compiled(images / 100, sizes, x_0), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
