"""Sample streams. The item at a position is a pure function of (seed, position) and the files.

Position p of training shows image permutation(seed, p // n)[p % n], augmented by a generator keyed by
(seed, p); so a run that resumes at position p sees what it would have seen, whatever the number of workers.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dfm_d2.data.images import ImageError
from dfm_d2.data.problems import DataProblemError, check_on_error
from dfm_d2.framework import CfgNode, comm

logger = logging.getLogger(__name__)

_ORDER_KEY, _AUGMENT_KEY = 1, 2  # keep the two random streams of a seed apart


@dataclass
class _Sample:
    """What crosses from a worker: the item, or None, and the images that could not be read on the way."""

    item: dict | None
    failures: list[tuple[str, str]]


def train_batches(dataset: "SampleStream", cfg: CfgNode, start_position: int) -> Iterator[list[dict]]:
    """The endless batches of a stream from a position on."""
    batch, world = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch < 1 or batch % world:
        raise ValueError(f"SOLVER.IMS_PER_BATCH is {batch}: it must be a positive multiple of {world}.")
    share = batch // world
    positions = _PositionBatches(start_position + comm.get_rank() * share, share, batch)
    loader = DataLoader(dataset, batch_sampler=positions, **_worker_options(cfg))
    return _good_items(loader, cfg.DATASETS.ON_ERROR)


def ordered_loader(dataset: "TestImages", number: int, cfg: CfgNode) -> "TestLoader":
    """The share of this rank of a data set of `number` images."""
    if cfg.TEST.BATCH_SIZE < 1:
        raise ValueError(f"TEST.BATCH_SIZE is {cfg.TEST.BATCH_SIZE}: it must be at least 1.")
    indices = np.array_split(np.arange(number), comm.get_world_size())[comm.get_rank()].tolist()
    size = cfg.TEST.BATCH_SIZE
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    loader = DataLoader(dataset, batch_sampler=batches, **_worker_options(cfg))
    return TestLoader(loader, len(batches), cfg.DATASETS.ON_ERROR)


class TestLoader:
    """Iterable of list[dict] with a length, as Detectron2's inference_on_dataset wants it."""

    __test__ = False  # pytest: not a test

    def __init__(self, loader: DataLoader, length: int, on_error: str) -> None:
        self._loader, self._length, self._on_error = loader, length, check_on_error(on_error)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[dict]]:
        return _good_items(self._loader, self._on_error)


class SampleStream(Dataset):
    """A training stream as a function of the position; see the head of this file."""

    def __init__(self, dicts: list[dict], seed: int) -> None:
        self._dicts, self._seed = dicts, seed

    def read(self, entry: dict) -> np.ndarray:
        """The pixels of an entry; raises ImageError."""
        raise NotImplementedError

    def make(self, entry: dict, image: np.ndarray, rng: np.random.Generator) -> dict:
        """The model's input dict, augmented by `rng`."""
        raise NotImplementedError

    def __getitem__(self, position: int) -> _Sample:
        failures = []
        for offset in range(len(self._dicts)):
            entry = self._dicts[self.index_at(position + offset)]
            try:
                image = self.read(entry)
            except ImageError as error:
                failures.append((entry["file_name"], str(error)))
                continue
            rng = np.random.default_rng([self._seed, _AUGMENT_KEY, position])
            return _Sample(self.make(entry, image, rng), failures)
        return _Sample(None, failures)

    def index_at(self, position: int) -> int:
        """Index of the image that the order puts at this position."""
        epoch, place = divmod(position, len(self._dicts))
        return int(_permutation(len(self._dicts), self._seed, epoch)[place])


class TestImages(Dataset):
    """The images of a set in order; `make_item` answers the model's input dict of an entry."""

    __test__ = False  # pytest: not a test

    def __init__(self, dicts: list[dict], make_item: Callable[[dict], dict]) -> None:
        self._dicts, self._make_item = dicts, make_item

    def __getitem__(self, index: int) -> _Sample:
        entry = self._dicts[index]
        try:
            return _Sample(self._make_item(entry), [])
        except ImageError as error:
            return _Sample(None, [(entry["file_name"], str(error))])


class _PositionBatches:
    """Endless batches of `share` positions from `start`, `stride` apart."""

    def __init__(self, start: int, share: int, stride: int) -> None:
        self._start, self._share, self._stride = start, share, stride

    def __iter__(self) -> Iterator[list[int]]:
        position = self._start
        while True:
            yield list(range(position, position + self._share))
            position += self._stride


@functools.lru_cache(maxsize=2)  # two: a batch may cross from one epoch to the next
def _permutation(number: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER_KEY, epoch]).permutation(number)


def _worker_options(cfg: CfgNode) -> dict:
    return {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "collate_fn": _as_is,
        "worker_init_fn": _start_worker,
        # DataLoader draws a seed for its workers: not from the global generator, which a checkpoint keeps.
        "generator": torch.Generator().manual_seed(0),
    }


def _as_is(samples: list[_Sample]) -> list[_Sample]:
    return samples


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _good_items(loader: DataLoader, on_error: str) -> Iterator[list[dict]]:
    """The batches of a loader without what failed; each failure is reported once, in this process."""
    check_on_error(on_error)
    reported = set()
    for samples in loader:
        for file_name, message in (failure for sample in samples for failure in sample.failures):
            if on_error == "fatal":
                raise DataProblemError(
                    f'{message}: repair the file, or set DATASETS.ON_ERROR to "skip" to go on without it.'
                )
            if file_name not in reported:
                reported.add(file_name)
                logger.warning("%s: left out (%d unreadable images so far)", message, len(reported))
        items = [sample.item for sample in samples if sample.item is not None]
        if items:
            yield items
        elif isinstance(loader.dataset, SampleStream):
            raise DataProblemError(
                "Not one training image can be decoded: check the files of DATASETS.TRAIN."
            )
