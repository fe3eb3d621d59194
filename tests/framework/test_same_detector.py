"""A whole detector under both providers, each in its process: same parameters, losses and detections."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from observations import differences
from require_detectron2 import detectron2_provider

from dfm_d2.config import add_dfm_config
from dfm_d2.framework import get_cfg, merge_config_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

DESCRIBE = """
import json
import torch
import dfm_d2.registry
from dfm_d2.config import add_dfm_config
from dfm_d2.framework import PROVIDER, Boxes, Instances, build_model
from dfm_d2.framework import get_cfg, merge_config_file, merge_config_opts
from observe_modeling import fill_by_formula

torch.set_num_threads(1)
cfg = get_cfg()
add_dfm_config(cfg)
merge_config_file(cfg, "configs/shapes_flow_r18.yaml")
merge_config_opts(cfg, ["MODEL.DEVICE", "cpu", "MODEL.DFM.NUM_CLASSES", "3", "MODEL.DFM.NUM_PROPOSALS", "8"])
model = build_model(cfg)
fill_by_formula(model)
image = (torch.arange(3 * 64 * 96) * 7 % 256).reshape(3, 64, 96).to(torch.uint8)
truth = Instances((64, 96), gt_boxes=Boxes([[8.0, 8.0, 40.0, 50.0]]), gt_classes=torch.tensor([1]))
batch = [{"image": image, "height": 128, "width": 192, "image_id": "a", "instances": truth}]
model.train()
losses = model(batch)
model.eval()
with torch.no_grad():
    found = model(batch)[0]["instances"]
print(json.dumps({
    "provider": PROVIDER,
    "state": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
    "losses": {name: float(loss) for name, loss in losses.items()},
    "boxes": found.pred_boxes.tensor.tolist(),
    "scores": found.scores.tolist(),
    "classes": found.pred_classes.tolist(),
}))
"""


def _describe(provider: str) -> dict:
    paths = [str(HERE), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "DFM_FRAMEWORK": provider, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "ignore", "-c", DESCRIBE]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.d2
def test_detector_is_the_same():
    detectron2_provider()
    ours, theirs = _describe("builtin"), _describe("detectron2")
    assert (ours.pop("provider"), theirs.pop("provider")) == ("builtin", "detectron2")
    assert ours["scores"], "the comparison needs detections"
    assert not differences(ours, theirs, tolerance=1e-5)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_load(path):
    """With the provider that is chosen: the builtin has every key that our configs set."""
    cfg = get_cfg()
    add_dfm_config(cfg)
    merge_config_file(cfg, str(path))
    assert cfg.MODEL.META_ARCHITECTURE in ("FlowDetector", "CascadeDetector", "FlowClassifier")
