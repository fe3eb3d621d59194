"""The ops with inputs of any size, and the comparison of their kernels with their references.

Shapes: B images, N proposals, D predictors, K classes, C channels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from dfm_kernels import kernels
from dfm_kernels.box_flow_update import box_flow_update
from dfm_kernels.dispatch import is_interpreted
from dfm_kernels.dynamic_interaction import dynamic_interaction
from dfm_kernels.flow_loss import flow_loss
from dfm_kernels.multilevel_roi_align import multilevel_roi_align
from torch import Tensor, float32

FLOW = {"signal_scale": 2.0, "box_weights": (2.0, 2.0, 1.0, 1.5)}
LOSS = {"signal_scale": 2.0, "gamma": 2.0, "velocity_max": 25.0}


class Case(NamedTuple):
    """An op as a function of its tensors.

    limits: (name, expected value, dtype) to the options of torch.testing.assert_close.
    wide: the dtype in which the reference computes what the kernel is compared with.
    """

    function: Callable
    tensors: list[Tensor]
    limits: Callable[[str, Tensor, torch.dtype], dict]
    wide: torch.dtype = torch.float32

    def with_tensors(self, start: int, *tensors: Tensor) -> "Case":
        """The same with other tensors from index `start` on."""
        return self._replace(tensors=[*self.tensors[:start], *tensors, *self.tensors[start + len(tensors) :]])


def _random(seed: int) -> tuple[torch.Generator, Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda *shape: torch.randn(shape, generator=generator)


def flow_case(device="cpu", b=2, n=5, d=3, k=4, dtype=torch.float32, seed=0, **options) -> Case:
    generator, normal = _random(seed)
    sizes = torch.tensor([[48.0, 64.0], [100.0, 50.0], [33.0, 77.0]])[:b]
    tensors = [2 * normal(b, n, 4), normal(d, b, n, 4).to(dtype), 3 * normal(d, b, n, k).to(dtype)]
    t = torch.rand(b, generator=generator)
    tensors = [x.to(device) for x in (*tensors, t, t + (1 - t) / 2, sizes)]

    def limits(name, value, dtype):
        # Signal is of order 1 and pixels of order 100: 2e-6 of either.
        return {"rtol": 2e-6, "atol": 2e-4 if name == "boxes_xyxy" else 2e-6, "equal_nan": True}

    return Case(lambda *x: box_flow_update(*x, **FLOW | options), tensors, limits)


def loss_case(device="cpu", b=2, n=5, k=4, dtype=torch.float32, seed=0, **options) -> Case:
    generator, normal = _random(seed)
    x_1_hat = normal(b, n, 4)
    target = 0.3 * normal(b, n, 4) + 0.7 * x_1_hat  # boxes that overlap, partly
    classes = torch.randint(0, k + 1, (b, n), generator=generator)
    logits = (3 * normal(b, n, k)).to(dtype)
    normalizer = (classes < k).sum().clamp(min=1).float()
    tensors = [logits, x_1_hat, classes, target, torch.rand(b, generator=generator), normalizer]
    tensors = [x.to(device) for x in tensors]
    for x in tensors[:2]:
        x.requires_grad_()
    limits = {torch.float32: (2e-5, 2e-6), torch.float16: (2e-3, 1e-5), torch.bfloat16: (1e-2, 1e-4)}
    limits = {of: {"rtol": rtol, "atol": atol} for of, (rtol, atol) in limits.items()}
    return Case(lambda *x: flow_loss(*x, **LOSS | options), tensors, lambda _name, _value, of: limits[of])


def pool_case(
    device="cpu", b=2, n=3, c=3, cells=2, samples=1, levels=3, size=(64, 96), dtype=float32, seed=0, at=None
) -> Case:
    """Boxes of all sizes, some beyond the image of `size` (height, width), or those of `at`."""
    generator, normal = _random(seed)
    features = [normal(b, c, *(-(-side // 2 ** (2 + i)) for side in size)) for i in range(levels)]
    features = [f.to(device, dtype).requires_grad_() for f in features]
    boxes = at
    if boxes is None:
        centre = torch.rand(b, n, 2, generator=generator) * torch.tensor(size[::-1])
        side = torch.exp(4 * torch.rand(b, n, 2, generator=generator) + 1)
        boxes = torch.cat([centre - side / 2, centre + side / 2], -1)
        if samples == 0:  # adaptive: a large box would take hundreds of samples
            boxes = boxes.clamp(min=0, max=40)
    tolerance = {torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (2e-2, 3e-2)}

    def limits(name, value, dtype):
        rtol, atol = tolerance[dtype]
        return {"rtol": rtol, "atol": atol if name == "answer" else 8 * atol}

    options = ([0.5 ** (2 + i) for i in range(levels)], cells, samples, 28.0)
    tensors = [*features, boxes.to(device)]
    return Case(lambda *x: multilevel_roi_align(x[:-1], x[-1], *options), tensors, limits)


def interaction_case(device="cpu", m=3, cells=9, c=20, h=6, sets=1, dtype=torch.float32, seed=0) -> Case:
    _, normal = _random(seed)
    tensors = [normal(m, cells, c), normal(m, c, h) / c**0.5, normal(m, h, c) / h**0.5]
    tensors = [x.to(dtype) for x in tensors]
    tensors += [1 + normal(sets, h), normal(sets, h), 1 + normal(sets, c), normal(sets, c)]

    def limits(name, value, _):
        # Relative to the largest element or one: LayerNorms of few channels cancel.
        scale = max(1.0, float(value.detach().abs().max())) if value.numel() else 1.0
        exact = dtype == float32 and is_interpreted()
        tolerance = {torch.float32: 2e-5 if exact else 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
        return {"rtol": 0, "atol": tolerance[dtype] * scale}

    tensors = [x.to(device).requires_grad_() for x in tensors]
    # In float64: LayerNorms of few channels cost a float32 reference as many digits as the kernel.
    return Case(lambda *x: dynamic_interaction(*x[:3], x[3:5], x[5:]), tensors, limits, torch.float64)


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """{name: answer or gradient}, the gradients those of a weighted sum of all answers."""
    with kernels(backend):
        answers = case.function(*case.tensors)
    names = getattr(answers, "_fields", ("answer",))
    answers = (answers,) if isinstance(answers, Tensor) else tuple(answers)
    wanted = {f"d_{i}": x for i, x in enumerate(case.tensors) if x.requires_grad}
    found = dict(zip(names, answers))
    if wanted:
        generator = torch.Generator().manual_seed(1)
        # Quarters: weights that every dtype holds exactly.
        weights = [torch.randint(-8, 9, a.shape, generator=generator).to(a) / 4 for a in answers]
        total = sum((weight * answer).sum() for weight, answer in zip(weights, answers))
        found |= zip(wanted, torch.autograd.grad(total, list(wanted.values())))
    return found


def compare(case: Case) -> dict[str, Tensor]:
    """Every answer and gradient of the kernel, after they have been compared with those of the reference."""
    tensors = [x.detach().to(case.wide) if x.is_floating_point() else x for x in case.tensors]
    tensors = [x.requires_grad_(given.requires_grad) for x, given in zip(tensors, case.tensors)]
    expected, found = run(case._replace(tensors=tensors), "torch"), run(case, "triton")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name.startswith("d_"):
            assert value.dtype == case.tensors[int(name[2:])].dtype, name
        wanted = expected[name]
        options, value = case.limits(name, wanted, value.dtype), value.to(case.wide)
        torch.testing.assert_close(value, wanted, **options, msg=lambda m, n=name: f"{n}: {m}")
    return found
