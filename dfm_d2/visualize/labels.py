"""Labels of boxes where they can be read: inside of their picture, none on top of another."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

# Places to try, in heights of the label from where it is (above its box): inside, then further up and down.
_SHIFTS = (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5)


def place_labels(figure: Figure) -> None:
    """Shift the texts of every panel; those that were drawn first keep their places if they can.

    A label for which there is no room stays where it is.
    """
    figure.draw_without_rendering()  # sizes are known only then
    for panel in figure.axes:
        taken: list[Bbox] = []
        for text in panel.texts:
            taken.append(_place(panel, text, taken))


def _place(panel: Axes, text: Text, taken: list[Bbox]) -> Bbox:
    """Move one label; returns what it covers, in pixels of the figure."""
    patch, picture = text.get_bbox_patch(), panel.get_window_extent()
    label = (patch or text).get_window_extent()
    # To the left where it would leave the picture.
    x = label.x0 + min(picture.x1 - label.x1, 0)
    for shift in _SHIFTS:
        covered = Bbox.from_bounds(x, label.y0 + shift * label.height, label.width, label.height)
        inside = covered.y0 >= picture.y0 - 0.5 and covered.y1 <= picture.y1 + 0.5
        if inside and not any(_overlap(covered, other) for other in taken):
            anchor = panel.transData.transform(text.get_position())
            moved = anchor + (covered.x0 - label.x0, covered.y0 - label.y0)
            text.set_position(panel.transData.inverted().transform(moved))
            return covered
    return label


def _overlap(a: Bbox, b: Bbox) -> bool:
    # Less than half a pixel is rounding.
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5
