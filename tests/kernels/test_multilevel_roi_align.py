"""multilevel_roi_align: the reference against torchvision, the Triton kernels against the reference."""

import pytest
import torch
from dfm_kernels import BackendError, kernels
from dfm_kernels.multilevel_roi_align import assign_levels, multilevel_roi_align
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SCALES, compare, pool_case, run
from torchvision.ops import roi_align


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), samples=st.sampled_from([0, 2]), levels=st.integers(1, 4))
def test_the_reference_is_roi_align_of_the_chosen_level(seed, samples, levels):
    generator = torch.Generator().manual_seed(seed)
    scales = [1 / 4 / 2**i for i in range(levels)]
    features = [torch.randn(2, 3, 32 // 2**i, 32 // 2**i, generator=generator) for i in range(levels)]
    boxes = torch.rand(2, 5, 4, generator=generator) * 128
    boxes[..., 2:] += boxes[..., :2]
    out = multilevel_roi_align(features, boxes, scales, 3, samples, canonical_size=56.0)
    level = assign_levels(boxes.flatten(0, 1), levels, 2, 56.0)
    for row in range(10):
        roi = torch.cat([torch.tensor([row // 5]), boxes.flatten(0, 1)[row]])[None]
        chosen = int(level[row])
        expected = roi_align(features[chosen], roi, 3, scales[chosen], samples, aligned=True)
        torch.testing.assert_close(out[row], expected[0])


def test_the_reference_of_a_box_without_extent_is_zero():
    feature = torch.randn(1, 2, 8, 8)
    boxes = torch.tensor([[[5.0, 5.0, 5.0, 9.0], [3.0, 3.0, 3.0, 3.0]]])
    ours = multilevel_roi_align([feature], boxes, [0.25], 3, 0)
    assert torch.equal(ours, roi_align(feature, [boxes[0]], 3, 0.25, 0, aligned=True))
    assert not ours.any()


@pytest.mark.parametrize("samples", [0, 2])
def test_gradcheck(samples):
    boxes = torch.tensor([[[1.0, 2.0, 9.0, 8.0], [-4.0, 3.0, 40.0, 30.0]]]).expand(2, 2, 4)
    case = pool_case(c=2, levels=2, size=(32, 32), samples=samples, at=boxes)
    features = [f.detach().double().requires_grad_() for f in case.tensors[:-1]]
    assert torch.autograd.gradcheck(lambda *x: case.function(*x, boxes), features)


# ------------------------------------------------------------------ the kernel


def test_any_memory_format(kernel_device):
    case = pool_case(kernel_device, n=1)
    features = [f.detach() for f in case.tensors[:-1]]
    last = [f.contiguous(memory_format=torch.channels_last) for f in features]
    wide = [torch.cat([f, f], 3)[..., : f.shape[3]] for f in features]
    for given_features in (last, wide):
        compare(case.with_tensors(0, *(f.requires_grad_() for f in given_features)))


def test_boxes_at_the_limits(kernel_device):
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
        ]
    )[None]
    compare(pool_case(kernel_device, b=1, at=boxes))


def test_infinite_boxes_end(kernel_device):
    boxes = torch.tensor([[[0.0, 0.0, wrong, 8.0] for wrong in (float("inf"), float("nan"), 8.0)]])
    features = [torch.ones(1, 2, 4, 4, device=kernel_device), torch.ones(1, 2, 2, 2, device=kernel_device)]
    with kernels("triton"):
        pooled = multilevel_roi_align(features, boxes.to(kernel_device), SCALES[:2], 1, 2)
    assert torch.equal(pooled[2], torch.ones_like(pooled[2]))


@pytest.mark.parametrize("samples", [0, 1])
def test_a_box_that_is_not_a_number_is_zero(kernel_device, poisoned_memory, samples):
    case = pool_case(kernel_device, n=6, samples=samples)
    boxes = case.tensors[-1].clamp_(min=0, max=40)
    for column in range(4):
        boxes[0, column, column] = float("nan")
    boxes[1, 3] = float("nan")
    compare(case)
    pooled = run(case, "torch")["answer"].reshape(2, 6, -1)
    assert (pooled[1, 3] == 0).all() and pooled.isfinite().all()


def test_no_gradient_reaches_boxes(kernel_device):
    case = pool_case(kernel_device, n=1)
    case.tensors[-1].requires_grad_()
    with kernels("triton"):
        case.function(*case.tensors).sum().backward()
    assert case.tensors[-1].grad is None and case.tensors[0].grad is not None


def test_what_does_not_fit(kernel_device):
    *features, boxes = pool_case(kernel_device).tensors
    with pytest.raises(ValueError, match="3 feature levels but 2 scales"):
        multilevel_roi_align(features, boxes, SCALES[:2], 3, 2)
    with pytest.raises(ValueError, match=r"features of \[2, 2, 2\] images but boxes of 1"):
        multilevel_roi_align(features, boxes[:1], SCALES, 3, 2)
    with kernels("triton"):
        with pytest.raises(BackendError, match="boxes are torch.float64"):
            multilevel_roi_align(features, boxes.double(), SCALES, 3, 2)
        with pytest.raises(BackendError, match="do not halve"):
            multilevel_roi_align(features, boxes, (0.25, 0.2, 0.1), 3, 2)
