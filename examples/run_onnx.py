"""Detect with an ONNX file of tools/export_model.py: numpy, Pillow and onnxruntime, nothing else.

python run_onnx.py model.onnx photo.jpg [more.jpg ...]
"""

import json
import sys

import onnxruntime
from common import answer, noise, pad, read


def main(model, *paths):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["dfm_d2.json"])
    images, factors = zip(*(read(path, about) for path in paths))
    batch, sizes = pad(images, about)
    inputs = {"images": batch, "image_sizes": sizes}
    if about["noise"] == "input":
        inputs["x_0"] = noise(len(paths), about)
    boxes, scores, classes, count = session.run(None, inputs)
    found = {
        path: answer(boxes[i, :n], scores[i, :n], classes[i, :n], factors[i], about)
        for i, (path, n) in enumerate(zip(paths, count))
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
