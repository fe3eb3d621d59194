"""Detect with a TorchScript file of tools/export_model.py: torch, torchvision (for its NMS) and Pillow.

python run_torchscript.py model.ts photo.jpg [more.jpg ...]

One image at a time, of any size: a trace has batch 1.
"""

import json
import sys

import torch
import torchvision  # noqa: F401  (registers torchvision::nms, which the graph calls)
from common import answer, noise, read


@torch.no_grad()
def main(model, *paths):
    extra = {"dfm_d2.json": ""}
    detector = torch.jit.load(model, _extra_files=extra)
    about = json.loads(extra["dfm_d2.json"])
    found = {}
    for path, x_0 in zip(paths, noise(len(paths), about)):
        pixels, factors = read(path, about)
        inputs = (torch.from_numpy(pixels), torch.from_numpy(x_0))
        # The fields of Detectron2's Instances in the order of their names, and the size of the image.
        boxes, classes, scores, _ = detector(*inputs[: 2 if about["noise"] == "input" else 1])
        found[path] = answer(boxes, scores, classes, factors, about)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
