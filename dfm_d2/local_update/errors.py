"""What stops a training."""

from collections.abc import Sequence


class NonFiniteLossError(FloatingPointError):
    """A loss or the gradient of a block is infinite or not a number.

    Raised before any parameter of the iteration is stepped, or where blocks are stepped one by one before the
    offending block is stepped: the blocks before it have been, in memory only.
    """

    def __init__(
        self,
        values: dict[str, float],
        iteration: int | None = None,
        image_ids: Sequence[object] = (),
        raised_by: object = None,
        advice: str = "",
    ):
        """
        values: the offending entries by their key, such as ``{"loss_cls/predictor0": nan}``.
        raised_by: the group of processes that all raise it, each knowing its own images; None: this alone.
        advice: what the user can do about it.
        """
        self.raised_by = raised_by
        self.values = dict(values)
        self.iteration = iteration
        self.image_ids = list(image_ids)
        what = ", ".join(f"{key} = {value}" for key, value in self.values.items())
        where = "" if iteration is None else f" at iteration {iteration}, image ids {self.image_ids}"
        super().__init__(f"Not finite{where}: {what}. {advice}".rstrip())

    def at(self, iteration: int, image_ids: Sequence[object], advice: str = "") -> "NonFiniteLossError":
        """The same error with the iteration and the images of its batch named."""
        return NonFiniteLossError(self.values, iteration, image_ids, advice=advice)
