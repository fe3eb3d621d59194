"""What the builtin subset does in its own way: clearer errors, processes, size."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from providers import BUILTIN

import dfm_d2.framework


def _config(*options):
    cfg = BUILTIN.get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["MODEL.RESNETS.DEPTH", 19], "DEPTH is 19: choose from 18, 34, 50, 101"),
        (["MODEL.RESNETS.DEPTH", 18], "RES2_OUT_CHANNELS must be 64"),
        (["MODEL.RESNETS.NORM", "XN"], "norm 'XN'"),
        (["MODEL.RESNETS.OUT_FEATURES", ["res9"]], "OUT_FEATURES is"),
        (["MODEL.FPN.IN_FEATURES", ["res2", "res4"]], "strides"),
        (["MODEL.FPN.IN_FEATURES", []], "FPN.IN_FEATURES"),
        (["MODEL.FPN.FUSE_TYPE", "max"], "FUSE_TYPE is 'max'"),
    ],
)
def test_bad_backbone_values_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        BUILTIN.build_backbone(_config(*options))


def test_inference_restores_training_mode_after_an_error():
    class Model(torch.nn.Linear):
        def forward(self, batch):
            raise ArithmeticError("broken off")

    model = Model(1, 1)
    with pytest.raises(ArithmeticError):
        BUILTIN.inference_on_dataset(model, [[1]], BUILTIN.DatasetEvaluator())
    assert model.training


def _exchange(rank: int, address: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    comm = BUILTIN.comm
    comm.synchronize()
    results[rank] = [comm.get_rank(), comm.get_world_size(), comm.is_main_process()] + [
        comm.all_gather({"rank": rank}),
        comm.gather(rank * 10),
        comm.gather(rank * 10, dst=1),
    ]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_exchange_between_two_processes(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_exchange, args=(f"file://{tmp_path}/meet", results), nprocs=2)
        ranks = [{"rank": 0}, {"rank": 1}]
        assert results[0] == [0, 2, True, ranks, [0, 10], []]
        assert results[1] == [1, 2, False, ranks, [], [0, 10]]


def test_the_subset_is_bounded():
    files = list(Path(dfm_d2.framework.__file__).parent.rglob("*.py"))
    lines = {file.name: len(file.read_text().splitlines()) for file in files}
    assert sum(lines.values()) <= 1800
    assert max(lines.values()) < 300
