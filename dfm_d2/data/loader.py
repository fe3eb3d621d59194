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

from dfm_d2.data.augment import AugmentConfig, augment, resize_shortest_edge
from dfm_d2.data.images import ImageError, read_image
from dfm_d2.data.problems import DataProblemError, check_on_error
from dfm_d2.framework import Boxes, CfgNode, DatasetCatalog, Instances, comm

logger = logging.getLogger(__name__)

_ORDER_KEY, _AUGMENT_KEY = 1, 2  # keep the two random streams of a seed apart


@dataclass
class _Sample:
    """What crosses from a worker: the item, or None, and the images that could not be read on the way."""

    item: dict | None
    failures: list[tuple[str, str]]


def build_train_loader(cfg: CfgNode, start_position: int) -> Iterator[list[dict]]:
    """Infinite iterator of training batches, beginning at sample `start_position` of the global stream.

    Batch k is the positions [start + k B, start + (k + 1) B), B = SOLVER.IMS_PER_BATCH; rank r of W takes the
    r-th slice of B / W of them. Items have file_name, image_id, height, width (of the file), image (uint8
    tensor (3, H, W)), instances (gt_boxes, gt_classes; without difficult and crowd objects).
    A file that cannot be decoded is reported once and replaced by the image of the next good position
    (ON_ERROR "skip") or raises DataProblemError ("fatal"). Call register_datasets before.

    Raises ValueError for a batch that the ranks cannot share, and if no training image is left.
    """
    dataset = TrainStream(
        _training_dicts(cfg),
        seed=max(cfg.SEED, 0),
        image_format=cfg.INPUT.FORMAT,
        augmentation=_augment_config(cfg),
    )
    return train_batches(dataset, cfg, start_position)


def train_batches(dataset: "SampleStream", cfg: CfgNode, start_position: int) -> Iterator[list[dict]]:
    """The endless batches of a stream from a position on; see build_train_loader."""
    batch, world = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch < 1 or batch % world:
        raise ValueError(f"SOLVER.IMS_PER_BATCH is {batch}: it must be a positive multiple of {world}.")
    share = batch // world
    positions = _PositionBatches(start_position + comm.get_rank() * share, share, batch)
    loader = DataLoader(dataset, batch_sampler=positions, **_worker_options(cfg))
    return _good_items(loader, cfg.DATASETS.ON_ERROR)


def build_test_loader(cfg: CfgNode, dataset_name: str) -> "TestLoader":
    """Every image of a registered data set, in order, in lists of TEST.BATCH_SIZE dicts.

    Items as in training, without instances; the image is resized to MIN_SIZE_TEST, MAX_SIZE_TEST
    (MIN_SIZE_TEST 0: not at all), height and width are the file's. Each rank gets a contiguous share. A file
    that cannot be decoded is left out under ON_ERROR "skip": its objects then count as missed.
    """
    dicts = DatasetCatalog.get(dataset_name)
    return ordered_loader(TestImages(dicts, functools.partial(read_test_item, cfg=cfg)), len(dicts), cfg)


def ordered_loader(dataset: "TestImages", number: int, cfg: CfgNode) -> "TestLoader":
    """The share of this rank of a data set of `number` images; see build_test_loader."""
    if cfg.TEST.BATCH_SIZE < 1:
        raise ValueError(f"TEST.BATCH_SIZE is {cfg.TEST.BATCH_SIZE}: it must be at least 1.")
    indices = np.array_split(np.arange(number), comm.get_world_size())[comm.get_rank()].tolist()
    size = cfg.TEST.BATCH_SIZE
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    loader = DataLoader(dataset, batch_sampler=batches, **_worker_options(cfg))
    return TestLoader(loader, len(batches), cfg.DATASETS.ON_ERROR)


def read_test_item(entry: dict, cfg: CfgNode) -> dict:
    """The model's input dict of one image, resized to MIN_SIZE_TEST, MAX_SIZE_TEST.

    entry: file_name and image_id at least; height and width are read from the file where they are missing.
    Raises ImageError for a file that cannot be read.
    """
    return resized_item(entry, read_image(entry["file_name"], cfg.INPUT.FORMAT), cfg)


def resized_item(entry: dict, image: np.ndarray, cfg: CfgNode) -> dict:
    """As read_test_item, of pixels `(H, W, 3)` uint8 in the order of INPUT.FORMAT."""
    height, width = image.shape[:2]
    no_boxes = np.zeros((0, 4))
    image, _ = resize_shortest_edge(image, no_boxes, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return _item({"height": height, "width": width, **entry}, image)


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


class TrainStream(SampleStream):
    """The stream of images with boxes."""

    def __init__(self, dicts: list[dict], seed: int, image_format: str, augmentation: AugmentConfig) -> None:
        super().__init__(dicts, seed)
        self._format, self._augmentation = image_format, augmentation

    def read(self, entry: dict) -> np.ndarray:
        return read_image(entry["file_name"], self._format)

    def make(self, entry: dict, image: np.ndarray, rng: np.random.Generator) -> dict:
        targets = usable_annotations(entry)
        boxes = np.array([target["bbox"] for target in targets], dtype=np.float64).reshape(-1, 4)
        classes = np.array([target["category_id"] for target in targets], dtype=np.int64)
        image, boxes, kept = augment(image, boxes, rng, self._augmentation)
        instances = Instances(image.shape[:2])
        instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.as_tensor(classes[kept])
        return {**_item(entry, image), "instances": instances}


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


def usable_annotations(entry: dict) -> list[dict]:
    """The annotations that training may use: neither difficult nor crowd."""
    return [a for a in entry["annotations"] if not a.get("difficult", 0) and not a.get("iscrowd", 0)]


def _training_dicts(cfg: CfgNode) -> list[dict]:
    dicts = [entry for name in cfg.DATASETS.TRAIN for entry in DatasetCatalog.get(name)]
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dicts = [entry for entry in dicts if usable_annotations(entry)]
    if not dicts:
        raise ValueError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no image to train on: "
            "name a data set with boxes that are not all difficult."
        )
    return dicts


def _augment_config(cfg: CfgNode) -> AugmentConfig:
    return AugmentConfig(
        min_sizes=tuple(cfg.INPUT.MIN_SIZE_TRAIN),
        sampling=cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        flip=cfg.INPUT.RANDOM_FLIP,
        crop_probability=cfg.INPUT.DETR_CROP,
        crop_resize=tuple(cfg.INPUT.CROP_RESIZE),
        crop_size=tuple(cfg.INPUT.CROP_SIZE),
    )


def _item(entry: dict, image: np.ndarray) -> dict:
    """The model's input dict of one image, uint8 (H, W, 3) -> tensor (3, H, W)."""
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    keys = ("file_name", "image_id", "height", "width")
    return {**{key: entry[key] for key in keys}, "image": pixels}


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
