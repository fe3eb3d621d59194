"""A detector as exporters need it, a function of tensors on plain operators; the metadata of its file; and
the file as if it were the detector.

Shapes: B images, N noise boxes of all passes, L detections of an image at most.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from dfm_d2.detection.detector import FlowDetector
from dfm_d2.detection.postprocess import padded_detections
from dfm_d2.detection.sampler import BoxSampler, SamplerSettings
from dfm_d2.errors import UserError
from dfm_d2.export.formats import export_model
from dfm_d2.export.load import load_file
from dfm_d2.framework import Boxes, CfgNode, Instances, TracingAdapter, detector_postprocess

# The id that stands for every image where the noise is a constant of the file.
CONSTANT_ID = "export"
# Greatest batch and side of the dynamic shapes; torch.export wants a bound.
_MAX_BATCH, _MAX_SIDE = 1024, 16384
# Least side, in units of the divisibility: torch.export takes a level that is one pixel wide for a constant.
MIN_UNITS = 3

# Boxes (L, 4) in pixels of the image as the network saw it, scores (L,), classes (L,).
Found = tuple[Tensor, Tensor, Tensor]


def export_detector(
    model: FlowDetector,
    format: str,
    folder: str | Path,
    cfg: CfgNode,
    class_names: Sequence[str],
    image: Tensor,
    constant_noise: bool = False,
) -> Path:
    """Write the file of `format` into `folder`; returns its path.

    Args:
        cfg: says how images are resized. class_names: by index.
        image: `(3, H, W)`, pixels 0 to 255, of which a trace is made; other sizes work after it.
        constant_noise: the noise is that of the sampler's seed, not an input of the file.

    Raises:
        UserError: see prepared_model and dfm_d2.export.formats.export_model.
    """
    model = prepared_model(model)
    about = _metadata(cfg, model, class_names, format, constant_noise)
    if format == "torchscript":
        adapter = tracing_adapter(model, image.to(model.device), constant_noise)
        inputs = {str(place): value for place, value in enumerate(adapter.flattened_inputs)}
        return export_model(adapter, inputs, format, folder, about)
    inputs, dynamic_shapes = _graph_inputs(model, constant_noise)
    names = ("boxes", "scores", "classes", "count")
    detector = TensorDetector(model, constant_noise)
    return export_model(detector, inputs, format, folder, about, dynamic_shapes, names)


def prepared_model(model: FlowDetector) -> FlowDetector:
    """A copy in evaluation mode on the ops' references.

    Raises:
        UserError: a pooler that is no fixed graph.
    """
    if model.predictors[0].pooler.sampling_ratio == 0:
        raise UserError(
            "MODEL.DFM.HEAD.POOLER_SAMPLING_RATIO 0 takes as many samples as the largest box needs, which "
            "is no fixed graph: export a model trained with 1 or more"
        )
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.stage_predictors, model.dense_predictor = nn.ModuleDict(), None  # training needs them only
    return model


def _metadata(
    cfg: CfgNode, model: FlowDetector, class_names: Sequence[str], format: str, constant_noise: bool
) -> dict[str, Any]:
    """How an image is made ready for the file, and what its answers mean."""
    sampler, unit = model.sampler.settings, max(model.backbone.size_divisibility, 1)
    return {
        "format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "divisibility": unit,
        "min_side": MIN_UNITS * unit,
        "class_names": list(class_names),
        "seed": sampler.seed,
        "file_format": format,
        "noise": "constant" if constant_noise else "input",
        "noise_passes": sampler.noise_passes,
        "num_noise_boxes": sampler.num_proposals * sampler.noise_passes,
        "time_grid": list(model.time_grid),
        "members": list(sampler.members) or list(range(model.predictors.num_members)),
    }


class ConstantNoise(nn.Module):
    """The detector with the same noise `(1, N, 4)` for every image, that of MODEL.DFM.SAMPLER.SEED."""

    def __init__(self, model: FlowDetector):
        super().__init__()
        self.model = model
        self.register_buffer("noise", model.sampler.noise([CONSTANT_ID], model.device))

    def forward(self, batched_inputs: Sequence[dict]) -> list[dict]:
        return self.model.inference(batched_inputs, self.noise.expand(len(batched_inputs), -1, -1))


def tracing_adapter(model: FlowDetector, image: Tensor, constant_noise: bool) -> nn.Module:
    """The framework's TracingAdapter around one image (batch 1), and its noise where that is an input."""
    if constant_noise:
        return TracingAdapter(ConstantNoise(model), [{"image": image}])

    def inference(model: FlowDetector, items: list[dict]) -> list[dict]:
        x_0 = torch.stack([item["x_0"] for item in items])
        return model.inference([{"image": item["image"]} for item in items], x_0)

    x_0 = model.sampler.noise([0], image.device)[0]
    return TracingAdapter(model, [{"image": image, "x_0": x_0}], inference)


class TensorDetector(nn.Module):
    """`forward(images, image_sizes, x_0)`, or without `x_0` where the noise is a constant.

    Its shapes are static but for what NMS keeps inside of it.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: FlowDetector, constant_noise: bool):
        super().__init__()
        self.model = model
        self.register_buffer("noise", ConstantNoise(model).noise if constant_noise else None)

    def forward(
        self, images: Tensor, image_sizes: Tensor, x_0: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detections of a batch.

        Args:
            images: `(B, 3, H, W)` float32 pixels 0 to 255 in the order of INPUT.FORMAT, each in the upper
                left corner; H and W multiples of the backbone's `size_divisibility`.
            image_sizes: `(B, 2)` float32 height and width without the padding.
            x_0: `(B, N, 4)` standard normal.

        Returns:
            boxes `(B, L, 4)` pixels xyxy, scores `(B, L)`, classes `(B, L)` int64, count `(B,)` int64; see
            dfm_d2.detection.postprocess.PaddedDetections.
        """
        if self.noise is not None:
            x_0 = self.noise.expand(images.shape[0], -1, -1)
        model = self.model
        rows = torch.arange(images.shape[2], device=images.device) < image_sizes[:, :1]
        columns = torch.arange(images.shape[3], device=images.device) < image_sizes[:, 1:]
        # The detector pads what is normalised already: there the padding is zero.
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        pixels = (images - model.pixel_mean) / model.pixel_std * inside
        candidates = model.candidates(pixels, image_sizes, x_0)
        return tuple(padded_detections(candidates, model.space, image_sizes, model.sampler.settings))


def _graph_inputs(
    model: FlowDetector, constant_noise: bool
) -> tuple[dict[str, Tensor], dict[str, Mapping[int, Any]]]:
    """Inputs of TensorDetector, and which of their sizes are dynamic: batch, height and width."""
    unit = max(model.backbone.size_divisibility, 1)
    batch = Dim("batch", min=1, max=_MAX_BATCH)
    sides = ("height", "width")
    height, width = (Dim(f"{side}_units", min=MIN_UNITS, max=_MAX_SIDE // unit) for side in sides)
    # Two images, as the exporter takes a size of 1 for a constant.
    inputs = {
        "images": torch.zeros(2, 3, 4 * unit, 5 * unit, device=model.device),
        "image_sizes": torch.tensor([[4.0 * unit, 5.0 * unit]] * 2, device=model.device),
        "x_0": model.sampler.noise([0, 1], model.device),
    }
    dynamic = {"images": {0: batch, 2: unit * height, 3: unit * width}}
    dynamic |= {"image_sizes": {0: batch}, "x_0": {0: batch}}
    if constant_noise:
        del inputs["x_0"], dynamic["x_0"]
    return inputs, dynamic


class ExportedDetector(nn.Module):
    """Takes and returns what FlowDetector does: `[{"image", "image_id", ...}]` to `[{"instances"}]`.

    The noise of an image is what the detector draws for its id; in a file with constant noise, the constant.
    `about` is the file's metadata.
    """

    def __init__(self, path: str | Path):
        """path: a file that export_detector wrote. Raises as dfm_d2.export.load.load_file."""
        super().__init__()
        self._run, self.about = load_file(path)

    def forward(self, batched_inputs: Sequence[dict], x_0: Tensor | None = None) -> list[dict]:
        """Detections in original image coordinates. x_0: `(B, N, 4)`; None: of the images' ids.

        Raises:
            ValueError: noise for a file that has its own, or of another shape.
        """
        if not batched_inputs:
            return []
        shape = len(batched_inputs), self.about["num_noise_boxes"], 4
        if self.about["noise"] == "constant":
            if x_0 is not None:
                raise ValueError("this file has constant noise and takes none")
        elif x_0 is None:
            passes = self.about["noise_passes"]
            settings = SamplerSettings(shape[1] // passes, 1, seed=self.about["seed"], noise_passes=passes)
            x_0 = BoxSampler(settings).noise(FlowDetector.image_ids(batched_inputs))
        elif tuple(x_0.shape) != shape:
            raise ValueError(f"x_0 has the shape {tuple(x_0.shape)}, this file takes {shape}")
        images = [item["image"].float() for item in batched_inputs]
        # A trace has batch 1.
        run = self._one_by_one if self.about["file_format"] == "torchscript" else self._batch
        return [_answer(item, *found) for item, found in zip(batched_inputs, run(images, x_0))]

    def _one_by_one(self, images: Sequence[Tensor], x_0: Tensor | None) -> Iterator[Found]:
        for place, image in enumerate(images):
            noise = {} if x_0 is None else {"x_0": x_0[place]}
            # Fields of Instances in the order of their names: boxes, classes, scores; then the image size.
            boxes, classes, scores, _ = self._run({"image": image} | noise)
            yield boxes, scores, classes

    def _batch(self, images: Sequence[Tensor], x_0: Tensor | None) -> Iterator[Found]:
        """Images in the upper left corners of `(B, 3, H, W)`."""
        sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.float32)
        unit, least = self.about["divisibility"], self.about["min_side"]
        sides = (max(-(-int(side) // unit) * unit, least) for side in sizes.amax(0))
        padded = torch.zeros(len(images), 3, *sides)
        for place, image in zip(padded, images):
            place[:, : image.shape[1], : image.shape[2]] = image
        noise = {} if x_0 is None else {"x_0": x_0}
        for *found, count in zip(*self._run({"images": padded, "image_sizes": sizes} | noise)):
            yield tuple(values[: int(count)] for values in found)


def _answer(item: dict, boxes: Tensor, scores: Tensor, classes: Tensor) -> dict:
    height, width = item["image"].shape[1:]
    found = {"pred_boxes": Boxes(boxes.clone()), "scores": scores, "pred_classes": classes}
    instances = Instances((height, width), **found)
    whole = item.get("height", height), item.get("width", width)
    return {"instances": detector_postprocess(instances, *whole)}
