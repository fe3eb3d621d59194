"""Curves of a training run, and samples of a classifier on their way from noise to their class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfm_d2.errors import UserError
from dfm_d2.visualize.figures import class_color, plt, predictor_color, save_figure

# Keys of evaluations, where they are there.
_SCORES = ("bbox/AP50", "bbox/AP", "accuracy")

Curve = Sequence[tuple[float, float]]


def draw_curves(path: str | Path, entries: Sequence[Mapping[str, Any]]) -> Path:
    """Losses of every block, the learning rate, and AP, each against the iteration.

    entries: lines of a metrics.json. Returns the path written. Raises UserError where none has an iteration.
    """
    entries = [entry for entry in entries if "iteration" in entry]
    if not entries:
        raise UserError("the metrics hold no iteration yet: train first")
    keys = sorted({key for entry in entries for key in entry})

    def curve(key: str) -> Curve:
        return [(entry["iteration"], entry[key]) for entry in entries if entry.get(key) is not None]

    panels = {}
    for kind in sorted({key.split("/")[0] for key in keys if key.startswith("loss_") and "/" in key}):
        of_kind = [key for key in keys if key.startswith(f"{kind}/")]
        panels[kind.replace("_", " ")] = {key.rsplit("/", 1)[-1]: curve(key) for key in of_kind}
    scores = [key for key in _SCORES if key in keys]
    title = "accuracy" if scores == ["accuracy"] else "AP"
    panels[title] = {key.removeprefix("bbox/"): curve(key) for key in scores}
    if "lr" in keys:
        panels["learning rate"] = {"lr": curve("lr")}
    return _draw(path, panels, "iteration", (3.3 * len(panels), 2.8))


def draw_class_curves(path: str | Path, losses: Mapping[str, Curve], accuracies: Mapping[str, Curve]) -> Path:
    """Losses (left) and accuracies in percent (right) against epochs; curves of (epoch, value) by name."""
    return _draw(path, {"loss of each block": losses, "accuracy (%)": accuracies}, "epoch", (9, 3.4))


def _draw(
    path: str | Path, panels: Mapping[str, Mapping[str, Curve]], unit: str, size: tuple[float, float]
) -> Path:
    """panels: {title: {name of a curve: its points}}, side by side. unit: of the horizontal axis."""
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for panel, (title, curves) in zip(axes[0], panels.items()):
        for number, (name, points) in enumerate(curves.items()):
            style = {"color": predictor_color(number), "marker": "." if len(points) < 30 else ""}
            panel.plot(*zip(*points), label=name, linewidth=1.2, **style)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(unit, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        if curves:
            panel.legend(fontsize=7, frameon=False)
        else:
            panel.text(0.5, 0.5, "no evaluation yet", ha="center", transform=panel.transAxes, fontsize=8)
    return save_figure(figure, path)


def draw_class_flow(
    path: str | Path,
    states: np.ndarray,
    times: Sequence[float],
    labels: Sequence[int],
    embeddings: np.ndarray,
    class_names: Sequence[str],
) -> Path:
    """Paths of samples in a plane in which the embeddings lie around a circle, coloured by class.

    states: `(len(times), n, E)` of n samples. labels: `(n,)`. embeddings: `(K, E)`, drawn as stars.
    """
    center = embeddings.mean(0)
    angles = 2 * np.pi * np.arange(len(embeddings)) / len(embeddings)
    # Orthonormal embeddings have no directions of greatest variance: a plane where they lie around a circle.
    circle = np.stack([np.cos(angles), np.sin(angles)]) @ (embeddings - center)
    plane = np.linalg.svd(circle, full_matrices=False)[2][:2].T
    figure, panel = plt.subplots(figsize=(5.6, 5.2), layout="constrained")
    for index, label in enumerate(labels):
        line = (states[:, index] - center) @ plane
        panel.plot(*line.T, color=class_color(label), linewidth=0.9, alpha=0.7, marker=".", markersize=3)
    for label, (x, y) in enumerate((embeddings - center) @ plane):
        color = class_color(label)
        panel.plot(x, y, marker="*", markersize=13, color=color, markeredgecolor="black", linestyle="")
        # Outwards, where no other star is, over the paths.
        right, up = np.array([x, y]) / max(np.hypot(x, y), 1e-9)
        style = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
        place = {"textcoords": "offset points", "xytext": (10 * right, 12 * up), "va": "center"}
        side = "left" if right > 0 else "right"
        panel.annotate(class_names[label], (x, y), **place, ha=side, fontsize=7, bbox=style)
    steps = ", ".join(f"{t:.2g}" for t in times)
    panel.set_title(f"noise to class, t = {steps} (a plane of {embeddings.shape[1]} dimensions)", fontsize=8)
    return save_figure(figure, path)
