"""The example runs without dfm_d2 and answers what the detector does."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_detector import CLASSES
from tool_loader import ROOT

EXAMPLE = str(ROOT / "examples" / "run_exported.py")

# Runs the example on each file where no import finds dfm_d2, an editable install included; on the first file,
# which is ONNX, without torch.
ISOLATED = """
import json, runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
refused = {"dfm_d2", "dfm_kernels", "detectron2", "torch"}
sys.meta_path.insert(0, Refuse())
script, image, *files = sys.argv[1:]
main = runpy.run_path(script)["main"]
for file in files:
    print(json.dumps(main(file, image)[image]))
    refused.discard("torch")
"""


@pytest.mark.parametrize(
    "formats", [["onnx", "pt2", "torchscript"], pytest.param(["onnx", "aoti"], marks=pytest.mark.slow)]
)
def test_the_example_answers_what_the_detector_does(formats, files, photographs, detector):
    item = photographs[0]
    paths = [str(files(format)) for format in formats]
    command = [sys.executable, "-W", "ignore", "-c", ISOLATED, EXAMPLE, item["file_name"], *paths]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(formats)
    generator = np.random.default_rng(detector.sampler.settings.seed)
    noise = torch.from_numpy(generator.standard_normal((1, 24, 4), dtype=np.float32))
    expected = detector.inference([item], noise)[0]["instances"]
    for found in answers:
        assert len(found) == len(expected) > 0
        boxes = torch.tensor([row["box_xyxy"] for row in found], dtype=torch.float32)
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=0.25)  # in the photograph
        scores = torch.tensor([row["score"] for row in found])
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-4)
        assert [row["class"] for row in found] == [CLASSES[k] for k in expected.pred_classes.tolist()]


def test_an_image_of_another_format_is_refused(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg", "EPS")  # Pillow would start Ghostscript
    with pytest.raises(OSError, match="cannot identify"):
        runpy.run_path(EXAMPLE)["read"](tmp_path / "a.jpg", {})


def test_an_image_of_16_bits_is_scaled(tmp_path):
    read = runpy.run_path(EXAMPLE)["read"]
    about = {"format": "RGB", "min_size": 0, "max_size": 0}
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray).save(tmp_path / "8.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(read(tmp_path / "16.png", about)[0], read(tmp_path / "8.png", about)[0])
