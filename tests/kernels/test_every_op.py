"""Every op: who is chosen, the kernel equals the reference at its limits, too, compilers see through it."""

import os
import subprocess
import sys

import pytest
import torch
from dfm_kernels import BackendError, kernels, set_backend, use_triton
from dfm_kernels.dispatch import is_interpreted
from dfm_kernels.multilevel_roi_align import multilevel_roi_align
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import compare, flow_case, interaction_case, loss_case, pool_case, run
from tool_loader import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from dfm_d2.export.formats import recording

CASES = {
    "box_flow_update": flow_case,
    "flow_loss": loss_case,
    "multilevel_roi_align": pool_case,
    "dynamic_interaction": interaction_case,
}
ONE = {"b": 1, "n": 1, "k": 1}
HALF = [{"dtype": torch.float16}, {"dtype": torch.bfloat16}]
# One query, several programs of which the last is not full, every option, half precision.
VARIANTS = {
    "box_flow_update": [
        ONE | {"d": 1},
        {},
        {"b": 3, "n": 33, "d": 12, "k": 2},
        {"b": 1, "n": 21, "d": 2, "k": 80},
        *({"n": 0}, *HALF),
    ],
    "flow_loss": [
        *(ONE, {"n": 0}, *HALF),
        *({"b": 3, "n": 7, "k": classes} for classes in (20, 131)),
        *({"gamma": gamma} for gamma in (0.0, 1.0, 1.5, 3.0)),
    ],
    "multilevel_roi_align": [
        *({"levels": 1}, {"levels": 6, "n": 1}, {"samples": 0}, {"n": 0}, *HALF),
        *({"levels": 2, "samples": 0}, {"levels": 2, "samples": 2}),
        *({"b": 1, "n": 1, "c": 1, "cells": 1}, {"n": 1, "c": 70}, {"b": 1, "n": 2, "cells": 5}),
    ],
    "dynamic_interaction": [
        *({"m": 1, "cells": p, "c": c, "h": h} for p, c, h in ((1, 1, 1), (49, 256, 64), (25, 128, 32))),
        *({"m": 12, "cells": 4, "c": 8, "h": 4, "sets": sets} for sets in (2, 12)),
        *({"m": 2, "cells": 64, "c": 33, "h": 17}, {}, {"m": 0}, *HALF),
    ],
}


def test_the_backend_is_that_of_the_process_or_of_a_scope(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tensor = torch.zeros(1)
    assert not use_triton("op", tensor)
    set_backend("auto")
    assert not use_triton("op", tensor) and not use_triton("op", tensor, "reasons")
    with pytest.raises(BackendError, match="op: the Triton kernel was asked for, but"), kernels("triton"):
        use_triton("op", tensor)
    set_backend("triton")
    for scope in (kernels("torch"), recording()):  # a file is written in plain torch
        with scope:
            assert not use_triton("op", tensor)
    with pytest.raises(BackendError):
        use_triton("op", tensor)
    with pytest.raises(ValueError, match="auto, torch, triton, got 'cuda'"):
        set_backend("cuda")


# Backend, a call of the op that is wrong, and the error message; "but ..." is why the kernel cannot run.
REFUSED = {
    "box_flow_update": [
        ("torch", lambda op, x_t, *rest: op(x_t[:, :2], *rest), "must be .B, N, 4."),
        ("triton", lambda op, x_t, *rest: op(x_t.double(), *rest), "but x_t is torch.float64"),
        ("triton", lambda op, x_t, a, z, *rest: op(x_t, a[:0], z[:0], *rest), "but there is no predictor"),
        ("triton", lambda op, *x: op(*x[:3], x[3].repeat(2), *x[4:]), "t must have shape"),
    ],
    "flow_loss": [
        ("triton", lambda op, z, x_1, *rest: op(z, x_1.double(), *rest), "but boxes are torch.float64"),
        ("triton", lambda op, z, *rest: op(z[..., :0], *rest), "but there is no class"),
        ("torch", lambda op, z, x_1, *rest: op(z, x_1[:1], *rest), "must be .B, N, K."),
    ],
    "multilevel_roi_align": [
        ("torch", lambda op, *x: op(*x[1:]), "2 feature levels but 3 scales"),
        ("torch", lambda op, *x: op(*x[:-1], x[-1][:1]), r"features of \[2, 2, 2\] images but boxes of 1"),
        ("triton", lambda op, *x: op(*x[:-1], x[-1].double()), "but boxes are torch.float64"),
        ("triton", lambda _, *x: multilevel_roi_align(x[:2], x[3], (0.25, 0.2), 3, 2), "but .* do not halve"),
    ],
    "dynamic_interaction": [
        ("torch", lambda op, x, a, b, *norms: op(x, b, a, *norms), "be .M, P.2, C., .M, C, H. and .M, H, C."),
        ("torch", lambda op, *x: op(*x[:3], *(n.repeat(2, 1) for n in x[3:])), "norms of 2 predictors"),
        ("torch", lambda op, *x: op(*x[:5], *(n[..., :1] for n in x[5:])), "do not fit"),
        ("triton", lambda op, *x: op(*(m.double() for m in x[:3]), *x[3:]), "but .* are torch.float64"),
        ("triton", lambda op, x, *rest: op(x.repeat(1, 9, 1), *rest), "but P.2 = 81, C = 20, H = 6 do not"),
    ],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(kernel_device, name):
    for backend, call, message in REFUSED[name]:
        case = CASES[name](kernel_device)
        with kernels(backend), pytest.raises(ValueError, match=message) as caught:
            call(*case[:1], *case.tensors)
        assert isinstance(caught.value, BackendError) == message.startswith("but ")


@pytest.mark.gpu
def test_exact_float32_is_refused(kernel_device):
    torch.set_float32_matmul_precision("highest")
    case = interaction_case(kernel_device)
    with kernels("triton"), pytest.raises(BackendError, match="TF32"):
        case.function(*case.tensors)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, variants in VARIANTS.items() for options in variants],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else x,
)
def test_the_kernel_equals_the_reference(kernel_device, poisoned_memory, name, options):
    if name == "dynamic_interaction" and options.get("dtype") == torch.bfloat16 and is_interpreted():
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    compare(CASES[name](kernel_device, **options))


@settings(max_examples=8, deadline=None)
@given(b=st.integers(1, 3), n=st.integers(1, 9), d=st.integers(1, 4), k=st.integers(1, 9), data=st.data())
def test_box_flow_update_and_flow_loss_of_any_size(kernel_device, b, n, d, k, data):
    seed, s = data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([0.5, 2.0, 4.0]))
    compare(loss_case(kernel_device, b, n, k, seed=seed, signal_scale=s))
    case = flow_case(kernel_device, b, n, d, k, seed=seed, signal_scale=s)
    found = compare(case)
    limit = case.tensors[5][:, None, [1, 0, 1, 0]]
    assert (found["boxes_xyxy"] >= 0).all() and (found["boxes_xyxy"] <= limit).all()
    assert (found["x_1_hat"].abs() <= s * (1 + 1e-6)).all()


@settings(max_examples=5, deadline=None)
@given(b=st.integers(1, 2), n=st.integers(1, 2), cells=st.integers(1, 20), data=st.data())
def test_roi_align_and_interaction_of_any_size(kernel_device, b, n, cells, data):
    # A LayerNorm of two channels answers little but signs: its gradient is all rounding.
    c, h, seed = (data.draw(st.integers(*ends)) for ends in ((4, 40), (4, 40), (0, 1000)))
    size = data.draw(st.tuples(*[st.integers(5, 80)] * 2))
    compare(pool_case(kernel_device, b, n, c, samples=1 + seed % 2, size=size, seed=seed))
    compare(interaction_case(kernel_device, b * n, cells, c, h, seed=seed))


def test_inputs_of_any_layout(kernel_device):
    case = flow_case(kernel_device, b=2, n=6, d=4, k=6)
    x_t, answers, logits = case.tensors[:3]
    strided = [x_t[:, ::2], answers[:, :, ::2][1:3], logits[::2, :, 1::2]]
    assert not any(a.is_contiguous() for a in strided)
    compare(case.with_tensors(0, *strided))
    compare(loss_case(kernel_device).with_tensors(4, torch.tensor(0.3, device=kernel_device)))
    case = interaction_case(kernel_device)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors[:3]]
    compare(case.with_tensors(0, *(x.requires_grad_() for x in strided)))
    case = pool_case(kernel_device, n=1)
    features = [f.detach() for f in case.tensors[:-1]]
    last = [f.contiguous(memory_format=torch.channels_last) for f in features]
    wide = [torch.cat([f, f], 3)[..., : f.shape[3]] for f in features]
    for strided in (last, wide):
        compare(case.with_tensors(0, *(f.requires_grad_() for f in strided)))


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (1.0 - 2.0**-24, 1.0)])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_box_flow_update_at_the_ends_of_time(kernel_device, times, shape):
    t, t_next = (torch.full(shape, t, device=kernel_device) for t in times)
    compare(flow_case(kernel_device, n=2).with_tensors(3, t, t_next))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter
def test_box_flow_update_of_infinities(kernel_device):
    case = flow_case(kernel_device, n=6)
    x_t, answers, logits = case.tensors[:3]
    x_t[0, :3] = torch.tensor([[9.0, -9.0, 3.0, -3.0], [50.0, 50.0, -50.0, 50.0], [0.0, 0.0, 0.0, 0.0]])
    answers[0, 0, 0] = torch.tensor([float("inf"), -float("inf"), float("inf"), -float("inf")])
    answers[1, 1, 2] = torch.tensor([float("nan"), 0.0, 1e30, -1e30])
    logits[0, 0, 1] = float("inf")
    compare(case)


@pytest.mark.filterwarnings("ignore:divide by zero encountered")  # of the interpreter
def test_flow_loss_at_its_limits(kernel_device):
    case = loss_case(kernel_device, b=1, n=6, k=3)
    logits, x_1_hat, classes, _, t, _ = (x.detach() for x in case.tensors)
    classes[:] = torch.tensor([[0, 1, 2, 3, 3, 0]])
    logits[0, :2] = torch.tensor([80.0, -80.0, 0.0])  # saturated, right and wrong
    x_1_hat[0, 2] = torch.tensor([5.0, 5.0, -1.0, -1.0])  # far from its target
    x_1_hat[0, 5, 2:] = -3.0  # negative sides
    t[:] = 1.0
    compare(case)
    classes[:] = 3  # background only
    compare(case)


def test_roi_align_of_boxes_at_the_limits(kernel_device):
    image, outside, enclosing = [0, 0, 96, 64], [500, 500, 600, 700], [-900, -900, 900, 900]
    no_extent, negative_extent = [10, 10, 10, 30], [30, 30, 20, 20]
    between_levels = [[0, 0, side, side] for side in (14, 28, 56)]
    boxes = [image, outside, enclosing, no_extent, negative_extent, *between_levels]
    compare(pool_case(kernel_device, b=1, at=torch.tensor([boxes]).float()))
    # Of infinite boxes it ends.
    boxes = torch.tensor([[[0.0, 0.0, wrong, 8.0] for wrong in (float("inf"), float("nan"), 8.0)]])
    features = [torch.ones(1, 2, side, side, device=kernel_device) for side in (4, 2)]
    with kernels("triton"):
        pooled = multilevel_roi_align(features, boxes.to(kernel_device), (0.25, 0.125), 1, 2)
    assert torch.equal(pooled[2], torch.ones_like(pooled[2]))


@pytest.mark.parametrize("samples", [0, 1])
def test_roi_align_of_a_box_that_is_not_a_number_is_zero(kernel_device, poisoned_memory, samples):
    case = pool_case(kernel_device, n=6, samples=samples)
    boxes = case.tensors[-1].clamp_(min=0, max=40)
    for column in range(4):
        boxes[0, column, column] = float("nan")
    boxes[1, 3] = float("nan")
    compare(case)
    pooled = run(case, "torch")["answer"].reshape(2, 6, -1)
    assert (pooled[1, 3] == 0).all() and pooled.isfinite().all()
    boxes.requires_grad_()
    with kernels("triton"):
        case.function(*case.tensors).sum().backward()
    assert boxes.grad is None and case.tensors[0].grad is not None


def test_vmap_of_interactions_is_that_of_each(kernel_device):
    interact, tensors, limits, _ = interaction_case(kernel_device, m=4, sets=2)
    tensors = [x.detach().unflatten(0, (2, -1)).requires_grad_() for x in tensors]
    with kernels("triton"):
        together = torch.vmap(interact)(*tensors)
        with torch.no_grad():
            assert torch.equal(torch.vmap(interact)(*tensors), together)
    alone = torch.stack([interact(*(x[d] for x in tensors)) for d in range(2)])
    found, expected = ([x, *torch.autograd.grad(x.square().sum(), tensors)] for x in (together, alone))
    for ours, theirs in zip(found, expected):
        atol = 2 * limits("", theirs, theirs.dtype)["atol"]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["flow_loss", "dynamic_interaction"])
def test_it_is_deterministic_and_saves_only_what_a_backward_needs_and_once(kernel_device, name):
    # Several programs of flow_loss, of which the last is not full.
    case = CASES[name](kernel_device, **{"b": 3, "n": 7} if name == "flow_loss" else {})
    first, second = run(case, "triton"), run(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with kernels("triton"), hooks:
        case.function(*(x.detach() for x in case.tensors))
        with torch.no_grad():
            case.function(*case.tensors)
        assert sum(saved) == 0
        answers = case.function(*case.tensors)
    if name == "flow_loss":  # its gradients
        answer, says = answers.cls, "once_differentiable"
        wanted = case.tensors[0].numel() + 3 * case.tensors[1].numel()
    else:  # its inputs and four numbers a cell; the reference keeps five more grids
        answer, says = answers, "autograd"
        wanted = sum(x.numel() for x in case.tensors) + 4 * answers.shape[0] * answers.shape[1]
    assert sum(saved) == wanted
    weight = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(weight * answer.sum(), case.tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=says):
        gradient.sum().backward()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_kernel_spills():
    """Every configuration that ships compiles without a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    # In a process of its own: in this one kernels may be interpreted.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--aot"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == f"spills: 0 in {len(lines) - 2} kernels" and len(lines) > 60
    targets = {"sm_80", "sm_90"} if "gfx942 is left out" in done.stderr else {"sm_80", "sm_90", "gfx942"}
    assert targets <= {word for line in lines for word in line.split()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["compiled torch", "compiled triton", "exported torch"])
def test_an_op_is_one_graph(kernel_device, name, how):
    case, backend = CASES[name](kernel_device), how.split()[1]
    if how.startswith("compiled"):
        torch._dynamo.reset()
        graph = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    else:
        module = torch.nn.Module()
        module.forward = case.function
        graph = torch.export.export(module, tuple(case.tensors)).module()
    expected, found = run(case, backend), run(case._replace(function=graph), backend)
    for value, other in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(kernel_device, name):
    """The forward, and where there is one the backward."""
    calls = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "dfm":
                calls[func] = args
            return func(*args, **(kwargs or {}))

    with Recorder():
        run(CASES[name](kernel_device), "triton")
    assert len(calls) == {"box_flow_update": 1, "flow_loss": 1}.get(name, 2)
    for op, arguments in calls.items():
        tests = ["test_schema", "test_faketensor"]
        if name != "box_flow_update" and "backward" not in str(op):
            tests.append("test_autograd_registration")
            arguments = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point()), arguments
            )
        torch.library.opcheck(op, arguments, test_utils=tests)
