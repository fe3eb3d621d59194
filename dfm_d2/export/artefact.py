"""Running an exported file as if it were the detector: for evaluation, and to compare.

Shapes: B images, N noise boxes of all passes.
"""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfm_d2.detection.detector import FlowDetector
from dfm_d2.detection.sampler import initial_noise
from dfm_d2.export.aoti import DEVICE_KEY, load_package
from dfm_d2.export.formats import ABOUT
from dfm_d2.framework import Boxes, Instances, detector_postprocess

# (images (B, 3, H, W), image_sizes (B, 2), x_0 (B, N, 4)) -> boxes, scores, classes, count.
Run = Callable[[Tensor, Tensor, Tensor | None], Sequence[Tensor]]


def load_artefact(path: str | Path) -> "ExportedDetector":
    """The detector of a file that export_model wrote, on the CPU; an AOTInductor package on its device.

    Raises:
        ValueError: the file's name ends in none of the formats' ways, or it is damaged or of another origin.
        ImportError: an ONNX file where onnxruntime is not installed.
    """
    path = Path(path)
    # The longest ending first.
    loaders = {".aoti.pt2": _load_aoti, ".pt2": _load_pt2, ".onnx": _load_onnx, ".ts": _load_torchscript}
    load = next((loader for ending, loader in loaders.items() if path.name.endswith(ending)), None)
    if load is None:
        raise ValueError(f"{path} ends in none of {', '.join(loaders)}: give a file of tools/export_model.py")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: check the path.")
    run, about = load(path)
    if not about:
        raise ValueError(f"{path} has no {ABOUT}: it was not written by tools/export_model.py")
    return ExportedDetector(run, json.loads(about))


class ExportedDetector(nn.Module):
    """Takes and returns what FlowDetector does: `[{"image", "image_id", ...}]` to `[{"instances"}]`.

    The noise of an image is what the detector draws for its id; in a file with constant noise, the constant.

    Attributes:
        about: what the file says of itself, see dfm_d2.export.formats.
    """

    def __init__(self, run: Run, about: Mapping[str, Any]):
        super().__init__()
        self._run = run
        self.about = dict(about)

    def forward(self, batched_inputs: Sequence[dict], x_0: Tensor | None = None) -> list[dict]:
        """Detections in original image coordinates. x_0: `(B, N, 4)`; None: of the images' ids.

        Raises:
            ValueError: noise for a file that has its own, or of another shape.
        """
        if not batched_inputs:
            return []
        shape = len(batched_inputs), self.about["num_noise_boxes"], 4
        one_by_one = self.about["file_format"] == "torchscript"
        if self.about["noise"] == "constant":
            if x_0 is not None:
                raise ValueError("this file has constant noise and takes none")
        elif x_0 is None:
            x_0 = self._noise(batched_inputs)
        elif tuple(x_0.shape) != shape:
            raise ValueError(f"x_0 has the shape {tuple(x_0.shape)}, this file takes {shape}")
        if not one_by_one:
            return self._batch(batched_inputs, x_0)
        rows = [None] * len(batched_inputs) if x_0 is None else x_0[:, None]
        return [found for item, row in zip(batched_inputs, rows) for found in self._batch([item], row)]

    def _noise(self, batched_inputs: Sequence[dict]) -> Tensor:
        passes = self.about["noise_passes"]
        each = self.about["num_noise_boxes"] // passes
        return initial_noise(FlowDetector.image_ids(batched_inputs), self.about["seed"], each, passes)

    def _batch(self, batched_inputs: Sequence[dict], x_0: Tensor | None) -> list[dict]:
        images, sizes = pad_images(
            [x["image"] for x in batched_inputs], self.about["divisibility"], self.about["min_side"]
        )
        found = self._run(images, sizes, x_0)
        results = []
        for item, size, boxes, scores, classes, count in zip(batched_inputs, sizes.tolist(), *found):
            height, width = int(size[0]), int(size[1])
            n = int(count)
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(boxes[:n].clone())
            instances.scores = scores[:n]
            instances.pred_classes = classes[:n]
            whole = (item.get("height", height), item.get("width", width))
            results.append({"instances": detector_postprocess(instances, *whole)})
        return results


def pad_images(images: Sequence[Tensor], divisibility: int, min_side: int) -> tuple[Tensor, Tensor]:
    """Images `(3, H_i, W_i)` in the upper left corners of `(B, 3, H, W)` float32; their sizes `(B, 2)`."""
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.float32)
    unit = divisibility
    height, width = (max(-(-int(side) // unit) * unit, min_side) for side in sizes.amax(0))
    padded = torch.zeros(len(images), 3, height, width)
    for place, image in zip(padded, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    return padded, sizes


def _load_torchscript(path: Path) -> tuple[Run, str]:
    extra = {ABOUT: ""}
    try:
        module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    except RuntimeError as error:
        raise ValueError(f"{path} is no TorchScript file: export it again") from error

    def run(images: Tensor, sizes: Tensor, x_0: Tensor | None) -> Sequence[Tensor]:
        height, width = (int(side) for side in sizes[0])
        inputs = (images[0, :, :height, :width],) + (() if x_0 is None else (x_0[0],))
        # Fields of Instances in the order of their names: boxes, classes, scores; then the image size.
        boxes, classes, scores, _ = module(*inputs)
        return boxes[None], scores[None], classes[None], torch.tensor([len(scores)])

    return run, _text(extra[ABOUT])


def _load_pt2(path: Path) -> tuple[Run, str]:
    extra = {ABOUT: ""}
    try:
        module = torch.export.load(str(path), extra_files=extra).module()
    except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no pt2 file that this torch can read: export it again") from error

    def run(images: Tensor, sizes: Tensor, x_0: Tensor | None) -> Sequence[Tensor]:
        with torch.no_grad():
            return module(images=images, image_sizes=sizes, **({} if x_0 is None else {"x_0": x_0}))

    return run, _text(extra[ABOUT])


def _load_aoti(path: Path) -> tuple[Run, str]:
    package, metadata = load_package(path)
    device = metadata[DEVICE_KEY]

    def run(images: Tensor, sizes: Tensor, x_0: Tensor | None) -> Sequence[Tensor]:
        inputs = {"images": images, "image_sizes": sizes} | ({} if x_0 is None else {"x_0": x_0})
        found = package(**{name: value.to(device) for name, value in inputs.items()})
        return [value.to(images.device) for value in found]

    return run, metadata.get(ABOUT, "")


def _load_onnx(path: Path) -> tuple[Run, str]:
    # An optional extra; its errors have no base class of their own.
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import (
        Fail,
        InvalidArgument,
        InvalidGraph,
        InvalidProtobuf,
    )

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        raise ValueError(f"{path} is no ONNX file that onnxruntime can read: export it again") from error

    def run(images: Tensor, sizes: Tensor, x_0: Tensor | None) -> Sequence[Tensor]:
        inputs = {"images": images.numpy(), "image_sizes": sizes.numpy()}
        if x_0 is not None:
            inputs["x_0"] = x_0.numpy()
        return [torch.from_numpy(found) for found in session.run(None, inputs)]

    return run, session.get_modelmeta().custom_metadata_map.get(ABOUT, "")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
