"""From the size that the network saw to the size of the original image."""

import torch

from dfm_d2.framework._builtin.instances import Instances


def detector_postprocess(results: Instances, output_height: int, output_width: int) -> Instances:
    """Scale `results.pred_boxes` from `results.image_size` to the output size, clip them, drop empty ones.

    The boxes of `results` are scaled in place. Raises AssertionError where there is no `pred_boxes`.
    """
    assert results.has("pred_boxes"), "detections must have pred_boxes"
    scale_y = output_height / results.image_size[0]
    scale_x = output_width / results.image_size[1]
    size = (output_height, output_width)
    if isinstance(output_height, torch.Tensor):  # while a model is traced
        size = torch.stack(size)
    results = Instances(size, **results.get_fields())
    results.pred_boxes.scale(scale_x, scale_y)
    results.pred_boxes.clip(results.image_size)
    return results[results.pred_boxes.nonempty()]
