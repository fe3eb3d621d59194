"""The training loop with local updates, and everything of it that a checkpoint must hold."""

import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from dfm_d2.errors import UserError, input_errors, output_errors
from dfm_d2.framework import TrainerBase
from dfm_d2.local_update import BlockOptimizer, LocallyTrainable, NonFiniteLossError, Update
from dfm_d2.local_update.processes import gather_objects, mean_of_metrics
from dfm_d2.local_update.updates import Autocast

# What to do about a loss that is not finite.
_ADVICE = (
    "The last checkpoint is intact, if there is one: lower SOLVER.BASE_LR, clip gradients "
    "(SOLVER.BLOCK_CLIP_NORM above 0), or look at these images, then continue with --resume."
)


def _is_not_ours(record: logging.LogRecord) -> bool:
    """Whether a line of the log is about something else than an error that says all there is to say."""
    return not (record.exc_info and isinstance(record.exc_info[1], NonFiniteLossError | UserError))


_logger = logging.getLogger(__name__)
# Detectron2's loop logs the traceback of whatever ends it.
logging.getLogger(TrainerBase.__module__).addFilter(_is_not_ours)


class LocalUpdateTrainer(TrainerBase):
    """``run_step`` is: next batch, ``model.prepare``, ``update.step``, metrics into the storage.

    Everything else (schedule, evaluation, checkpoints, progress) is a hook. ``train`` raises
    NonFiniteLossError, and UserError for data that cannot be trained on and for a full disk.
    """

    def __init__(
        self,
        model: LocallyTrainable,
        build_loader: Callable[[int], Iterable[list[dict]]],
        optimizer: BlockOptimizer,
        update: Update,
        autocast: Autocast,
        images_per_step: int,
        window: int = 20,
    ):
        """
        build_loader: of a position in the stream of samples, an endless iterable of batches from there on.
        images_per_step: by how much a step advances that position (a batch may lack images that are broken).
        window: how many past values of each metric the writers smooth over; they are in the checkpoint.
        """
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.update = update
        self.autocast = autocast
        self.images_per_step = images_per_step
        self.window = window
        self.data_position = 0
        self.failed = False
        self._build_loader = build_loader
        self._restored_rng: dict[str, Any] | None = None
        self._restored_history: dict[str, list[tuple[float, int]]] = {}
        self._metric_names: set[str] = set()

    @output_errors()
    def before_train(self) -> None:
        """Put back the metric windows of the checkpoint, the hooks' turn, and open the stream of batches.

        The generators of a checkpoint are put back last: what was drawn from them before does not count.
        """
        self.failed = True  # until all is through: hooks that run after a failure must not evaluate
        for name, values in self._restored_history.items():
            for value, iteration in values:
                self.storage.put_scalar(name, value, cur_iter=iteration)
        super().before_train()
        with input_errors():
            self._batches = iter(self._build_loader(self.data_position))
        if self._restored_rng is not None:
            set_rng_state(self._restored_rng)
            self._restored_rng = None
        self.failed = False

    # Hooks write files.
    after_step = output_errors()(TrainerBase.after_step)
    after_train = output_errors()(TrainerBase.after_train)

    def run_step(self) -> None:
        """One iteration. NonFiniteLossError names iteration and images and leaves the checkpoints intact."""
        assert self.model.training, "The model was left in eval mode."
        self.failed = True
        start = time.perf_counter()
        with input_errors():
            batch = next(self._batches)
        data_time = time.perf_counter() - start
        prepared = self.model.prepare(batch, self.iter)
        try:
            metrics = self.update.step(self.model, prepared, self.optimizer, self.autocast)
        except NonFiniteLossError as error:
            lists = gather_objects([item.get("image_id") for item in batch], error.raised_by)
            ids = list(dict.fromkeys(image_id for found in lists for image_id in found))
            where = f" at iteration {self.iter}, image ids {ids}"
            raise NonFiniteLossError(error.values, where=where, advice=_ADVICE) from None
        self.data_position += self.images_per_step
        values = mean_of_metrics(metrics)
        total = sum(value for key, value in values.items() if key.startswith("loss"))
        scalars = {"total_loss": total, **values}
        self.storage.put_scalars(**scalars)
        self._metric_names.update(scalars)
        self.storage.put_scalar("data_time", data_time)
        self.failed = False

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, optimizer, data position, the generators' states and the metric windows.

        Only tensors and plain Python values, so that ``torch.load(weights_only=True)`` reads it.
        """
        histories = self.storage.histories()
        return super().state_dict() | {
            "optimizer": self.optimizer.state_dict(),
            "data_position": self.data_position,
            "rng": get_rng_state(),
            "history": {
                name: [(float(value), int(step)) for value, step in histories[name].values()[-self.window :]]
                for name in sorted(self._metric_names)
            },
            "threads": torch.get_num_threads(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``; train from ``state_dict["iteration"] + 1``. A damaged one raises."""
        for key in ("iteration", "data_position"):
            if type(state_dict[key]) is not int or not 0 <= state_dict[key] < 2**53:
                raise ValueError(f"its {key} is {str(state_dict[key])[:50]}")
        self.optimizer.load_state_dict(state_dict["optimizer"])
        super().load_state_dict(self._of_these_groups(state_dict))
        self.data_position = state_dict["data_position"]
        self._restored_rng, now = state_dict["rng"], get_rng_state()
        try:
            set_rng_state(self._restored_rng)  # which is an error for a state that is none
        finally:
            set_rng_state(now)
        self._restored_history = {
            str(name): [(float(value), int(step)) for value, step in values]
            for name, values in state_dict["history"].items()
        }
        self._metric_names = set(self._restored_history)
        if (then := state_dict.get("threads")) not in (None, torch.get_num_threads()):
            _logger.warning("the checkpoint is of %d threads: equal to rounding only (OMP_NUM_THREADS)", then)

    def _of_these_groups(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state with the schedule of this run's parameter groups: another update mode has others."""
        hooks, groups = dict(state_dict.get("hooks", {})), self.optimizer.param_groups
        if schedule := hooks.get("LRScheduler"):
            first = [group.get("initial_lr", group["lr"]) for group in groups]
            rates = {"base_lrs": first, "_last_lr": [group["lr"] for group in groups]}
            own = self.scheduler.state_dict() if hasattr(self, "scheduler") else {}
            if any(type(value) is not type(own.get(key, value)) for key, value in schedule.items()):
                raise ValueError("the state of its schedule is not of this kind")
            hooks["LRScheduler"] = {**schedule, **rates}
        return {**state_dict, "hooks": hooks}


def get_rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's, torch's and every CUDA device's generator, as plain values."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": (version, list(words), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what ``get_rng_state`` gave. CUDA states go to the devices that are there."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
