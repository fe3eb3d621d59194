"""Several real processes on the CPU, which may share out the predictors: the same training as one."""

import functools
import json
import socket

import grid_training
import pytest
import torch
from tiny_training import (
    PREDICTOR_PARALLEL,
    TORCHRUN,
    as_torchrun_starts,
    assert_same,
    command,
    parameters,
    run,
    train,
)

from dfm_d2.local_update import ProcessGrid

GRIDS = [(name, *grid) for name, (_, grids) in grid_training.SCENARIOS.items() for grid in grids]


@functools.cache
def in_one_process(scenario: str) -> dict:
    return grid_training.train(scenario, 1, 1)


@pytest.mark.parametrize(("scenario", "processes", "members"), GRIDS)
def test_processes_train_what_one_trains(server, tmp_path, scenario, processes, members):
    """Parameters, the state of AdamW and what is reported, with uneven shares of a batch too."""
    arguments = (tmp_path, scenario, processes, members)
    torch.multiprocessing.start_processes(
        grid_training.train_in_process, arguments, processes, start_method="spawn"
    )
    alone, found = in_one_process(scenario), torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert alone["model"]["predictors.0.box_answer.weight"].dtype == torch.float64
    torch.testing.assert_close(found["model"], alone["model"], rtol=0, atol=1e-9)
    torch.testing.assert_close(found["optimizer"]["state"], alone["optimizer"]["state"], rtol=0, atol=1e-9)
    reported = {key for key in alone["metrics"] if key.startswith(("loss", "total", "grad"))}
    assert {"loss_cls/predictor0", "loss_cls/predictor2", "total_loss", "grad_norm/predictor1"} <= reported
    for key in reported:
        assert found["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-6), key


@pytest.fixture(scope="module")
def alone(shapes, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The parameters after three iterations in one process."""
    out = tmp_path_factory.mktemp("alone")
    assert train(shapes, out, "SOLVER.MAX_ITER=3") == 0
    return parameters(out)


@pytest.mark.parametrize("keys", [(), PREDICTOR_PARALLEL], ids=["data", "predictors"])
def test_what_two_processes_trained_one_continues(server, shapes, alone, tmp_path, keys):
    assert train(shapes, tmp_path, "--num-gpus", "2", "SOLVER.MAX_ITER=2", *keys) == 0
    printed = [(tmp_path / f"process{rank}.txt").read_text() for rank in (0, 1)]
    assert [text.count("class ") for text in printed] == [1, 0], "the table is printed once"
    assert train(shapes, tmp_path, "--resume", "SOLVER.MAX_ITER=3") == 0
    assert_same(parameters(tmp_path), alone)


def test_processes_that_somebody_else_started(server, shapes, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = ("SOLVER.MAX_ITER=3", "MODEL.DFM.STEP_IN_BACKWARD=True")
    torch.multiprocessing.start_processes(
        as_torchrun_starts, (shapes, tmp_path, port, *keys), 2, start_method="spawn"
    )
    assert_same(parameters(tmp_path), alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [((), ("--num-gpus", "2")), (TORCHRUN, ("MODEL.DFM.UPDATE=joint",)), (TORCHRUN, ())],
)
def test_the_real_command(shapes, alone, tmp_path, launcher, arguments):
    run(command(shapes, tmp_path, "SOLVER.MAX_ITER=3", *arguments, launcher=launcher))
    assert_same(parameters(tmp_path), alone)


def test_what_two_processes_evaluate_is_what_they_save(server, shapes, tmp_path):
    """With batch norms, whose statistics are each process's own while it trains."""
    options = ("MODEL.RESNETS.NORM=BN", "MODEL.FPN.NORM=BN", "SOLVER.MAX_ITER=2")
    assert train(shapes, tmp_path, "--num-gpus", "2", *options) == 0
    file, weights = tmp_path / "inference/coco_instances_results.json", f"{tmp_path}/model_final.pth"
    during = [entry["score"] for entry in json.loads(file.read_text())]
    assert train(shapes, tmp_path, "--eval-only", f"MODEL.WEIGHTS={weights}", *options) == 0
    after = [entry["score"] for entry in json.loads(file.read_text())]
    assert len(after) > 20 and after == pytest.approx(during, rel=1e-4)


def test_a_batch_that_the_processes_cannot_share_is_one_line(server, shapes, tmp_path):
    assert train(shapes, tmp_path, "--num-gpus", "2", "SOLVER.IMS_PER_BATCH=3") == 2
    said = "".join(path.read_text() for path in tmp_path.glob("process?.txt"))  # one stops the other
    assert "SOLVER.IMS_PER_BATCH is 3: it must be a positive multiple of 2." in said
    assert "Traceback" not in said


def test_who_owns_what():
    grid = ProcessGrid(members=2, member=1)
    assert [grid.owner(d) for d in range(5)] == [0, 1, 0, 1, 0]
    blocks = ("res2", "shared", "predictor0", "predictor1", "predictor10", "predictor11")
    assert [b for b in blocks if grid.owns(b)] == ["res2", "shared", "predictor1", "predictor11"]
    assert all(ProcessGrid().owns(block) for block in ("shared", "predictor0", "predictor7"))
