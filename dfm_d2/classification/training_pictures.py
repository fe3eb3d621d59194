"""curves.png and flow.png of a classifier's training."""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dfm_d2.classification.data.loader import class_item
from dfm_d2.classification.flow_classifier import FlowClassifier
from dfm_d2.classification.task import CLASSIFICATION
from dfm_d2.data.images import ImageError
from dfm_d2.engine.hooks import loss_by_block
from dfm_d2.engine.metrics import METRICS_FILE, read_metrics
from dfm_d2.engine.run import load_final
from dfm_d2.flow import ODESolver, endpoint_step_function, warped_grid
from dfm_d2.framework import CfgNode, DatasetCatalog
from dfm_d2.visualize.curves import draw_class_curves, draw_class_flow

_SAMPLES, _STEPS = 40, 8  # test images whose flow is drawn, in as many steps


def write_class_pictures(cfg: CfgNode, class_names: Sequence[str]) -> list[Path]:
    """Draw the metrics in `OUTPUT_DIR`, and the flow of a FlowClassifier's `model_final.pth`. The paths."""
    folder = Path(cfg.OUTPUT_DIR)
    written = [draw_class_curves(folder / "curves.png", *_curves(cfg, read_metrics(folder / METRICS_FILE)))]
    if cfg.MODEL.META_ARCHITECTURE == "FlowClassifier" and cfg.DATASETS.TEST:
        model = load_final(CLASSIFICATION, cfg, class_names)
        written += _write_flow(cfg, model, class_names, folder / "flow.png")
    return written


def _curves(cfg: CfgNode, lines: list[dict]) -> tuple[dict, dict]:
    """Losses of the blocks and accuracies, {name: [(epoch, value)]}."""
    images = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN)
    losses, accuracies = defaultdict(list), defaultdict(list)
    for line in lines:
        # The line of the last evaluation has the iteration that would come next.
        epoch = min(line["iteration"] + 1, cfg.SOLVER.MAX_ITER) * cfg.SOLVER.IMS_PER_BATCH / images
        for block, value in loss_by_block(line).items():
            losses[block].append((epoch, value))
        for key in (key for key in line if key.startswith("right/")):
            accuracies[f"train, {key.removeprefix('right/')}"].append((epoch, 100 * line[key]))
        if "accuracy" in line:
            accuracies["test"].append((epoch, line["accuracy"]))
    return losses, accuracies


@torch.no_grad()
def _write_flow(cfg: CfgNode, model: FlowClassifier, class_names: Sequence[str], path: Path) -> list[Path]:
    entries, items = DatasetCatalog.get(cfg.DATASETS.TEST[0]), []
    # Spread over the set, which may be sorted by class.
    for i in np.linspace(0, len(entries) - 1, min(_SAMPLES, len(entries))).astype(int):
        with contextlib.suppress(ImageError):  # the evaluation has named it
            items.append(class_item(entries[i], cfg))
    if not items:
        return []
    # Inference takes one step; the picture shows what lies between, of one noise sample.
    x_0 = model.sampler.noise([item["image_id"] for item in items], model.label_space)[:, :1]
    pooled = model.backbone(model.normalised(items))
    step_function = endpoint_step_function(partial(model.mean_endpoint, pooled))
    trajectory = ODESolver.sample(step_function, x_0, warped_grid(_STEPS), return_intermediates=True)
    states = torch.stack(trajectory.states)[:, :, 0].cpu().numpy()
    embeddings = model.label_space.embeddings.detach().cpu().numpy()
    labels = [item["label"] for item in items]
    return [draw_class_flow(path, states, trajectory.times, labels, embeddings, class_names)]
