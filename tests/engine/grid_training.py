"""Train the tiny detector, in float64, in one or several processes; for test_processes.py."""

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiny_model import tiny_cfg

from dfm_d2.engine.hooks import GatherHook
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.engine.trainer import LocalUpdateTrainer
from dfm_d2.framework import Boxes, Instances, build_model
from dfm_d2.local_update import ProcessGrid, RanksUpdate, build_update

BATCH, STEPS = 4, 3

# Keys of MODEL.DFM, and the grids (processes, members of a row) that must train what one process trains.
SCENARIOS: dict[str, tuple[dict, list[tuple[int, int]]]] = {
    "on_policy": ({}, [(2, 2), (4, 2), (3, 3), (2, 1)]),
    "shared_time": ({"TIME": "shared"}, [(2, 2)]),
    "local": ({"BACKBONE_UPDATE": "local", "STEP_IN_BACKWARD": True}, [(2, 2), (4, 2), (2, 1)]),
    "dense": ({"DENSE_LOSS": "flow", "STEP_IN_BACKWARD": True}, [(2, 2), (4, 2), (2, 1)]),
    "frozen": ({"BACKBONE_UPDATE": "frozen", "ON_POLICY": 0.0}, [(2, 2)]),
}


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
    height, width = size
    name = f"i{position}"
    return {"image_id": name, "height": height, "width": width, "image": image, "instances": instances}


def train(scenario: str, processes: int, members: int) -> dict:
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

    def loader(position: int):
        while True:
            batch = [item(position + place) for place in share]
            yield update.of_row(batch) if members > 1 else batch
            position += BATCH

    trainer = LocalUpdateTrainer(
        model, loader, optimizer, update, contextlib.nullcontext, images_per_step=BATCH
    )
    trainer.register_hooks([GatherHook(())])
    trainer.train(0, STEPS)
    metrics = {key: value for key, (value, _) in trainer.storage.latest().items() if "time" not in key}
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "metrics": metrics}


def train_in_process(rank: int, folder: Path, scenario: str, processes: int, members: int) -> None:
    """The part of one of several processes; the first one writes the checkpoint of all to the folder."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    checkpoint = train(scenario, processes, members)
    if rank == 0:
        torch.save(checkpoint, folder / "checkpoint.pth")
    dist.destroy_process_group()
