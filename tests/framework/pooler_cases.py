"""Features and boxes for which the values of Detectron2's pooler (ROIAlignV2, four levels) are frozen."""

import torch

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
# Output size and sampling ratio; ratio 0 is adaptive.
CASES = {"7x7 ratio 2": (7, 2), "3x3 ratio 1": (3, 1), "2x2 adaptive": (2, 0)}


def features() -> list[torch.Tensor]:
    """Four maps (2, 3, H, W) of an image of 256 x 320 pixels, the same on every machine."""
    maps = []
    for level, scale in enumerate(SCALES):
        shape = (2, 3, int(256 * scale), int(320 * scale))
        wave = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        maps.append(torch.sin(wave * 0.37 + level).reshape(shape).float())
    return maps


def boxes_xyxy() -> torch.Tensor:
    """(2, 8, 4) pixels: each level, the borders between levels, partly and wholly outside, thin and tiny."""
    first = [
        [10.0, 20.0, 60.0, 90.0],
        [0.0, 0.0, 112.0, 112.0],
        [3.5, 7.25, 227.5, 231.25],
        [-30.0, -20.0, 100.0, 80.0],
        [300.0, 200.0, 400.0, 300.0],
        [50.0, 60.0, 51.0, 61.5],
        [20.0, 100.0, 310.0, 104.0],
        [0.0, 0.0, 320.0, 256.0],
    ]
    second = [[x0 + 1.7, y0 - 2.3, x1 + 11.1, y1 + 5.9] for x0, y0, x1, y1 in first[:-1]] + [
        [-400.0, -400.0, 700.0, 700.0]
    ]
    return torch.tensor([first, second])


def summary(pooled: torch.Tensor) -> dict:
    """Mean and standard deviation of each box's values (16, 3, P, P), and a few of the values."""
    pooled = pooled.double()
    return {
        "shape": list(pooled.shape),
        "mean": pooled.mean(dim=(1, 2, 3)).tolist(),
        "std": pooled.std(dim=(1, 2, 3), unbiased=False).tolist(),
        "corners": pooled[:, :, [0, -1], [0, -1]].flatten().tolist(),
    }


def detectron2_pooler_values() -> dict:
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    values = {}
    for name, (output_size, sampling_ratio) in CASES.items():
        pooler = ROIPooler(output_size, SCALES, sampling_ratio, "ROIAlignV2")
        values[name] = summary(pooler(features(), [Boxes(boxes) for boxes in boxes_xyxy()]))
    return values
