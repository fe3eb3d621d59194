"""dynamic_interaction: the reference, and the Triton kernels against it."""

import pytest
import torch
from dfm_kernels import BackendError, kernels
from kernel_cases import interaction_case, interaction_tolerance

pytestmark = pytest.mark.usefixtures("tf32_is_allowed")


def test_gradcheck():
    case = interaction_case(m=2, cells=4, c=3, h=5)
    tensors = [x.detach().double().requires_grad_() for x in case.tensors]
    assert torch.autograd.gradcheck(case.function, tensors)


def test_the_reference_of_several_predictors_is_that_of_each():
    interact, tensors, *_ = interaction_case(m=6, sets=2)
    alone = []
    for d in range(2):
        matrices = [x[3 * d : 3 * d + 3] for x in tensors[:3]]
        alone.append(interact(*matrices, *(x[d] for x in tensors[3:])))
    torch.testing.assert_close(interact(*tensors), torch.cat(alone), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ the kernel


def test_vmap_is_that_of_each(kernel_device):
    interact, tensors, *_ = interaction_case(kernel_device, m=4, sets=2)
    tensors = [x.detach().unflatten(0, (2, -1)).requires_grad_() for x in tensors]
    with kernels("triton"):
        together = torch.vmap(interact)(*tensors)
        with torch.no_grad():
            assert torch.equal(torch.vmap(interact)(*tensors), together)
    alone = torch.stack([interact(*(x[d] for x in tensors)) for d in range(2)])
    found, expected = ([x, *torch.autograd.grad(x.square().sum(), tensors)] for x in (together, alone))
    for ours, theirs in zip(found, expected):
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * interaction_tolerance() * scale)


def test_what_does_not_fit(kernel_device):
    interact, (roi, weight_in, weight_out, *norms), *_ = interaction_case(kernel_device)
    with pytest.raises(ValueError, match="must be .M, P.2, C., .M, C, H. and .M, H, C."):
        interact(roi, weight_out, weight_in, *norms)
    with pytest.raises(ValueError, match="norms of 2 predictors"):
        interact(*interaction_case(kernel_device, m=3, sets=2).tensors)
    with pytest.raises(ValueError, match="do not fit"):
        interact(roi, weight_in, weight_out, *norms[:2], *(x[..., :1] for x in norms[2:]))
    with kernels("triton"):
        with pytest.raises(BackendError, match="torch.float64"):
            interact(roi.double(), weight_in.double(), weight_out.double(), *norms)
        with pytest.raises(BackendError, match="P.2 = 81, C = 20, H = 6 do not fit"):
            interact(*interaction_case(kernel_device, cells=81).tensors)


@pytest.mark.gpu
def test_exact_float32_is_refused(kernel_device):
    torch.set_float32_matmul_precision("highest")
    case = interaction_case(kernel_device)
    with kernels("triton"), pytest.raises(BackendError, match="TF32"):
        case.function(*case.tensors)
