"""Pictures of classifiers: curves of a training, and samples on their way from noise to their class.

Shapes: n samples, E embedding dimensions, K classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dfm_d2.visualize.pictures import class_color, plt, save_figure

Curve = Sequence[tuple[float, float]]


def draw_curves(path: str | Path, losses: Mapping[str, Curve], accuracies: Mapping[str, Curve]) -> Path:
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


def draw_class_flow(
    path: str | Path,
    states: np.ndarray,
    times: Sequence[float],
    labels: Sequence[int],
    embeddings: np.ndarray,
    class_names: Sequence[str],
) -> Path:
    """Paths of samples in a plane in which the embeddings lie around a circle, coloured by class.

    Args:
        states: `(len(times), n, E)`. labels: `(n,)`. embeddings: `(K, E)`, drawn as stars.
    """
    center = embeddings.mean(0)
    # Orthonormal embeddings have no directions of greatest variance.
    _, _, axes = np.linalg.svd(_on_a_circle(embeddings - center), full_matrices=False)
    project = lambda points: (points - center) @ axes[:2].T  # noqa: E731
    figure, panel = plt.subplots(figsize=(5.6, 5.2), layout="constrained")
    for index, label in enumerate(labels):
        line = project(states[:, index])
        panel.plot(*line.T, color=class_color(label), linewidth=0.9, alpha=0.7, marker=".", markersize=3)
    stars = project(embeddings)
    for label, (x, y) in enumerate(stars):
        color = class_color(label)
        panel.plot(x, y, marker="*", markersize=13, color=color, markeredgecolor="black", linestyle="")
        # Outwards, where no other star is, over the paths.
        right, up = np.array([x, y]) / max(np.hypot(x, y), 1e-9)
        panel.annotate(
            class_names[label],
            (x, y),
            textcoords="offset points",
            xytext=(10 * right, 12 * up),
            ha="left" if right > 0 else "right",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
        )
    steps = ", ".join(f"{t:.2g}" for t in times)
    panel.set_title(f"noise to class, t = {steps} (a plane of {embeddings.shape[1]} dimensions)", fontsize=8)
    return save_figure(figure, path)


def _on_a_circle(embeddings: np.ndarray) -> np.ndarray:
    """`(2, E)`: the two directions in which K embeddings lie evenly around a circle."""
    angles = 2 * np.pi * np.arange(len(embeddings)) / len(embeddings)
    return np.stack([np.cos(angles), np.sin(angles)]) @ embeddings
