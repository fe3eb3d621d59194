"""FlowPredictor: files, arrays or tensors in, detections out, as Detectron2's DefaultPredictor for one image.

Shapes: H, W height and width of an image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfm_d2.data.images import ImageError, read_image
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

    def __init__(self, cfg: CfgNode, batch_size: int = 1):
        """cfg: with MODEL.WEIGHTS. batch_size: images of a list that are computed at once.

        Raises UserError for weights that are missing or of another model; ValueError for a bad batch size.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1")
        self.cfg = cfg.clone()
        self.cfg.defrost()
        self.model, self.class_names = load_detector(self.cfg)
        self.batch_size = batch_size

    @classmethod
    def from_files(
        cls, config_file: str, weights: str, opts: Sequence[str] = (), batch_size: int = 1
    ) -> "FlowPredictor":
        """Of a config file, a checkpoint and KEY VALUE overrides. Raises UserError."""
        return cls(load_config(DETECTION, config_file, [*opts, "MODEL.WEIGHTS", weights]), batch_size)

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
        self,
        images: Iterable[ImageLike],
        return_trajectory: bool = False,
        on_error: Callable[[ImageError], None] | None = None,
    ) -> Iterator[Instances | Flowed]:
        """As a call, one answer after another, for more images than fit into memory.

        on_error: takes the error of a file that cannot be read, which then has no answer; None: it is raised.
        """
        batch: list[dict] = []
        for number, image in enumerate(images):
            try:
                batch.append(self._item(image, number))
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            # A trajectory's boxes are decoded with one size: each image by itself.
            if len(batch) == (1 if return_trajectory else self.batch_size):
                yield from self._run(batch, return_trajectory)
                batch = []
        if batch:
            yield from self._run(batch, return_trajectory)

    def _item(self, image: ImageLike, number: int) -> dict:
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
                raise ValueError(
                    f"an image must be uint8 (H, W, 3) in the order {self.cfg.INPUT.FORMAT}, "
                    f"got {image.dtype} {image.shape}"
                )
            return resized_item({"file_name": "", "image_id": number}, image, self.cfg)
        if not isinstance(image, (str, Path)):
            raise ValueError(
                "an image must be a path or a uint8 array (H, W, 3) in the order "
                f"{self.cfg.INPUT.FORMAT}, got {type(image).__name__}"
            )
        pixels = read_image(image, self.cfg.INPUT.FORMAT)
        # Noise by the name of the file, as tools/visualize_flow.py has it: the same answer in any order.
        return resized_item({"file_name": str(image), "image_id": Path(image).stem}, pixels, self.cfg)

    @torch.no_grad()
    def _run(self, batch: list[dict], return_trajectory: bool) -> list[Instances] | list[Flowed]:
        with inference_autocast(self.cfg):
            found = [answer["instances"].to("cpu") for answer in self.model(batch)]
            if not return_trajectory:
                return found
            trajectory, image_size = self.model.trajectory(batch)
        return [Flowed(found[0], trajectory, image_size)]
