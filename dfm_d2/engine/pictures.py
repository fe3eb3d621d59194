"""predictions.png and flow.png of a model, from a data set or from image files."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dfm_d2.data.images import read_image
from dfm_d2.data.loader import read_test_item
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.framework import CfgNode, DatasetCatalog
from dfm_d2.modeling.detector import FlowDetector
from dfm_d2.visualize import draw_flow, draw_predictions


@torch.no_grad()
def write_pictures(
    cfg: CfgNode,
    model: FlowDetector,
    class_names: Sequence[str],
    folder: str | Path,
    image_files: Sequence[str] = (),
    number: int = 6,
    score_thresh: float = 0.3,
) -> list[Path]:
    """Write predictions.png of `number` images and flow.png of the one with the most objects among them.

    Args:
        image_files: draw these; empty: the first images of the first set in DATASETS.TEST.

    Returns:
        The two paths.

    Raises:
        ImageError: a file that cannot be read.
    """
    if image_files:
        entries = [{"file_name": f, "image_id": Path(f).stem, "annotations": []} for f in image_files]
    else:
        entries = DatasetCatalog.get(cfg.DATASETS.TEST[0])[:number]
    items = [read_test_item(entry, cfg) for entry in entries]
    images = [read_image(entry["file_name"], "RGB") for entry in entries]
    # Each by itself: images of other sizes would be padded by one another.
    with inference_autocast(cfg):
        found = [model.inference([item])[0]["instances"].to("cpu") for item in items]
    truths = [[(a["bbox"], a["category_id"]) for a in entry["annotations"]] for entry in entries]
    predictions = draw_predictions(
        Path(folder) / "predictions.png", images, truths, found, class_names, score_thresh
    )
    busiest = max(range(len(entries)), key=lambda i: (len(truths[i]), len(found[i])))
    with inference_autocast(cfg):
        flow = draw_flow(
            Path(folder) / "flow.png", model, items[busiest], images[busiest], class_names, score_thresh
        )
    return [predictions, flow]
