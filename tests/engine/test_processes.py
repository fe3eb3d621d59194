"""Several real processes on the CPU: the same training as one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import assert_same, command, parameters, run

from dfm_d2.detection.data.shapes import write_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, num_train=12, num_val=3, size=64, seed=0)
    return folder


@pytest.fixture(scope="module")
def alone(shapes, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The parameters after three iterations in one process."""
    out = tmp_path_factory.mktemp("alone")
    run(command(shapes, out, "SOLVER.MAX_ITER=3"))
    return parameters(out)


@pytest.mark.timeout(300)
def test_two_processes_train_what_one_trains_and_one_continues(shapes, alone, tmp_path):
    done = run(command(shapes, tmp_path, "--num-gpus", "2", "SOLVER.MAX_ITER=2"))
    assert done.stdout.count("class ") == 1, "the table is printed once"
    run(command(shapes, tmp_path, "--resume", "SOLVER.MAX_ITER=3"))
    assert_same(parameters(tmp_path), alone)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("update", [pytest.param("joint", marks=pytest.mark.slow), "sequential"])
def test_under_torchrun(shapes, alone, tmp_path, update):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ["SOLVER.MAX_ITER=3", f"MODEL.DFM.UPDATE={update}"]
    if update == "sequential":
        options.append("MODEL.DFM.STEP_IN_BACKWARD=True")
    run(command(shapes, tmp_path, *options, launcher=torchrun))
    assert_same(parameters(tmp_path), alone)


@pytest.mark.timeout(240)
def test_what_two_processes_evaluate_is_what_they_save(shapes, tmp_path):
    """With batch norms, whose statistics are each process's own while it trains."""
    options = ("MODEL.RESNETS.NORM=BN", "MODEL.FPN.NORM=BN", "SOLVER.MAX_ITER=2", "SOLVER.EMA_DECAY=0.5")
    run(command(shapes, tmp_path, "--num-gpus", "2", *options))
    files = [tmp_path / f"inference{kind}/coco_instances_results.json" for kind in ("", "_ema")]
    during = [json.loads(file.read_text()) for file in files]
    run(command(shapes, tmp_path, "--eval-only", f"MODEL.WEIGHTS={tmp_path}/model_final.pth", *options))
    after = [json.loads(file.read_text()) for file in files]
    for found, expected in zip(after, during):
        assert len(found) == len(expected) > 20
        scores = [[entry["score"] for entry in entries] for entries in (found, expected)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.timeout(120)
def test_a_batch_that_the_processes_cannot_share_is_one_sentence(shapes, tmp_path):
    done = run(command(shapes, tmp_path, "--num-gpus", "2", "SOLVER.IMS_PER_BATCH=3"), status=2)
    assert "SOLVER.IMS_PER_BATCH is 3: it must be a positive multiple of 2." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(120)
def test_a_loss_that_is_not_finite_in_one_process_ends_all(tmp_path):
    done = run([sys.executable, str(Path(__file__).with_name("one_bad_process.py"))], status=1)
    assert "loss_cls/predictor0 of process 1 = nan" in done.stderr and "Traceback" not in done.stderr
