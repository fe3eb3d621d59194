"""Detect with a file of tools/export_model.py, without dfm_d2: boxes in pixels of the photograph, as JSON.

python run_exported.py model.onnx photo.jpg [more.jpg ...]     needs numpy, Pillow and onnxruntime
python run_exported.py model.ts photo.jpg                      needs numpy, Pillow, torch and torchvision
python run_exported.py model.pt2 photo.jpg                     the same, and dfm_d2/export/checked.py
python run_exported.py model.aoti.pt2 photo.jpg                as model.ts, on a processor like the exporter's

AOTInductor packages and TorchScript are programs: run only those that you trust. A pt2 file is checked first.
Shapes: B images, N noise boxes, L detections of an image at most.
"""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ABOUT = "dfm_d2.json"  # the name of what a file says of itself
# Pillow would try all formats that it knows, and start Ghostscript for EPS.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# checked.py, which opens pt2 files; a program of yours may have it beside this file.
sys.path.append(str(Path(__file__).resolve().parents[1] / "dfm_d2" / "export"))


def load_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map[ABOUT]
    return lambda inputs: session.run(None, inputs), about


def load_with_torch(path):
    import torch
    import torchvision  # noqa: F401  (registers torchvision::nms, which the graphs call)

    extra = {ABOUT: ""}
    if path.endswith(".ts"):
        module = torch.jit.load(path, _extra_files=extra)
    elif path.endswith(".aoti.pt2"):
        from torch._inductor import aoti_load_package

        module = aoti_load_package(path)
        extra = module.get_metadata()
    else:
        from checked import checked_copy  # nothing of the file is run before it has been looked at

        try:
            module = torch.export.load(checked_copy(path), extra_files=extra).module()
        except pickle.UnpicklingError as error:
            raise SystemExit(f"{path} could run code and was not loaded: {error}") from error

    def one_by_one(images, image_sizes, x_0=None):  # a trace has batch 1
        for i, (height, width) in enumerate(image_sizes.int().tolist()):
            noise = [] if x_0 is None else [x_0[i]]
            # The fields of Detectron2's Instances in the order of their names, and the size of the image.
            boxes, classes, scores, _ = module(images[i, :, :height, :width], *noise)
            yield boxes, scores, classes, torch.tensor(len(scores))

    @torch.no_grad()
    def run(inputs):
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        found = zip(*one_by_one(**tensors)) if path.endswith(".ts") else module(**tensors)
        return [[row.numpy() for row in rows] for rows in found]

    return run, extra[ABOUT]


LOADERS = {".onnx": load_onnx, ".pt2": load_with_torch, ".ts": load_with_torch}


def read(path, about):
    """Pixels float32 (3, H, W) as the file wants them, and the factors (4,) from there to the photograph."""
    photo = ImageOps.exif_transpose(Image.open(path, formats=FORMATS))
    if photo.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips: white for the most part
        photo = Image.fromarray((np.asarray(photo).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    photo = photo.convert("RGB")
    width, height = photo.size
    if about["min_size"]:
        scale = about["min_size"] / min(photo.size)
        if about["max_size"] and max(photo.size) * scale > about["max_size"]:
            scale = about["max_size"] / max(photo.size)
        size = (max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1))
        photo = photo.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(photo, dtype=np.float32)
    if about["format"] == "BGR":
        pixels = pixels[:, :, ::-1]
    factors = np.array([width / photo.width, height / photo.height] * 2)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), factors


def pad(images, about):
    """(B, 3, H, W) with sides that the file takes, and the sizes (B, 2) of what is inside."""
    sizes = np.array([image.shape[1:] for image in images], dtype=np.float32)
    unit = about["divisibility"]
    height, width = (max(-(-int(side) // unit) * unit, about["min_side"]) for side in sizes.max(0))
    batch = np.zeros((len(images), 3, height, width), dtype=np.float32)
    for place, image in zip(batch, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def main(model, *paths):
    """{path: detections as plain values} of each photograph."""
    load = next((load for ending, load in LOADERS.items() if model.endswith(ending)), None)
    if load is None:
        raise SystemExit(f"{model} is no exported model: its name must end in one of {', '.join(LOADERS)}.")
    run, about = load(model)
    about = json.loads(about)
    images, factors = zip(*(read(path, about) for path in paths))
    batch, sizes = pad(images, about)
    inputs = {"images": batch, "image_sizes": sizes}
    if about["noise"] == "input":
        # (B, N, 4): any standard normal numbers do; the same ones give the same answer.
        shape = (len(paths), about["num_noise_boxes"], 4)
        inputs["x_0"] = np.random.default_rng(about["seed"]).standard_normal(shape, dtype=np.float32)
    found = {}
    for path, factor, boxes, scores, classes, count in zip(paths, factors, *run(inputs)):
        names = [about["class_names"][int(label)] for label in classes[:count]]
        rows = zip(names, scores[:count].tolist(), (boxes[:count] * factor).tolist())
        found[path] = [{"class": name, "score": score, "box_xyxy": box} for name, score, box in rows]
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:]), indent=1))
