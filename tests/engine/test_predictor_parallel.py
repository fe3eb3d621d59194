"""Predictors shared out among real processes on the CPU: the same training as in one."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from grid_training import SCENARIOS
from tiny_training import assert_same, command, parameters, run

from dfm_d2.detection.data.shapes import write_shapes
from dfm_d2.local_update.processes import ProcessGrid

GRIDS = [(name, *grid) for name, (_, grids) in SCENARIOS.items() for grid in grids]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Path]:
    """The folder of all checkpoints that grid_training.py writes."""
    folder = tmp_path_factory.mktemp("grids")
    script = [sys.executable, str(Path(__file__).with_name("grid_training.py")), str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    yield folder
    shutil.rmtree(folder)  # gigabytes


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("scenario", "processes", "members"), GRIDS)
def test_processes_train_what_one_trains(trained, scenario, processes, members):
    """Parameters, averages, the state of AdamW and what is reported, with uneven shares of a batch too."""
    alone, found = (
        torch.load(trained / f"{scenario}_{name}.pth", weights_only=True)
        for name in ("1_1", f"{processes}_{members}")
    )
    assert alone["model"]["predictors.0.box_answer.weight"].dtype == torch.float64
    for part in ("model", "ema"):
        torch.testing.assert_close(found[part], alone[part], rtol=0, atol=1e-9)
    torch.testing.assert_close(found["optimizer"]["state"], alone["optimizer"]["state"], rtol=0, atol=1e-9)
    reported = {key for key in alone["metrics"] if key.startswith(("loss", "total", "grad"))}
    assert {"loss_cls/predictor0", "loss_cls/predictor2", "total_loss", "grad_norm/predictor1"} <= reported
    for key in reported:
        assert found["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-6), key


@pytest.mark.timeout(300)
def test_a_run_of_two_owners_continues_in_one_process(tmp_path):
    shapes = tmp_path / "shapes"
    write_shapes(shapes, num_train=12, num_val=3, size=64, seed=0)
    run(command(shapes, tmp_path / "alone", "SOLVER.MAX_ITER=3"))
    out, keys = tmp_path / "two", ("MODEL.DFM.UPDATE=parallel", "MODEL.DFM.PREDICTOR_RANKS=2")
    run(command(shapes, out, "--num-gpus", "2", *keys, "SOLVER.MAX_ITER=2"))
    run(command(shapes, out, "--resume", "SOLVER.MAX_ITER=3"))
    assert_same(parameters(out), parameters(tmp_path / "alone"))


def test_a_grid_that_does_not_fit_is_one_sentence():
    with pytest.raises(ValueError, match="PREDICTOR_RANKS is 3: it must divide the number of processes, 1"):
        ProcessGrid.build(3, num_predictors=4)


def test_who_owns_what():
    grid = ProcessGrid(members=2, member=1)
    assert [grid.owner(d) for d in range(5)] == [0, 1, 0, 1, 0]
    assert [
        b
        for b in ("res2", "shared", "predictor0", "predictor1", "predictor10", "predictor11")
        if grid.owns(b)
    ] == [
        "res2",
        "shared",
        "predictor1",
        "predictor11",
    ]
    assert all(ProcessGrid().owns(block) for block in ("shared", "predictor0", "predictor7"))
