"""Detect with a pt2 file of tools/export_model.py: torch, torchvision (for its NMS) and Pillow, no dfm_d2.

python run_pt2.py model.pt2 photo.jpg [more.jpg ...]
"""

import json
import sys

import torch
import torchvision  # noqa: F401  (registers torchvision::nms, which the graph calls)
from common import answer, noise, pad, read


@torch.no_grad()
def main(model, *paths):
    extra = {"dfm_d2.json": ""}
    detector = torch.export.load(model, extra_files=extra).module()
    about = json.loads(extra["dfm_d2.json"])
    images, factors = zip(*(read(path, about) for path in paths))
    batch, sizes = pad(images, about)
    inputs = {"images": torch.from_numpy(batch), "image_sizes": torch.from_numpy(sizes)}
    if about["noise"] == "input":
        inputs["x_0"] = torch.from_numpy(noise(len(paths), about))
    boxes, scores, classes, count = detector(**inputs)
    found = {
        path: answer(boxes[i, :n], scores[i, :n], classes[i, :n], factors[i], about)
        for i, (path, n) in enumerate(zip(paths, count.tolist()))
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
