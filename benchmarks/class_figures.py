"""Pictures of the rows of classifiers: one panel a question, one line a method, seeds as a band."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rows import Row

# Of a method: x, then the quantiles p20, p50, p80.
Line = Sequence[tuple[float, float, float, float]]


def line_of(rows: Sequence[Row]) -> Line:
    """The points of rows whose x is a number, in its order."""
    return sorted((float(row.x_value), row.p20, row.p50, row.p80) for row in rows)


def draw_panels(path: Path, title: str, panels: Mapping[str, tuple[str, Mapping[str, Line]]]) -> Path:
    """Accuracies in percent.

    Args:
        panels: {title of the panel: (label of its x axis, {method: line})}; a method has one colour in all.
    """
    from matplotlib.ticker import MaxNLocator

    from dfm_d2.visualize.figures import plt, save_figure

    names = list(dict.fromkeys(name for _, lines in panels.values() for name in lines))
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(2.2 + 2.8 * len(panels), 3.8),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, (question, (x_label, lines)) in zip(axes[0], panels.items()):
        for name, points in lines.items():
            x, low, middle, high = zip(*points)
            axis.plot(x, middle, color=colours[name], marker="o", markersize=3.5, linewidth=1.3, label=name)
            axis.fill_between(x, low, high, color=colours[name], alpha=0.15, linewidth=0)
        axis.set_xlabel(x_label)
        axis.set_title(question, fontsize=9)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel("accuracy (%)")
    handles = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(names), 6), fontsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, path)
