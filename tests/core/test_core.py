"""Path, solver, spaces and keyed noise."""

import math

import pytest
import torch
from dfm_kernels.box_flow_update import euler_step
from hypothesis import given, settings
from hypothesis import strategies as st

from dfm_d2 import flow
from dfm_d2.flow import BoxSpace, CondOTPath, LabelSpace, ODESolver, keyed_normal, stream_key, warped_grid
from dfm_d2.flow.noise import philox_4x32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [0.0, 0.37, 1.0])
def test_a_step_towards_the_endpoint_stays_on_the_path(dtype, t):
    x_0, x_1 = torch.randn(3, 7, 4, dtype=dtype), torch.randn(3, 7, 4, dtype=dtype)
    sample = CondOTPath().sample(x_0, x_1, torch.full((3,), t, dtype=dtype))
    later = torch.full((3,), (t + 1) / 2, dtype=dtype)
    torch.testing.assert_close(
        euler_step(sample.x_t, x_1, sample.t, later), CondOTPath().sample(x_0, x_1, later).x_t
    )
    assert torch.equal(CondOTPath().sample(x_0, x_1, torch.tensor(t, dtype=dtype)).x_t, sample.x_t)
    torch.testing.assert_close(sample.x_t + (1 - t) * sample.dx_t, x_1)
    if t in (0, 1):
        assert torch.equal(sample.x_t, x_1 if t else x_0)


def test_path_refuses_what_does_not_agree():
    with pytest.raises(ValueError, match="must agree"):
        CondOTPath().sample(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(()))
    with pytest.raises(ValueError, match=r"t must have shape \(\) or \(3,\)"):
        CondOTPath().sample(torch.zeros(3, 5, 4), torch.zeros(3, 5, 4), torch.zeros(2))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_constant_endpoint_is_reached_exactly(num_steps):
    target = torch.randn(2, 3, 4)
    step_function = flow.endpoint_step_function(lambda x, t: target)
    found = ODESolver.sample(step_function, torch.randn(2, 3, 4), warped_grid(num_steps))
    assert torch.equal(found.x, target)


def _decay(x, t, t_next):
    """dx/dt = -x, as a step function."""
    return flow.SolverStep(x - (t_next - t) * x, x - (1 - t) * x)


def test_order_of_convergence():
    x_0 = torch.ones(1, 1, dtype=torch.float64)
    grids = (warped_grid(num_steps) for num_steps in (20, 40))
    errors = [abs(ODESolver.sample(_decay, x_0, grid).x.item() - math.exp(-1)) for grid in grids]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


def test_intermediates_are_kept_on_demand():
    step_function = flow.endpoint_step_function(lambda x, t: torch.zeros_like(x))
    arguments = step_function, torch.ones(1, 2), (0.0, 0.25, 1.0)
    found, plain = (ODESolver.sample(*arguments, return_intermediates=kept) for kept in (True, False))
    assert [s[0, 0].item() for s in found.states] == [1.0, 0.75, 0.0] and len(found.steps) == 2
    assert plain.states == [] and plain.steps == [] and torch.equal(plain.x, found.x)


@pytest.mark.parametrize("grid", [[0.0], [0.0, 0.5, 0.5], [0.5, 0.2], [-0.1, 1.0], [0.0, 1.1]])
def test_bad_grids_are_refused(grid):
    with pytest.raises(ValueError, match="time grid"):
        ODESolver.sample(_decay, torch.ones(1, 1), grid)
    assert ODESolver.sample(_decay, torch.ones(1, 1), [0.5, 1.0]).x == 0.5  # a part of [0, 1] is a grid
    for num_steps, rate in ((0, 0.0), (-1, 0.0), (2, -0.5)):
        with pytest.raises(ValueError, match="a time grid"):
            warped_grid(num_steps, rate)


@settings(deadline=None)
@given(
    boxes=st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=6),
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    scale=st.floats(0.1, 10),
)
def test_box_space_round_trip(boxes, size, scale):
    corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 2, 2).sort(dim=1).values.flatten(1)
    space, image_size = BoxSpace(scale), torch.tensor(size)
    boxes_xyxy = corners * image_size.flip(0).repeat(2)
    x = space.encode(boxes_xyxy, image_size)
    assert x.abs().max() <= scale * (1 + 1e-9)
    torch.testing.assert_close(space.decode(x, image_size), boxes_xyxy, rtol=1e-9, atol=1e-9 * max(size))


def test_box_space_by_hand():
    # The whole image is centre 0.5, size 1: signal (0, 0, s, s).
    space = BoxSpace(2.0)
    x = space.encode(torch.tensor([[0.0, 0.0, 60.0, 40.0]]), torch.tensor([40, 60]))
    torch.testing.assert_close(x, torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="signal_scale must be greater than 0"):
            BoxSpace(scale)


def test_label_space_reads_out_what_it_encodes():
    space = LabelSpace.orthonormal(10, 16, seed=3, radius=4.0)
    gram = space.embeddings @ space.embeddings.T
    torch.testing.assert_close(gram, 16.0 * torch.eye(10), atol=1e-4, rtol=0)
    labels = torch.arange(10)
    torch.manual_seed(0)
    assert torch.equal(space.decode(space.encode(labels) + 0.3 * torch.randn(10, 16)), labels)
    assert torch.equal(LabelSpace.orthonormal(10, 16, seed=3).embeddings * 4, space.embeddings)
    with pytest.raises(ValueError, match="at least as many dimensions"):
        LabelSpace.orthonormal(17, 16)
    for wrong in ([0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match=r"those of classes \[1\] are zero or not finite"):
            LabelSpace(torch.tensor([[1.0, 0.0], wrong]))
    learned = LabelSpace(torch.randn(4, 8), learned=True)
    assert learned.weight.requires_grad
    torch.testing.assert_close(learned.embeddings.norm(dim=1), torch.ones(4))


def test_noise_depends_on_its_own_key_alone():
    keys = [stream_key("train", 0, 5, image) for image in ("a", "b", "c")]
    together = keyed_normal(keys, 9)
    assert torch.equal(together[1:2], keyed_normal(keys[1:2], 9))
    assert torch.equal(together.flip(0), keyed_normal(keys[::-1], 9))
    assert torch.equal(together[:, :4], keyed_normal(keys, 4))


def test_philox_known_answers():
    # The published vectors of Random123 for philox4x32-10: counter, key -> words.
    pi = (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88 - 2**64)
    for inputs, words in (
        ((0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((-1, -1, -1), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(int(word) for word in philox_4x32(*map(torch.tensor, inputs))) == words


def test_draws_have_the_right_moments_and_depend_on_key_and_stream():
    normals = keyed_normal([1, 2], 20000)
    assert normals.shape == (2, 20000, 4) and torch.isfinite(normals).all()
    assert normals.mean().abs() < 0.01 and (normals.std() - 1).abs() < 0.01
    correlation = torch.corrcoef(torch.stack([normals[0].flatten(), normals[1].flatten()]))[0, 1]
    assert correlation.abs() < 0.02
    assert not torch.equal(keyed_normal([1, 2], 10, stream=1), normals[:, :10])
    uniform = flow.keyed_uniform([1, 2], 5000)
    assert 0 <= uniform.min() and uniform.max() < 1 and (uniform.mean() - 0.5).abs() < 0.01


def test_streams_are_apart_and_keys_are_those_of_earlier_runs():
    """Another number or hash here would be other noise for every seed."""
    assert len({stream_key(1, 23), stream_key(12, 3), stream_key("1", 23), stream_key(123)}) == 4
    streams = [value for name, value in vars(flow.noise).items() if name.startswith("STREAM_")]
    assert len(streams) == len(set(streams))
    assert stream_key("train", 0, 5, "a") == 2217681233838959286


@pytest.mark.parametrize("rate", [0.0, 1.0, 9.0])
def test_unwarped_time_is_the_inverse_of_warped_time(rate):
    for u in (0.0, 0.2, 0.5, 0.9, 1.0):
        assert flow.unwarped_time(flow.warped_time(u, rate), rate) == pytest.approx(u, abs=1e-9)
    assert flow.warped_time(0.5, rate) >= 0.5 and (flow.warped_time(0.5, rate) == 0.5) == (rate == 0)
