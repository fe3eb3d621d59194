"""Samples of a classifier on their way from noise to their class.

Shapes: n samples, E embedding dimensions, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dfm_d2.visualize.figures import class_color, plt, save_figure


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
    angles = 2 * np.pi * np.arange(len(embeddings)) / len(embeddings)
    # Orthonormal embeddings have no directions of greatest variance: a plane in which they lie evenly around
    # a circle.
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
