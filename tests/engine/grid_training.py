"""Train the tiny detector, in float64, in forked processes; for test_predictor_parallel.py.

Usage: grid_training.py FOLDER. Writes FOLDER/<scenario>_<processes>.pth for every scenario: the checkpoint of
the first process.
"""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from tiny_model import tiny_cfg  # noqa: E402

from dfm_d2.engine.ema import ModelEMA  # noqa: E402
from dfm_d2.engine.hooks import EMAHook  # noqa: E402
from dfm_d2.engine.optimizer import build_block_optimizer  # noqa: E402
from dfm_d2.engine.trainer import LocalUpdateTrainer  # noqa: E402
from dfm_d2.framework import Boxes, Instances, build_model  # noqa: E402
from dfm_d2.local_update.processes import ProcessGrid  # noqa: E402
from dfm_d2.local_update.ranks import GatherBlocks, RanksUpdate  # noqa: E402
from dfm_d2.local_update.updates import build_update  # noqa: E402

BATCH, STEPS = 4, 3

# Keys of MODEL.DFM, and the grids (processes, members of a row) that must train what one process trains.
SCENARIOS: dict[str, tuple[dict, list[tuple[int, int]]]] = {
    "on_policy": ({}, [(2, 2), (4, 2), (3, 3), (2, 1)]),
    "shared_time": ({"TIME": "shared"}, [(2, 2)]),
    "local": ({"BACKBONE_UPDATE": "local", "STEP_IN_BACKWARD": True}, [(2, 2), (4, 2), (2, 1)]),
    "frozen": ({"BACKBONE_UPDATE": "frozen", "ON_POLICY": 0.0}, [(2, 2)]),
}


def item(position: int) -> dict:
    """Sample ``position``, a pure function of the position; sizes, and numbers of boxes, differ."""
    generator = torch.Generator().manual_seed(position)
    size = (72, 56) if position % BATCH == 1 else (40, 64)  # padded to 96 and 64: the shares differ
    count = position % 4
    corner = torch.rand(count, 2, generator=generator) * 20
    instances = Instances(size)
    instances.gt_boxes = Boxes(
        torch.cat([corner, corner + 8 + 10 * torch.rand(count, 2, generator=generator)], 1)
    )
    instances.gt_classes = torch.arange(count) % 3
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    return {
        "image_id": f"i{position}",
        "height": size[0],
        "width": size[1],
        "image": image,
        "instances": instances,
    }


def loader(position: int, share: list[int]):
    """This process's share of the endless stream, by places in the batch."""
    while True:
        yield [item(position + place) for place in share]
        position += BATCH


def train(scenario: str, processes: int, members: int) -> dict:
    """The checkpoint after STEPS iterations, on the first process."""
    keys, _ = SCENARIOS[scenario]
    cfg = tiny_cfg(NUM_PROPOSALS=8, **keys)
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.DFM.HEAD.HIDDEN_DIM = 32
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 0.001, 0.1
    torch.manual_seed(0)
    model = build_model(cfg).double().train()
    dfm = cfg.MODEL.DFM
    grid = ProcessGrid.build(members, dfm.NUM_PREDICTORS)
    optimizer = build_block_optimizer(cfg, model, grid=grid)
    update = build_update("sequential", dfm.STEP_IN_BACKWARD)
    if members > 1:
        update = RanksUpdate(grid, dfm.STEP_IN_BACKWARD)
    rank = dist.get_rank() if processes > 1 else 0
    share = np.array_split(range(BATCH), processes)[rank].tolist()  # uneven where it does not divide
    trainer = LocalUpdateTrainer(
        model, lambda p: loader(p, share), optimizer, update, contextlib.nullcontext, images_per_step=BATCH
    )
    ema = ModelEMA(model, 0.5)
    hooks = [EMAHook(ema)] + ([GatherBlocks(grid, optimizer, (), ema)] if members > 1 else [])
    trainer.register_hooks(hooks)
    trainer.train(0, STEPS)
    metrics = {key: value for key, (value, _) in trainer.storage.latest().items() if "time" not in key}
    return {
        "model": model.state_dict(),
        "ema": ema.weights,
        "optimizer": optimizer.state_dict(),
        "metrics": metrics,
    }


def train_in_processes(folder: Path, scenario: str, processes: int, members: int) -> None:
    """Fork the processes, which need not import torch again; SystemExit if one fails."""
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            name = f"{scenario}_{processes}_{members}"
            if processes > 1:
                meeting = f"file://{folder / name}.meeting"
                dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
            checkpoint = train(scenario, processes, members)
            if rank == 0:
                torch.save(checkpoint, folder / f"{name}.pth")
            if processes > 1:
                dist.destroy_process_group()
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise SystemExit(f"{scenario} in {processes} processes: {statuses}")


if __name__ == "__main__":
    for scenario, (_, grids) in SCENARIOS.items():
        for processes, members in [(1, 1), *grids]:
            train_in_processes(Path(sys.argv[1]), scenario, processes, members)
