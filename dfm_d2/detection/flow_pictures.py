"""Pictures of a detector: predictions, and the flow as strip and page; of a data set or of files.

Shapes: N proposals, K solver steps, M field points.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from dfm_kernels.box_flow_update import BoxFlowUpdate
from torch import Tensor

from dfm_d2.data.files import paths_by_stem
from dfm_d2.data.images import read_image
from dfm_d2.detection.data.loader import read_test_item
from dfm_d2.detection.data.registration import ROOT_PREFIX
from dfm_d2.detection.detector import FlowDetector
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.engine.run import load_final
from dfm_d2.framework import CfgNode, DatasetCatalog
from dfm_d2.visualize.boxes import Answer, FlowRecord, draw_flow, draw_predictions
from dfm_d2.visualize.page import write_page

_FIELD_POINTS = 12  # of the velocity field, along the longer side of an image


def write_root_pictures(cfg: CfgNode, class_names: Sequence[str]) -> list[Path]:
    """`write_pictures` into OUTPUT_DIR of a training on DATASETS.ROOT, with the threshold that it found."""
    tests = cfg.DATASETS.TEST
    if not tests or not tests[0].startswith(ROOT_PREFIX) or not DatasetCatalog.get(tests[0]):
        return []
    model = load_final(DETECTION, cfg, class_names)
    shown = {"score_thresh": float(model.threshold)} if model.threshold > 0 else {}
    return write_pictures(cfg, model, class_names, cfg.OUTPUT_DIR, **shown)


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
    """Write pictures of the first `number` images of the first set in DATASETS.TEST, or of all `image_files`.

    predictions.png shows all, flow.png the one with the most objects among them. An HTML page shows the flow
    of each file, or else of that one. Returns the paths. Raises ImageError for a file that cannot be read.
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
    path = folder / "predictions.png"
    paths = [draw_predictions(path, images, truths, found, class_names, score_thresh)]
    busiest = max(range(len(entries)), key=lambda i: (len(truths[i]), len(found[i])))
    page_files = paths_by_stem([entry["file_name"] for entry in entries], folder, ".html")
    for index in range(len(entries)) if image_files else [busiest]:
        with inference_autocast(cfg):
            record = record_flow(model, items[index])
        if index == busiest:
            paths.append(draw_flow(folder / "flow.png", record, images[index], class_names, score_thresh))
        name = Path(entries[index]["file_name"]).name
        paths.append(write_page(page_files[index], record, images[index], class_names, name))
    return paths


@torch.no_grad()
def record_flow(model: FlowDetector, item: dict) -> FlowRecord:
    """Run one image and keep everything, and the velocity field of the box that ends with the greatest score:
    its centre is put on a grid of places, one after another, while all other boxes stay where they are.

    item: the model's input dict; height and width are those of the original image.
    """
    run = FlowRun(model, item)
    steps, points = run.trajectory.steps, run.grid()
    scores, classes = zip(*(model.calibrated(step.class_probs[0]).cpu().max(-1) for step in steps))
    followed = int(scores[-1].argmax())
    return FlowRecord(
        times=run.trajectory.times,
        states=[run.pixels(x) for x in run.trajectory.states],
        answers=[list(run.answers(k)) for k in range(len(steps))],
        classes=list(classes),
        scores=list(scores),
        detections=model.inference([item])[0]["instances"].to("cpu"),
        followed=followed,
        field_points=points * run.scale[:2],
        field=[run.field(k, followed, points) * run.scale[:2] for k in range(len(steps))],
    )


class FlowRun:
    """The flow of one image, and what is asked of the model along it.

    trajectory: states and steps. image_sizes: `(1, 2)` as the network sees it. scale: `(4,)` from there to
    pixels of the original image.
    """

    def __init__(self, model: FlowDetector, item: dict):
        self.model = model
        self.trajectory, self.image_sizes, self._step_function = model.trajectory([item])
        height, width = self.image_sizes[0].tolist()
        self.scale = torch.tensor([item.get("width", width) / width, item.get("height", height) / height] * 2)

    def pixels(self, x: Tensor) -> Tensor:
        """Boxes `(N, 4)` of the original image, of a state."""
        return self.model.space.decode(x, self.image_sizes)[0].cpu() * self.scale

    def step(self, k: int, x_t: Tensor) -> BoxFlowUpdate:
        """What the predictors of step `k` answer to `x_t` `(1, N, 4)`."""
        return self._step_function(x_t, *self.trajectory.times[k : k + 2])

    def answers(self, k: int) -> Iterator[Answer]:
        """What each predictor answers by itself in step `k`."""
        model, settings, indices = self.model, self.model.sampler.settings, [-1]
        stack = model.predictors
        if model.is_local:  # else the heads answer one after another: what leaves is the last one's
            indices = stack.answering(self.trajectory.times[k], settings.members)
        try:
            for index in indices:
                if len(indices) > 1:
                    model.sampler.settings = replace(settings, members=(index % stack.num_members,))
                update = self.step(k, self.trajectory.states[k])
                score, label = model.calibrated(update.class_probs[0]).cpu().max(-1)
                yield Answer(index % model.num_predictors, self.pixels(update.x_1_hat), label, score)
        finally:
            model.sampler.settings = settings

    def grid(self) -> Tensor:
        """Centres `(M, 2)` of even cells of the image as the network sees it."""
        height, width = self.image_sizes[0].tolist()
        step = max(height, width) / _FIELD_POINTS
        rows, columns = max(round(height / step), 1), max(round(width / step), 1)
        y = (torch.arange(rows) + 0.5) * height / rows
        x = (torch.arange(columns) + 0.5) * width / columns
        return torch.cartesian_prod(y, x).flip(1)

    def field(self, k: int, box: int, points: Tensor) -> Tensor:
        """`(M, 2)` pixels, as the network sees them, from each point to the endpoint of a box put there."""
        space, state, moved = self.model.space, self.trajectory.states[k], []
        corners = space.decode(state, self.image_sizes)[0, box]
        half = (corners[2:] - corners[:2]).abs() / 2
        for point in points.to(state.device):
            x_t = state.clone()
            there = torch.cat([point - half, point + half])
            x_t[0, box] = space.encode(there[None, None], self.image_sizes)[0, 0]
            corners = space.decode(self.step(k, x_t).x_1_hat, self.image_sizes)[0, box]
            moved.append((corners[:2] + corners[2:]) / 2 - point)
        return torch.stack(moved).cpu()
