"""Which provider is chosen, what choosing it imports, and what the builtin subset does in its own way."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from observe_backbones import backbone_config
from providers import BUILTIN, run_python

from dfm_d2.framework._providers import choose_provider

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def broken_detectron2(tmp_path):
    """A folder with a package detectron2 that is present but cannot be imported."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('this Detectron2 is broken')\n")
    return tmp_path


def test_choices():
    assert choose_provider("auto", lambda: True) == "detectron2"
    assert choose_provider("auto", lambda: False) == "builtin"
    assert choose_provider("detectron2", lambda: True) == "detectron2"
    assert choose_provider("builtin", lambda: pytest.fail("asked")) == "builtin"
    with pytest.raises(ImportError, match="not installed: run .*requirements-detectron2.txt"):
        choose_provider("detectron2", lambda: False)
    with pytest.raises(ValueError, match="'detectron': set it to one of auto, detectron2, builtin"):
        choose_provider("detectron")


def test_builtin_where_detectron2_is_importable(broken_detectron2):
    """That the broken one does no harm proves that it is not imported. The choice is logged. What a command
    needs before it knows what to do imports no torch, and NMS alone imports torchvision."""
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO)
import dfm_d2.framework as f
from dfm_d2.framework import META_ARCH_REGISTRY, DatasetCatalog, MetadataCatalog, PathManager, configurable
from dfm_d2.framework import CfgNode, DatasetEvaluator, HookBase, TrainerBase, build_model
f.default_argument_parser().parse_args(["--config-file", "a.yaml"])
f.merge_config_opts(f.get_cfg(), ["SEED", "1"])
assert not {"torch", "torchvision"} & sys.modules.keys()
assert all(hasattr(f, name) for name in f.__all__)
assert "torchvision" not in sys.modules
print(f.PROVIDER, f.Boxes.__module__)
"""
    done = run_python("-c", code, first=[broken_detectron2], DFM_FRAMEWORK="builtin")
    assert done.stdout.split() == ["builtin", "dfm_d2.framework._builtin.structures"], done.stderr
    assert "provider builtin" in done.stderr


def test_present_but_broken_raises(broken_detectron2):
    """Also that it is found. The parser of a command, whose --help must not wait, does not import it."""
    code = "import dfm_d2.framework as f; f.default_argument_parser(); print(f.PROVIDER); f.get_cfg()"
    done = run_python("-c", code, first=[broken_detectron2], DFM_FRAMEWORK="auto")
    assert done.stdout == "detectron2\n" and done.returncode != 0
    assert "this Detectron2 is broken" in done.stderr


BAD_BACKBONES = {
    "MODEL.RESNETS.DEPTH 19": "DEPTH is 19: choose from 18, 34, 50, 101",
    "MODEL.RESNETS.DEPTH 18": "RES2_OUT_CHANNELS must be 64 for depth 18 and 34, not 256",
    "MODEL.RESNETS.NORM XN": "norm 'XN'",
    "MODEL.RESNETS.OUT_FEATURES ['res9']": "OUT_FEATURES is",
    "MODEL.FPN.IN_FEATURES ['res2','res4']": "strides",
    "MODEL.FPN.IN_FEATURES []": "FPN.IN_FEATURES",
    "MODEL.FPN.FUSE_TYPE max": "FUSE_TYPE is 'max'",
}


@pytest.mark.parametrize("options", BAD_BACKBONES)
def test_bad_backbone_values_are_named(options):
    with pytest.raises(ValueError, match=BAD_BACKBONES[options]):
        BUILTIN.build_backbone(backbone_config(BUILTIN, 50, "FrozenBN", 2, options.split()))


def test_inference_restores_training_mode_after_an_error():
    model = torch.nn.Linear(1, 1)
    model.forward = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        BUILTIN.inference_on_dataset(model, [[1]], BUILTIN.DatasetEvaluator())
    assert model.training


def _exchange(rank: int, address: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    comm = BUILTIN.comm
    comm.synchronize()
    who = [comm.get_rank(), comm.get_world_size(), comm.is_main_process()]
    results[rank] = [*who, comm.all_gather(rank), comm.gather(rank * 10), comm.gather(rank * 10, dst=1)]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_exchange_between_two_processes(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_exchange, args=(f"file://{tmp_path}/meet", results), nprocs=2)
        assert results[0] == [0, 2, True, [0, 1], [0, 10], []]
        assert results[1] == [1, 2, False, [0, 1], [], [0, 10]]


def test_the_subset_is_bounded():
    lines = [len(file.read_text().splitlines()) for file in (ROOT / "dfm_d2/framework").rglob("*.py")]
    assert 1000 < sum(lines) <= 1800 and max(lines) < 300
