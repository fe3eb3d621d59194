"""Pictures of a detector: predictions, and the flow as strip and page; of a data set or of files.

Shapes: N proposals, K solver steps, M field points.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dfm_d2.data.files import paths_by_stem
from dfm_d2.data.images import read_image
from dfm_d2.detection.data.loader import read_test_item
from dfm_d2.detection.detector import FlowDetector
from dfm_d2.detection.sampler import Flow
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.flow import Trajectory
from dfm_d2.framework import CfgNode, DatasetCatalog
from dfm_d2.visualize import KINDS
from dfm_d2.visualize.boxes import draw_flow, draw_predictions
from dfm_d2.visualize.page import write_page
from dfm_d2.visualize.record import Answer, FlowRecord

# Points of the velocity field along the longer side of an image.
_FIELD_POINTS = 12


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

    predictions: predictions.png of all. strip: flow.png of the one with the most objects among them.
    html: a page of each file in `image_files`, or else of that one.

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
    for index in sorted({*pages, *([busiest] if "strip" in kinds else [])}):
        with inference_autocast(cfg):
            record = record_flow(model, items[index], with_field=index in pages)
        if index == busiest and "strip" in kinds:
            path = folder / "flow.png"
            paths.append(draw_flow(path, record, images[index], class_names, score_thresh, color_by))
        if index in pages:
            name = Path(entries[index]["file_name"]).name
            paths.append(write_page(page_files[index], record, images[index], class_names, name))
    return paths


@torch.no_grad()
def record_flow(model: FlowDetector, item: dict, with_field: bool = True) -> FlowRecord:
    """Run one image and keep everything.

    Args:
        item: the model's input dict; height and width are those of the original image.
        with_field: also the velocity field of the box that ends with the greatest score: its centre is put on
            a grid of places, one after another, while all other boxes stay where they are.
    """
    trajectory, image_sizes = model.trajectory([item])
    flow, _ = model.field([item])
    height, width = image_sizes[0].tolist()
    scale = torch.tensor([item.get("width", width) / width, item.get("height", height) / height] * 2)

    def pixels(x: Tensor) -> Tensor:
        return model.space.decode(x, image_sizes)[0].cpu() * scale

    steps = range(len(trajectory.steps))
    scores, classes = zip(*(step.info.class_probs[0].cpu().max(-1) for step in trajectory.steps))
    followed = int(scores[-1].argmax()) if with_field else -1
    points = _grid(height, width) if with_field else torch.zeros(0, 2)
    return FlowRecord(
        times=trajectory.times,
        states=[pixels(x) for x in trajectory.states],
        answers=[list(_answers(model, flow, image_sizes, trajectory, k, pixels)) for k in steps],
        classes=list(classes),
        scores=list(scores),
        detections=model.inference([item])[0]["instances"].to("cpu"),
        followed=followed,
        field_points=points * scale[:2],
        field=[
            _field(model, flow, image_sizes, trajectory, k, followed, points.to(model.device)) * scale[:2]
            for k in (steps if with_field else [])
        ],
    )


def _answers(
    model: FlowDetector,
    flow: Flow,
    image_sizes: Tensor,
    trajectory: Trajectory,
    k: int,
    pixels: Callable[[Tensor], Tensor],
) -> Iterator[Answer]:
    """What each predictor answers by itself in step `k`."""
    x_t, t, t_next = trajectory.states[k], trajectory.times[k], trajectory.times[k + 1]
    boxes_xyxy = model.space.proposals(x_t, image_sizes)
    # The heads of a cascade answer one after another: what leaves is the last one's.
    indices = model.predictors.answering(t, model.sampler.settings.predictors) if model.is_local else [-1]
    settings = model.sampler.settings
    try:
        for index in indices:
            if len(indices) > 1:
                model.sampler.settings = replace(settings, predictors=(index,))
            update = flow(x_t, boxes_xyxy, t, t_next)
            score, label = update.class_probs[0].cpu().max(-1)
            yield Answer(index % model.num_predictors, pixels(update.x_1_hat), label, score)
    finally:
        model.sampler.settings = settings


def _grid(height: float, width: float) -> Tensor:
    """Centres `(M, 2)` of even cells of the image as the network sees it."""
    step = max(height, width) / _FIELD_POINTS
    rows, columns = max(round(height / step), 1), max(round(width / step), 1)
    y = (torch.arange(rows) + 0.5) * height / rows
    x = (torch.arange(columns) + 0.5) * width / columns
    return torch.cartesian_prod(y, x).flip(1)


def _field(
    model: FlowDetector,
    flow: Flow,
    image_sizes: Tensor,
    trajectory: Trajectory,
    k: int,
    box: int,
    points: Tensor,
) -> Tensor:
    """`(M, 2)` pixels of the network's image from each point to the centre of the endpoint found there."""
    t, t_next = trajectory.times[k], trajectory.times[k + 1]
    sides = model.space.decode(trajectory.states[k], image_sizes)[0, box]
    half = (sides[2:] - sides[:2]).abs() / 2
    moved = []
    for point in points:
        x_t = trajectory.states[k].clone()
        there = torch.cat([point - half, point + half])
        x_t[0, box] = model.space.encode(there[None, None], image_sizes)[0, 0]
        end = flow(x_t, model.space.proposals(x_t, image_sizes), t, t_next).x_1_hat
        corners = model.space.decode(end, image_sizes)[0, box]
        moved.append((corners[:2] + corners[2:]) / 2 - point)
    return torch.stack(moved).cpu()
