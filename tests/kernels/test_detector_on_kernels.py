"""A detector with MODEL.DFM.KERNELS 'triton' against the same with 'torch'; the sampler as a graph."""

import copy
import warnings
from unittest.mock import Mock

import pytest
import torch
from dfm_kernels import use_triton
from dfm_kernels.dispatch import is_interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from dfm_d2.detection.captured import GraphCache
from dfm_d2.flow import ODESolver
from dfm_d2.local_update import attached_losses

# Few proposals: the interpreter runs their programs one after another.
SMALL = {"NUM_PREDICTORS": 2, "NUM_PROPOSALS": 5, "HEAD__POOLER_SAMPLING_RATIO": 1}


def tolerance():
    """TF32 on a GPU, exact products in the interpreter."""
    return {"rtol": 1e-4, "atol": 1e-5} if is_interpreted() else {"rtol": 2e-2, "atol": 2e-2}


def assert_same(found, expected):
    assert len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=0.01)


def test_a_detector_on_kernels_has_the_same_losses_and_gradients(make_model, make_input, kernel_device):
    losses, gradients = {}, {}
    for backend in ("torch", "triton"):
        options = {"KERNELS": backend, "HEAD__INTERACTION": "dynamic_conv", "LOSS__VELOCITY_WEIGHT": 0.5}
        model = make_model(**SMALL, **options).to(kernel_device)
        assert use_triton("op", model.pixel_mean) == (backend == "triton")
        prepared = model.prepare([make_input("a"), make_input("b", boxes=())], 0)
        losses[backend] = attached_losses(model, prepared)
        sum(losses[backend].values()).backward()
        gradients[backend] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, value in losses["torch"].items():
        torch.testing.assert_close(losses["triton"][name], value, **tolerance())
    assert gradients["torch"].keys() == gradients["triton"].keys()
    for name, value in gradients["torch"].items():
        atol, found = max(tolerance()["rtol"] * float(value.abs().max()), 1e-6), gradients["triton"][name]
        torch.testing.assert_close(found, value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", [{"TIME_RATE": 3.0}, {"INTERVALS": 1}])
def test_a_detector_on_kernels_finds_the_same(make_model, make_input, kernel_device, options):
    found = {}
    for backend in ("torch", "triton"):
        model = make_model(**SMALL, KERNELS=backend, HEAD__INTERACTION="grid_linear", **options)
        found[backend] = model.eval().to(kernel_device)([make_input("a"), make_input("b", size=(40, 64))])
    for a, b in zip(found["torch"], found["triton"]):
        assert_same(a["instances"], b["instances"])
        assert torch.equal(a["instances"].pred_classes, b["instances"].pred_classes)


class NoSynchronisation(TorchDispatchMode):
    """Fails at what waits for the device, brings numbers of the host to it, or has a shape made of data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "lift", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name.rstrip("_0123456789") not in self.FORBIDDEN, f"{name} cannot be captured"
        return func(*args, **(kwargs or {}))


def test_the_mode_notices_synchronisation():
    one = torch.ones(1)
    for wrong in (one.item, lambda: torch.tensor([1.0]), one.nonzero):
        with pytest.raises(AssertionError, match="cannot be captured"), NoSynchronisation():
            wrong()


@pytest.mark.parametrize("architecture", ["FlowDetector", "FlowDetector shared", "CascadeDetector"])
@torch.no_grad()
def test_a_sampler_on_kernels_never_waits_for_the_device(make_model, make_input, kernel_device, architecture):
    name, *shared = architecture.split()
    options = (1, "grid_linear") if shared else (0, "dynamic_conv")
    options = dict(zip(("INTERVALS", "HEAD__INTERACTION"), options), KERNELS="triton", SAMPLER__STEPS=2)
    model = make_model(name, **SMALL, **options).eval().to(kernel_device)
    images, sizes = model._images([make_input("a")])
    features = model._features(images)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
    step_function = model._step_function(features, sizes)
    x_0 = torch.randn(1, 5, 4, device=kernel_device)
    with NoSynchronisation():
        ODESolver.sample(step_function, x_0, model.time_grid)


def double(x):
    return [2 * x]


def test_a_shape_is_captured_the_second_time_and_dropped_with_its_owner():
    """Until the cache is full; a copy of the cache is empty."""
    # Instead of a CUDA graph: counts its calls, the captures, and those of what it answers, the replays.
    capture = Mock(return_value=Mock(side_effect=double))
    cache = GraphCache(size=2, capture=capture)
    for expected, length in ((0, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 3), (2, 3), (2, 3)):
        assert torch.equal(cache("model", double, [torch.ones(length)])[0], torch.full((length,), 2.0))
        assert capture.call_count == len(cache) == expected
    assert capture.return_value.call_count == 3
    for owner, kept in (("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 0), ("a", 1)):
        cache(owner, double, [torch.ones(1)])
        assert len(cache) == kept
    assert capture.call_count == 2 + 3 and len(copy.deepcopy(cache)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"INTERVALS": 1}, {"SAMPLER__NOISE_PASSES": 2}])
def test_a_captured_detector_finds_what_the_eager_one_finds(make_model, make_input, options):
    model = make_model(KERNELS="triton", HEAD__INTERACTION="grid_linear", **options).eval().cuda()
    inputs = [[make_input(name)] for name in "abc"]
    model.sampler.graphs.size = 0
    eager = [model(x)[0]["instances"] for x in inputs]
    model.sampler.graphs.size = 8
    model(inputs[0])  # seen before, so captured now
    assert len(model.sampler.graphs) == 1
    for expected, x in zip(eager, inputs):
        assert_same(model(x)[0]["instances"], expected)
    with torch.no_grad():
        for parameter in model.predictors.parameters():
            parameter.mul_(1.1)  # in place: the graph reads the new values
    changed = model(inputs[0])[0]["instances"]
    model.sampler.graphs.size = 0
    model.sampler.graphs._graphs.clear()
    torch.testing.assert_close(changed.scores, model(inputs[0])[0]["instances"].scores, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [0, 8], ids=["eager", "captured"])
@torch.no_grad()
def test_the_sampler_never_waits_for_the_device(make_model, make_input, graphs):
    """K steps of D predictors, to the candidates before NMS, without one synchronisation with the host."""
    model = make_model(KERNELS="triton", HEAD__INTERACTION="grid_linear").eval().cuda()
    images, image_sizes = model._images([make_input("a")])
    x_0 = model.sampler.noise(["a"], model.device)
    model.sampler.graphs.size = graphs
    for _ in range(3):  # kernels compile, the graph is captured
        model.candidates(images, image_sizes, x_0)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model.candidates(images, image_sizes, x_0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [str(w.message) for w in caught if "synchroniz" in str(w.message)] == []
