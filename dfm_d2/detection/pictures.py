"""Pictures of a model: predictions, the flow as strip, animation and page; from a data set or image files."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dfm_d2.data.files import paths_by_stem
from dfm_d2.data.images import read_image
from dfm_d2.detection.data.loader import read_test_item
from dfm_d2.detection.detector import FlowDetector
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.framework import CfgNode, DatasetCatalog
from dfm_d2.visualize import draw_flow, draw_predictions, record_flow, write_gif, write_page

# What write_pictures can write.
KINDS = ("predictions", "strip", "gif", "html")


@torch.no_grad()
def write_pictures(
    cfg: CfgNode,
    model: FlowDetector,
    class_names: Sequence[str],
    folder: str | Path,
    image_files: Sequence[str] = (),
    number: int = 6,
    score_thresh: float = 0.3,
    kinds: Sequence[str] = KINDS,
    color_by: str = "class",
) -> list[Path]:
    """Write pictures of `number` images.

    predictions: predictions.png of all. strip, gif: flow.png and flow.gif of the one with the most objects
    among them. html: a page of each file in `image_files`, or else of that one.

    Args:
        image_files: draw these; empty: the first images of the first set in DATASETS.TEST.
        kinds: some of KINDS. color_by: of the strip, "class" or "predictor".

    Returns:
        The paths.

    Raises:
        ImageError: a file that cannot be read.
    """
    folder = Path(folder)
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
    paths = []
    if "predictions" in kinds:
        path = folder / "predictions.png"
        paths.append(draw_predictions(path, images, truths, found, class_names, score_thresh))
    busiest = max(range(len(entries)), key=lambda i: (len(truths[i]), len(found[i])))
    pages = (range(len(entries)) if image_files else [busiest]) if "html" in kinds else []
    page_files = paths_by_stem([entry["file_name"] for entry in entries], folder, ".html")
    of_flow = {"strip", "gif"} & set(kinds)
    for index in sorted({*pages, *([busiest] if of_flow else [])}):
        with inference_autocast(cfg):
            record = record_flow(model, items[index], with_field=index in pages)
        if index == busiest and "strip" in kinds:
            path = folder / "flow.png"
            paths.append(draw_flow(path, record, images[index], class_names, score_thresh, color_by))
        if index == busiest and "gif" in kinds:
            paths.append(write_gif(folder / "flow.gif", record, images[index], score_thresh))
        if index in pages:
            name = Path(entries[index]["file_name"]).name
            paths.append(write_page(page_files[index], record, images[index], class_names, name))
    return paths
