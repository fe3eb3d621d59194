"""multilevel_roi_align: the Triton kernels against the reference and its autograd."""

import pytest
import torch
from dfm_kernels import reference
from dfm_kernels.dispatch import BackendError
from dfm_kernels.ops import multilevel_roi_align
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCALES = (0.25, 0.125, 0.0625)
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 3e-2},
}


def features_of(device, b=2, c=6, height=64, width=96, levels=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-height // 2 ** (2 + i)), -(-width // 2 ** (2 + i))) for i in range(levels)]
    features = [torch.randn(b, c, *size, generator=generator).to(device, dtype) for size in sizes]
    return [f.requires_grad_() for f in features]


def boxes_of(device, b=2, n=5, height=64, width=96, seed=0):
    """Boxes of all sizes, some beyond the image."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(b, n, 2, generator=generator) * torch.tensor([width, height])
    side = torch.exp(4 * torch.rand(b, n, 2, generator=generator) + 1)
    return torch.cat([centre - side / 2, centre + side / 2], -1).to(device)


def compare(features, boxes, scales=SCALES, cells=3, samples=2, canonical=28.0):
    arguments = (boxes, scales[: len(features)], cells, samples, canonical)
    wide = [f.detach().float().requires_grad_() for f in features]
    expected = reference.multilevel_roi_align(wide, *arguments)
    found = multilevel_roi_align(features, *arguments, backend="triton")
    assert found.dtype == features[0].dtype and found.shape == expected.shape
    limits = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected, **limits)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(expected.shape, generator=generator).to(found)
    gradients = torch.autograd.grad(found, features, weight)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, wide, weight.float())):
        assert ours.dtype == features[0].dtype
        torch.testing.assert_close(ours.float(), theirs, rtol=limits["rtol"], atol=8 * limits["atol"])


@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_multilevel_roi_align_and_its_gradients_equal_the_reference(
    kernel_device, poisoned_memory, levels, samples
):
    boxes = boxes_of(kernel_device) if samples else boxes_of(kernel_device).clamp(min=0, max=40)
    compare(features_of(kernel_device, levels=levels), boxes, samples=samples)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 70, 2), (2, 7, 3, 5)])
def test_multilevel_roi_align_of_odd_shapes(kernel_device, poisoned_memory, shape):
    b, n, c, cells = shape
    compare(features_of(kernel_device, b, c), boxes_of(kernel_device, b, n), cells=cells, samples=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multilevel_roi_align_of_half_precision(kernel_device, dtype):
    compare(features_of(kernel_device, dtype=dtype), boxes_of(kernel_device))


def test_multilevel_roi_align_takes_any_memory_format(kernel_device):
    features = features_of(kernel_device)
    last = [f.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for f in features]
    wide = [torch.cat([f, f], 3).detach()[..., : f.shape[3]].requires_grad_() for f in features]
    for given_features in (last, wide):
        compare(given_features, boxes_of(kernel_device))


def test_multilevel_roi_align_of_boxes_at_the_limits(kernel_device):
    boxes = torch.tensor(
        [
            [0.0, 0.0, 96.0, 64.0],  # the image
            [-900.0, -900.0, 900.0, 900.0],
            [500.0, 500.0, 600.0, 700.0],  # outside
            [10.0, 10.0, 10.0, 30.0],  # no extent
            [30.0, 30.0, 20.0, 20.0],  # negative extent
            [0.0, 0.0, 28.0, 28.0],  # exactly on the border of two levels
            [0.0, 0.0, 14.0, 14.0],
            [0.0, 0.0, 56.0, 56.0],
        ],
        device=kernel_device,
    )[None].repeat(2, 1, 1)
    compare(features_of(kernel_device), boxes)


def test_multilevel_roi_align_of_infinite_boxes_ends(kernel_device):
    boxes = torch.tensor([[[0.0, 0.0, wrong, 8.0] for wrong in (float("inf"), float("nan"), 8.0)]])
    features = [torch.ones(1, 2, 4, 4, device=kernel_device), torch.ones(1, 2, 2, 2, device=kernel_device)]
    options = {"scales": SCALES[:2], "output_size": 1, "backend": "triton"}
    pooled = multilevel_roi_align(features, boxes.to(kernel_device), **options, sampling_ratio=2)
    assert torch.equal(pooled[2], torch.ones_like(pooled[2]))


@pytest.mark.parametrize("samples", [0, 2])
def test_multilevel_roi_align_of_a_box_that_is_not_a_number_is_zero(kernel_device, poisoned_memory, samples):
    boxes = boxes_of(kernel_device, n=9).clamp(min=0, max=60)
    for column in range(4):
        boxes[0, 2 * column, column] = float("nan")
    boxes[1, 3] = float("nan")
    features = features_of(kernel_device)
    compare(features, boxes, samples=samples)
    pooled = reference.multilevel_roi_align(features, boxes, SCALES, 3, samples, 28.0).reshape(2, 9, -1)
    assert (pooled[1, 3] == 0).all() and pooled.isfinite().all()


def test_multilevel_roi_align_of_no_proposals(kernel_device):
    features = features_of(kernel_device)
    pooled = multilevel_roi_align(features, boxes_of(kernel_device, n=0), SCALES, 3, 2, backend="triton")
    assert pooled.shape == (0, 6, 3, 3)
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(pooled.sum(), features))


def test_multilevel_roi_align_gives_no_gradient_to_boxes(kernel_device):
    boxes = boxes_of(kernel_device).requires_grad_()
    pooled = multilevel_roi_align(features_of(kernel_device), boxes, SCALES, 3, 2, backend="triton")
    pooled.sum().backward()
    assert boxes.grad is None


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 2), n=st.integers(1, 3), c=st.integers(1, 5), height=st.integers(5, 80),
    width=st.integers(5, 80), seed=st.integers(0, 1000),
)  # fmt: skip
def test_multilevel_roi_align_property(kernel_device, b, n, c, height, width, seed):
    features = features_of(kernel_device, b, c, height, width, seed=seed)
    compare(features, boxes_of(kernel_device, b, n, height, width, seed), cells=2, samples=1 + seed % 2)


def test_multilevel_roi_align_says_what_does_not_fit(kernel_device):
    features, boxes = features_of(kernel_device), boxes_of(kernel_device)
    with pytest.raises(ValueError, match="3 feature levels but 2 scales"):
        multilevel_roi_align(features, boxes, SCALES[:2], 3, 2)
    with pytest.raises(ValueError, match=r"features of \[2, 2, 2\] images but boxes of 1"):
        multilevel_roi_align(features, boxes[:1], SCALES, 3, 2)
    with pytest.raises(BackendError, match="boxes are torch.float64"):
        multilevel_roi_align(features, boxes.double(), SCALES, 3, 2, backend="triton")
    with pytest.raises(BackendError, match="do not halve"):
        multilevel_roi_align(features, boxes, (0.25, 0.2, 0.1), 3, 2, backend="triton")


def test_opcheck_multilevel_roi_align(kernel_device):
    arguments = (features_of(kernel_device), boxes_of(kernel_device, n=2), list(SCALES), 2, 1, 28.0)
    torch.library.opcheck(
        torch.ops.dfm.multilevel_roi_align.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
