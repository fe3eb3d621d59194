"""Sample streams. The item at a position is a pure function of (seed, position) and the files.

Position p of training shows image permutation(seed, p // n)[p % n], augmented by a generator keyed by
(seed, p); so a run that resumes at position p sees what it would have seen, whatever the number of workers.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dfm_d2.data.images import ImageError, limit_bytes
from dfm_d2.data.problems import DataProblemError
from dfm_d2.errors import UserError, input_errors
from dfm_d2.framework import CfgNode, comm

logger = logging.getLogger(__name__)

_ORDER_KEY, _AUGMENT_KEY = 1, 2  # keep the two random streams of a seed apart

# What crosses from a worker: the item, None where no image is left, or what the user has to put right (which
# DataLoader would raise with a traceback in its message); (file name, message) of each unreadable image.
Sample = tuple[dict | UserError | None, list[tuple[str, str]]]


def _first_good(entries: Iterable[dict], make: Callable[[dict], dict]) -> Sample:
    """The item of the first entry whose image can be read."""
    failures = []
    for entry in entries:
        try:
            with input_errors():
                return make(entry), failures
        except ImageError as error:
            failures.append((entry["file_name"], str(error)))
        except UserError as error:
            return error, failures
    return None, failures


class SampleStream(Dataset):
    """A training stream as a function of the position; see the head of this file.

    make: returns the model's input dict of an entry, augmented by the generator; raises ImageError.
    """

    def __init__(self, dicts: list[dict], seed: int, make: Callable[[dict, np.random.Generator], dict]):
        self._dicts, self._seed, self._make = dicts, seed, make

    def __getitem__(self, position: int) -> Sample:
        number, key = len(self._dicts), [self._seed, _AUGMENT_KEY, position]
        places = range(position, position + number)  # the next good one stands in for an unreadable one
        entries = (self._dicts[_permutation(number, self._seed, p // number)[p % number]] for p in places)
        return _first_good(entries, lambda entry: self._make(entry, np.random.default_rng(key)))


@lru_cache(maxsize=2)  # two: a batch may cross from one epoch to the next
def _permutation(number: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER_KEY, epoch]).permutation(number)


def train_batches(stream: SampleStream, cfg: CfgNode, start_position: int) -> Iterator[list[dict]]:
    """The endless batches of a stream from a position on, this rank's share of each.

    Raises UserError for a batch size that the ranks cannot share.
    """
    batch, world = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch < 1 or batch % world:
        raise UserError(f"SOLVER.IMS_PER_BATCH is {batch}: it must be a positive multiple of {world}.")
    share = batch // world
    first = start_position + comm.get_rank() * share
    positions = (range(start, start + share) for start in itertools.count(first, batch))
    loader = DataLoader(stream, batch_sampler=positions, **_worker_options(cfg))
    return _good_items(loader, cfg.DATASETS.ON_ERROR, training=True)


class TestLoader(DataLoader):
    """Batches of a set in order, with a length, as Detectron2's inference_on_dataset wants it.

    make: returns the model's input dict of an entry; raises ImageError. Each rank gets a contiguous share.
    """

    __test__ = False  # pytest: not a test

    def __init__(self, dicts: list[dict], make: Callable[[dict], dict], cfg: CfgNode) -> None:
        size, self._on_error = cfg.TEST.BATCH_SIZE, cfg.DATASETS.ON_ERROR
        share = np.array_split(np.arange(len(dicts)), comm.get_world_size())[comm.get_rank()].tolist()
        batches = [share[start : start + size] for start in range(0, len(share), size)]
        super().__init__(dicts, batch_sampler=batches, **_worker_options(cfg, partial(_samples, make)))

    def __iter__(self) -> Iterator[list[dict]]:
        return _good_items(super().__iter__(), self._on_error, training=False)


def _samples(make: Callable[[dict], dict], entries: list[dict]) -> list[Sample]:
    return [_first_good([entry], make) for entry in entries]


def _worker_options(cfg: CfgNode, collate: Callable[[list], list[Sample]] = list) -> dict:
    return {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "collate_fn": collate,
        "worker_init_fn": partial(_start_worker, cfg.DATASETS.MAX_BYTES),
        # DataLoader draws a seed for its workers: not from the global generator, which a checkpoint keeps.
        "generator": torch.Generator().manual_seed(0),
    }


def _start_worker(most_bytes: int, _worker: int) -> None:
    import cv2

    limit_bytes(most_bytes)
    if hasattr(os, "setpgrp"):  # Ctrl-C is for the main process, which finishes its step and ends its workers
        os.setpgrp()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _good_items(batches: Iterable[list[Sample]], on_error: str, training: bool) -> Iterator[list[dict]]:
    """The batches without what failed; each failure is reported once, in this process."""
    reported = set()
    for samples in batches:
        for file_name, message in itertools.chain.from_iterable(failures for _, failures in samples):
            if on_error == "fatal":
                raise DataProblemError(
                    f'{message}: repair the file, or set DATASETS.ON_ERROR to "skip" to go on without it.'
                )
            if file_name not in reported:
                reported.add(file_name)
                logger.warning("%s: left out (%d unreadable images so far)", message, len(reported))
        items = [item for item, _ in samples if item is not None]
        error = next((item for item in items if isinstance(item, UserError)), None)
        if error is not None:
            raise error
        if items:
            yield items
        elif training:
            raise DataProblemError(
                "Not one training image can be decoded: check the files of DATASETS.TRAIN."
            )
