"""The fp16 loss scale: one scale, overflow found and the step skipped for each block by itself."""

import copy

import pytest
import torch
from test_local_update import BATCH, make_model
from toy_model import toy_config

from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.local_update.updates import build_update


def step(model, update, scaler, device="cpu", dtype=None, steps=1):
    """Step ``model``; returns the optimizer and the last metrics."""
    optimizer = build_block_optimizer(toy_config(), model, scaler)
    items = [item | {"image": item["image"].to(device)} for item in BATCH]
    for iteration in range(steps):
        prepared = model.prepare(items, iteration)
        metrics = update.step(
            model,
            prepared,
            optimizer,
            lambda: torch.autocast(device, dtype=dtype or torch.float16, enabled=dtype is not None),
        )
    return optimizer, metrics


@pytest.mark.parametrize(
    ("name", "in_backward"), [("joint", False), ("sequential", False), ("sequential", True)]
)
def test_the_scale_changes_nothing_but_the_range(name, in_backward):
    plain, scaled = make_model(torch.float64), make_model(torch.float64)
    update = build_update(name, in_backward)
    _, metrics = step(plain, update, None, steps=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, scaled_metrics = step(scaled, update, scaler, steps=3)
    for (key, a), b in zip(plain.state_dict().items(), scaled.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=key)
    torch.testing.assert_close(metrics["grad_norm/predictor1"], scaled_metrics["grad_norm/predictor1"])
    assert optimizer.state_dict()["scaler"]["scale"] == 1024.0


@pytest.mark.parametrize(
    ("name", "in_backward"), [("joint", False), ("sequential", False), ("sequential", True)]
)
def test_a_block_that_overflows_is_skipped_by_itself(name, in_backward):
    model = make_model()
    # Only this weight's gradient overflows: it does not reach the features.
    model.predictors[1][0].weight.register_hook(lambda grad: grad * float("inf"))
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, metrics = step(model, build_update(name, in_backward), scaler)
    still = {key for key, value in model.state_dict().items() if torch.equal(before[key], value)}
    assert still == {key for key in before if key.startswith("predictors.1.")}
    assert not metrics["grad_norm/predictor1"].isfinite()
    assert scaler.get_scale() == 512.0
    twin = build_block_optimizer(toy_config(), make_model(), torch.amp.GradScaler("cpu"))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.scaler.get_scale() == 512.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_backward", [False, True])
def test_half_precision_on_a_gpu_agrees_between_modes(dtype, in_backward):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    models = []
    for name, early in (("joint", False), ("sequential", in_backward)):
        model = make_model().cuda()
        scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None
        _, metrics = step(model, build_update(name, early), scaler, "cuda", dtype, steps=3)
        assert all(value.isfinite() for value in metrics.values())
        models.append(model)
    for (key, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02, msg=key)
