"""flow_loss: the reference by hand, the Triton kernel and its gradients against the reference."""

import math

import pytest
import torch
from dfm_kernels import BackendError, kernels
from dfm_kernels.box_flow_update import boxes_to_signal
from dfm_kernels.flow_loss import flow_loss, paired_giou, pairwise_giou
from dfm_kernels.flow_loss.reference import KINDS
from kernel_cases import LOSS, compare, loss_case
from torchvision.ops import generalized_box_iou


def test_giou_against_torchvision():
    torch.manual_seed(0)
    a, b = torch.rand(7, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    torch.testing.assert_close(pairwise_giou(a, b)[1], generalized_box_iou(a, b))
    torch.testing.assert_close(paired_giou(a[:5], b)[1], generalized_box_iou(a[:5], b).diagonal())


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    x_1 = torch.rand(2, 4, 4, dtype=torch.float64) - 0.5
    x_1_hat = (x_1 + 0.3 * torch.rand_like(x_1)).requires_grad_()
    classes = torch.tensor([[0, 1, 3, 2], [3, 3, 0, 1]])
    t, normalizer = torch.tensor([0.2, 0.95], dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)

    def loss(logits, x_1_hat):
        return tuple(flow_loss(logits, x_1_hat, classes, x_1, t, normalizer, **LOSS | {"kind": kind}))

    if kind == "focal":
        assert torch.autograd.gradcheck(loss, (logits, x_1_hat))
    else:  # the quality target is a constant of the loss: finite differences must not see it move
        assert torch.autograd.gradcheck(lambda z: loss(z, x_1_hat.detach())[0], (logits,))


def test_by_hand_and_its_bounds():
    logits = torch.zeros(1, 2, 1)
    x_1 = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]]), 2.0)
    x_1_hat = boxes_to_signal(torch.tensor([[[0.6, 0.5, 0.2, 0.2], [9.0, 9.0, 9.0, 9.0]]]), 2.0)
    classes = torch.tensor([[0, 1]])  # the second query is background: its box must not count
    loss = flow_loss(logits, x_1_hat, classes, x_1, torch.ones(()), torch.tensor(1.0), **LOSS)
    torch.testing.assert_close(loss.l1, torch.tensor(0.1))
    # Intersection 0.1 x 0.2, union 0.06, hull equal to the union.
    torch.testing.assert_close(loss.giou, torch.tensor(1 - 1 / 3))
    torch.testing.assert_close(loss.velocity, torch.tensor(25 * 0.4**2))
    torch.testing.assert_close(loss.cls, torch.tensor(0.25 * math.log(2) * (0.25 + 0.75)))


# ------------------------------------------------------------------ the kernel


@pytest.mark.filterwarnings("ignore:divide by zero encountered")  # of the interpreter
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_limits(kernel_device, kind):
    case = loss_case(kernel_device, b=1, n=6, k=3, kind=kind)
    logits, x_1_hat, classes, _, t, _ = case.tensors
    classes[:] = torch.tensor([[0, 1, 2, 3, 3, 0]])
    logits[0, :2] = torch.tensor([80.0, -80.0, 0.0])  # saturated, right and wrong
    x_1_hat[0, 2] = torch.tensor([5.0, 5.0, -1.0, -1.0])  # far from its target
    x_1_hat[0, 5, 2:] = -3.0  # negative sides
    t[:] = 1.0
    with torch.enable_grad():
        compare(case)
        classes[:] = 3  # background only
        compare(case)


def test_one_t_for_all_images(kernel_device):
    compare(loss_case(kernel_device).with_tensors(4, torch.tensor(0.3, device=kernel_device)))


def test_what_does_not_fit(kernel_device):
    loss, (logits, x_1_hat, *others), *_ = loss_case(kernel_device)
    with pytest.raises(ValueError, match="'focal' or 'quality_focal', got 'hinge'"):
        loss_case(kind="hinge").function(logits, x_1_hat, *others)
    with pytest.raises(ValueError, match="must be .B, N, K."):
        loss(logits, x_1_hat[:1], *others)
    with kernels("triton"):
        with pytest.raises(BackendError, match="boxes are torch.float64"):
            loss(logits, x_1_hat.double(), *others)
        with pytest.raises(BackendError, match="there is no class"):
            loss(logits[..., :0], x_1_hat, *others)


def test_quality_focal_by_hand():
    x_1 = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.2, 0.2]] * 2]), 2.0)
    x_1_hat = boxes_to_signal(torch.tensor([[[0.6, 0.5, 0.2, 0.2]] * 2]), 2.0)
    classes = torch.tensor([[0, 1]])  # the first has an object, with IoU 1/3
    options = LOSS | {"kind": "quality_focal"}
    logits, t, normalizer = torch.zeros(1, 2, 1), torch.zeros(()), torch.tensor(1.0)
    loss = flow_loss(logits, x_1_hat, classes, x_1, t, normalizer, **options)
    expected = math.log(2) * ((1 / 3 - 0.5) ** 2 + 0.5**2)
    torch.testing.assert_close(loss.cls, torch.tensor(expected))
