"""FlowPredictor: files or arrays in, detections out, as Detectron2's DefaultPredictor for one image.

Shapes: H, W height and width of an image.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfm_d2.data.images import ImageError, read_image
from dfm_d2.detection.calibration import chosen_threshold
from dfm_d2.detection.data.loader import resized_item
from dfm_d2.detection.loading import load_detector
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.engine.setup import load_config
from dfm_d2.errors import UserError
from dfm_d2.flow import Trajectory
from dfm_d2.framework import CfgNode, Instances

# A file, or pixels uint8 (H, W, 3) in the order of INPUT.FORMAT.
ImageLike = str | Path | np.ndarray


class Flowed(NamedTuple):
    """instances: detections in original coordinates. trajectory: of this image alone, batch 1.

    image_size: `(1, 2)` height and width that the trajectory's boxes are decoded with.
    """

    instances: Instances
    trajectory: Trajectory
    image_size: Tensor


class FlowPredictor:
    """A trained detector for use in programs; no data set is needed.

    Attributes:
        model: the detector in evaluation mode. class_names: by index. cfg: the config, completed.
    """

    def __init__(self, cfg: CfgNode, batch_size: int = 1, threshold: float | str | None = None):
        """cfg: with MODEL.WEIGHTS. batch_size: images of a list that are computed at once.
        threshold: of the scores of what is answered; "auto": the one of greatest F1 (at IoU 0.5), which the
        checkpoint has; None: MODEL.DFM.SAMPLER.SCORE_THRESH.

        Raises UserError for weights that are missing or of another model, for a bad batch size, and where
        "auto" asks for a threshold that the checkpoint does not have.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1")
        self.cfg = cfg.clone()
        self.cfg.defrost()
        self.model, self.class_names = load_detector(self.cfg)
        self.batch_size = batch_size
        if threshold is not None:
            sampler, least = self.model.sampler, chosen_threshold(self.model, threshold)
            sampler.settings = replace(sampler.settings, score_thresh=least)

    @classmethod
    def from_files(
        cls, config_file: str, weights: str, opts: Sequence[str] = (), batch_size: int = 1, threshold=None
    ) -> "FlowPredictor":
        """Of a config file, a checkpoint and KEY VALUE overrides. Raises UserError."""
        cfg = load_config(DETECTION, config_file, [*opts, "MODEL.WEIGHTS", weights])
        return cls(cfg, batch_size, threshold)

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], return_trajectory: bool = False
    ) -> Instances | Flowed | list[Instances] | list[Flowed]:
        """Detections on the CPU, of one image or of each in a list.

        Args:
            images: files (EXIF orientation is applied, 16 bits are scaled, alpha is left out), or arrays.
            return_trajectory: answer Flowed, with the states and answers of every solver step.

        Raises:
            ImageError: a file that cannot be read.
            ValueError: an array that is no image, or what is neither a file nor an array.
        """
        if isinstance(images, (str, Path, np.ndarray)) or not isinstance(images, Iterable):
            return next(self.stream([images], return_trajectory))
        return list(self.stream(images, return_trajectory))

    def stream(
        self, images: Iterable[ImageLike], return_trajectory: bool = False, return_errors: bool = False
    ) -> Iterator[Instances | Flowed | ImageError]:
        """As a call, one answer after another, for more images than fit into memory.

        return_errors: the answer for a file that cannot be read is its ImageError, which is raised otherwise.
        """
        # A trajectory's boxes are decoded with one size: each image by itself.
        size = 1 if return_trajectory else self.batch_size
        numbered = enumerate(images)
        while chunk := list(itertools.islice(numbered, size)):
            items = [self._item(image, number, return_errors) for number, image in chunk]
            batch = [item for item in items if isinstance(item, dict)]
            with torch.no_grad(), inference_autocast(self.cfg):
                found = [answer["instances"].to("cpu") for answer in self.model(batch)] if batch else []
                if batch and return_trajectory:
                    found = [Flowed(found[0], *self.model.trajectory(batch)[:2])]
            answers = iter(found)
            for item in items:
                yield next(answers) if isinstance(item, dict) else item

    def _item(self, image: ImageLike, number: int, return_errors: bool) -> dict | ImageError:
        """The model's input dict, or why there is none."""
        entry = {"file_name": "", "image_id": number}
        if isinstance(image, (str, Path)):
            # Noise by the name of the file, as tools/visualize_flow.py has it: the same answer in any order.
            entry = {"file_name": str(image), "image_id": Path(image).stem}
            try:
                image = read_image(str(image), self.cfg.INPUT.FORMAT)
            except ImageError as error:
                if return_errors:
                    return error
                raise
        is_array = isinstance(image, np.ndarray)
        if not (is_array and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size):
            got = f"{image.dtype} {image.shape}" if is_array else type(image).__name__
            raise ValueError(
                f"an image must be a path or a uint8 array (H, W, 3) in the order {self.cfg.INPUT.FORMAT}, "
                f"got {got}"
            )
        return resized_item(entry, image, self.cfg)
