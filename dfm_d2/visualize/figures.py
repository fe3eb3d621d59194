"""What all figures share: matplotlib without a screen, the colours, and how they are saved."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # names of classes may have a $
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

_PALETTE = plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors
_PREDICTORS = plt.get_cmap("Set1").colors[:5] + plt.get_cmap("tab20b").colors[::4]


def class_color(index: int) -> tuple[float, float, float]:
    """The colour of a class, the same in every picture."""
    return _PALETTE[index % len(_PALETTE)]


def predictor_color(index: int) -> tuple[float, float, float]:
    """The colour of a predictor, the same in every picture."""
    return _PREDICTORS[index % len(_PREDICTORS)]


def save_figure(figure, path: str | Path) -> Path:
    """Write and close a figure; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
