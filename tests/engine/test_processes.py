"""Several real processes on the CPU, which may share out the predictors: the same training as one."""

import contextlib
import functools
import itertools
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_model import tiny_cfg
from tiny_training import PREDICTOR_PARALLEL, as_torchrun_starts, assert_same, command, run, train

from dfm_d2.engine.hooks import gather_state
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.engine.trainer import LocalUpdateTrainer
from dfm_d2.framework import Boxes, Instances, build_model
from dfm_d2.local_update import ProcessGrid, RanksUpdate, build_update

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
BATCH, STEPS = 4, 3

# Keys of MODEL.DFM, and the grids (processes, members of a row) that must train what one process trains.
SCENARIOS: dict[str, tuple[dict, list[tuple[int, int]]]] = {
    "on_policy": ({}, [(2, 2), (4, 2), (3, 3), (2, 1)]),
    "ensemble": ({"INTERVALS": 1, "ROLLOUT": 2}, [(2, 2)]),
    "local": ({"BACKBONE_UPDATE": "local", "STEP_IN_BACKWARD": True}, [(2, 2), (4, 2), (2, 1)]),
    "dense": ({"DENSE_WEIGHT": 2.0, "STEP_IN_BACKWARD": True}, [(2, 2), (4, 2), (2, 1)]),
    "members": ({"NUM_PREDICTORS": 4, "INTERVALS": 2, "ROLLOUT": 2}, [(2, 2), (3, 3)]),
    "frozen": ({"BACKBONE_UPDATE": "frozen", "ROLLOUT": 0}, [(2, 2)]),
}
GRIDS = [(name, *grid) for name, (_, grids) in SCENARIOS.items() for grid in grids]


def item(position: int) -> dict:
    """Sample ``position``, a pure function of the position; sizes, and numbers of boxes, differ."""
    generator = torch.Generator().manual_seed(position)
    size = (72, 56) if position % BATCH == 1 else (40, 64)  # padded to 96 and 64: the shares differ
    count = position % 4
    corner = torch.rand(count, 2, generator=generator) * 20
    instances = Instances(size)
    sides = 8 + 10 * torch.rand(count, 2, generator=generator)
    instances.gt_boxes = Boxes(torch.cat([corner, corner + sides], 1))
    instances.gt_classes = torch.arange(count) % 3
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    name = f"i{position}"
    return {"image_id": name, "height": size[0], "width": size[1], "image": image, "instances": instances}


@functools.cache  # one process trains each scenario once
def train_on_grid(scenario: str, processes: int, members: int) -> dict:
    """The checkpoint after STEPS iterations, on the first process."""
    cfg = tiny_cfg(NUM_PROPOSALS=8, **SCENARIOS[scenario][0])
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"  # which has 32 groups
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.DFM.HEAD.HIDDEN_DIM = 32
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 0.001, 0.1
    torch.manual_seed(0)
    model = build_model(cfg).double().train()
    in_backward, grid = cfg.MODEL.DFM.STEP_IN_BACKWARD, ProcessGrid.build(members)
    optimizer = build_block_optimizer(cfg, model, grid=grid)
    update = RanksUpdate(grid, in_backward) if members > 1 else build_update("sequential", in_backward)
    rank = dist.get_rank() if processes > 1 else 0
    share = np.array_split(range(BATCH), processes)[rank].tolist()  # uneven where it does not divide

    def loader(start: int):
        for position in itertools.count(start, BATCH):
            batch = [item(position + place) for place in share]
            yield update.of_row(batch) if members > 1 else batch

    trainer = LocalUpdateTrainer(model, loader, optimizer, update, contextlib.nullcontext, BATCH)
    trainer.train(0, STEPS)
    gather_state(trainer)
    metrics = {key: value for key, (value, _) in trainer.storage.latest().items() if "time" not in key}
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "metrics": metrics}


def train_in_process(rank: int, folder: Path, scenario: str, processes: int, members: int) -> None:
    """The part of one of several processes; the first one writes the checkpoint of all to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    checkpoint = train_on_grid(scenario, processes, members)
    if rank == 0:
        torch.save(checkpoint, folder / "checkpoint.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize(("scenario", "processes", "members"), GRIDS)
def test_processes_train_what_one_trains(server, tmp_path, scenario, processes, members):
    """Parameters, the state of AdamW and what is reported, with uneven shares of a batch too."""
    arguments = (tmp_path, scenario, processes, members)
    torch.multiprocessing.start_processes(train_in_process, arguments, processes, start_method="spawn")
    alone, found = train_on_grid(scenario, 1, 1), torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert alone["model"]["predictors.0.box_answer.weight"].dtype == torch.float64
    torch.testing.assert_close(found["model"], alone["model"], rtol=0, atol=1e-9)
    torch.testing.assert_close(found["optimizer"]["state"], alone["optimizer"]["state"], rtol=0, atol=1e-9)
    reported = {key for key in alone["metrics"] if key.startswith(("loss", "total", "grad"))}
    assert {"loss_cls/predictor0", "loss_cls/predictor2", "total_loss", "grad_norm/predictor1"} <= reported
    for key in reported:
        assert found["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-6), key


@pytest.fixture(scope="module")
def alone(shapes, tmp_path_factory) -> Path:
    """The folder of three iterations in one process."""
    out = tmp_path_factory.mktemp("alone")
    assert train(shapes, out, "SOLVER.MAX_ITER=3") == 0
    return out


@pytest.mark.parametrize("keys", [(), PREDICTOR_PARALLEL], ids=["data", "predictors"])
def test_what_two_processes_trained_one_continues(server, shapes, alone, tmp_path, keys):
    assert train(shapes, tmp_path, "--num-gpus", "2", "SOLVER.MAX_ITER=2", *keys) == 0
    printed = [(tmp_path / f"process{rank}.txt").read_text() for rank in (0, 1)]
    assert [text.count("class ") for text in printed] == [1, 0], "the table is printed once"
    assert train(shapes, tmp_path, "--resume", "SOLVER.MAX_ITER=3") == 0
    assert_same(tmp_path, alone)


def test_processes_that_somebody_else_started(server, shapes, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (shapes, tmp_path, port, "SOLVER.MAX_ITER=3", "MODEL.DFM.STEP_IN_BACKWARD=True")
    torch.multiprocessing.start_processes(as_torchrun_starts, arguments, 2, start_method="spawn")
    assert_same(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, options", [((), ("--num-gpus", "2")), (TORCHRUN, ("MODEL.DFM.UPDATE=joint",)), (TORCHRUN, ())]
)
def test_the_real_command(shapes, alone, tmp_path, launcher, options):
    run(command(shapes, tmp_path, "SOLVER.MAX_ITER=3", *options, launcher=launcher))
    assert_same(tmp_path, alone)


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
