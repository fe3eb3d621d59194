"""The whole path on real photographs: a few of them, learned by heart."""

import os
from pathlib import Path

import pytest

import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.run import train
from dfm_d2.engine.setup import load_config, setup_run

ROOT = Path(__file__).resolve().parents[2]
BCCD = Path(os.environ.get("DFM_SHARED_DATA", ROOT / ".." / "shared" / "data")) / "bccd"
NUM_IMAGES = 16


class _Arguments:
    opts: tuple = ()
    eval_only = False


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not BCCD.is_dir(), reason=f"needs the folder {BCCD} (set DFM_SHARED_DATA)")
def test_sixteen_blood_cell_photographs_are_learned_by_heart(tmp_path):
    names = (BCCD / "ImageSets" / "Main" / "train.txt").read_text().split()[:NUM_IMAGES]
    voc = tmp_path / "voc"
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "few.txt").write_text("\n".join(names) + "\n")
    for folder in ("Annotations", "JPEGImages"):
        (voc / folder).symlink_to((BCCD / folder).resolve())
    opts = f"DATASETS.VOC_ROOT {voc} OUTPUT_DIR {tmp_path / 'out'} MODEL.DEVICE cpu".split()
    opts += (
        'DATASETS.TRAIN ("voc_root_few",) DATASETS.TEST ("voc_root_few",) DATALOADER.NUM_WORKERS 0'.split()
    )
    opts += "INPUT.MIN_SIZE_TRAIN (192,) INPUT.MIN_SIZE_TEST 192 INPUT.RANDOM_FLIP none".split()
    opts += "MODEL.DFM.HEAD.POOLER_CANONICAL_SIZE 64 MODEL.DFM.HEAD.POOLER_SAMPLING_RATIO 1".split()
    opts += "SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 1500 TEST.EVAL_PERIOD 0".split()
    cfg = load_config(DETECTION, str(ROOT / "configs" / "bccd_flow_r18.yaml"), opts)
    results = train(DETECTION, cfg, setup_run(DETECTION, cfg, _Arguments()), resume=False)
    assert results["bbox"]["AP50"] >= 90
