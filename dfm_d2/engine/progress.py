"""How far an evaluation is."""

import logging
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import tqdm

from dfm_d2.framework import inference_on_dataset


@contextmanager
def evaluation_bar(
    loader: Collection[list[dict]], title: str, use_bar: bool | None = None
) -> Iterator[Collection[list[dict]]]:
    """Within it, what to give ``inference_on_dataset``: the batches, with a bar on a terminal.

    Elsewhere the loader itself: ``inference_on_dataset`` logs a line with the time left every few seconds,
    on both providers; these lines are held back while there is a bar.

    use_bar: None asks whether stderr is a terminal.
    """
    if not (sys.stderr.isatty() if use_bar is None else use_bar):
        yield loader
        return
    lines = logging.getLogger(inference_on_dataset.__module__)
    level = lines.level
    lines.setLevel(logging.WARNING)
    try:
        with tqdm.tqdm(loader, desc=title, unit="batch", dynamic_ncols=True, leave=False) as bar:
            yield bar
    finally:
        lines.setLevel(level)
