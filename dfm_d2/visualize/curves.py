"""Curves of a training run: losses of every block, and what evaluations measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfm_d2.errors import UserError
from dfm_d2.visualize.figures import plt, predictor_color, save_figure

# Keys of evaluations, where they are there.
_SCORES = ("bbox/AP50", "bbox/AP", "bbox_ema/AP50", "bbox_ema/AP", "accuracy")

Curve = Sequence[tuple[float, float]]


def draw_curves(path: str | Path, entries: Sequence[Mapping[str, Any]]) -> Path:
    """Losses of every block, the learning rate, and AP, each against the iteration.

    Args:
        entries: lines of a metrics.json.

    Returns:
        The path written.

    Raises:
        UserError: no line has an iteration.
    """
    entries = [entry for entry in entries if "iteration" in entry]
    if not entries:
        raise UserError("the metrics hold no iteration yet: train first")
    keys = sorted({key for entry in entries for key in entry})
    kinds = sorted({key.split("/")[0] for key in keys if key.startswith("loss_") and "/" in key})
    panels = [(kind.replace("_", " "), [k for k in keys if k.startswith(f"{kind}/")]) for kind in kinds]
    scores = [key for key in _SCORES if key in keys]
    panels += [("accuracy" if scores == ["accuracy"] else "AP", scores)]
    panels += [("learning rate", ["lr"])] * ("lr" in keys)
    size = (3.3 * len(panels), 2.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for panel, (title, names) in zip(axes[0], panels):
        for number, key in enumerate(names):
            points = [(entry["iteration"], entry[key]) for entry in entries if entry.get(key) is not None]
            style, label = "o-" if names == scores else "-", key.rsplit("/", 1)[-1]
            panel.plot(*zip(*points), style, color=predictor_color(number), lw=1.2, ms=3.5, label=label)
        panel.set_title(title, fontsize=9)
        panel.set_xlim(0, 1.03 * max(entry["iteration"] for entry in entries))
        panel.set_xlabel("iteration", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        if names == scores:
            panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
        if names and names != ["lr"]:
            # Losses fall and scores rise: the other corner is free.
            corner = "lower right" if names == scores else "upper right"
            panel.legend(fontsize=7, frameon=False, loc=corner)
        if not names:
            panel.text(0.5, 0.5, "no evaluation yet", ha="center", transform=panel.transAxes, fontsize=8)
    return save_figure(figure, path)


def draw_class_curves(path: str | Path, losses: Mapping[str, Curve], accuracies: Mapping[str, Curve]) -> Path:
    """Losses (left) and accuracies in percent (right) against epochs; curves of (epoch, value) by name."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, curves, title in zip(axes, (losses, accuracies), ("loss of each block", "accuracy (%)")):
        for name, points in curves.items():
            panel.plot(*zip(*points), label=name, linewidth=1.2, marker="." if len(points) < 30 else "")
        panel.set_xlabel("epoch")
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3)
        if curves:
            panel.legend(fontsize=7)
    return save_figure(figure, path)
