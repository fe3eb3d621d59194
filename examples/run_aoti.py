"""Detect with an AOTInductor package of tools/export_model.py: torch, torchvision (for its NMS) and Pillow.

python run_aoti.py model.aoti.pt2 photo.jpg [more.jpg ...]

The package holds machine code: run those that you trust, on a processor like that of the export.
"""

import json
import sys

import torch
import torch._inductor
import torchvision  # noqa: F401  (registers torchvision::nms, which the code calls)
from common import answer, noise, pad, read


@torch.no_grad()
def main(model, *paths):
    detector = torch._inductor.aoti_load_package(model)
    about = json.loads(detector.get_metadata()["dfm_d2.json"])
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
