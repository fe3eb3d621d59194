"""The examples run without dfm_d2 and answer what the detector does."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detections import EVERY_FORMAT
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Runs a script where no import finds dfm_d2, an editable install included.
ISOLATED = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dfm_d2", "dfm_kernels", "detectron2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
sys.path[:0] = [sys.argv[1].rsplit("/", 1)[0]]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_an_example_answers_what_the_detector_does(format, files, photographs, detector, preparation):
    item = photographs[0]
    script, image = str(EXAMPLES / f"run_{format}.py"), item["file_name"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", ISOLATED, script, str(files[format]), image]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)[image]
    noise = np.random.default_rng(preparation.seed).standard_normal((1, 24, 4), dtype=np.float32)
    expected = detector.inference([item], torch.from_numpy(noise))[0]["instances"]
    assert len(found) == len(expected) > 0
    boxes = torch.tensor([row["box_xyxy"] for row in found], dtype=torch.float32)
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=0.25)  # in the photograph
    scores = torch.tensor([row["score"] for row in found])
    torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-4)
    names = [preparation.class_names[label] for label in expected.pred_classes.tolist()]
    assert [row["class"] for row in found] == names


def test_an_image_of_16_bits_is_scaled(tmp_path):
    common = runpy.run_path(str(EXAMPLES / "common.py"))
    about = {"format": "RGB", "min_size": 0, "max_size": 0}
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray).save(tmp_path / "8.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.png")
    eight, sixteen = (common["read"](tmp_path / name, about)[0] for name in ("8.png", "16.png"))
    np.testing.assert_array_equal(sixteen, eight)
