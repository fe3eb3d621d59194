"""The loops of training and of inference, and what is called from them."""

import logging
import time
import weakref
from collections.abc import Iterable

from dfm_d2.framework._builtin.events import EventStorage

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


class HookBase:
    """Something that happens around the steps of a trainer. Each method does nothing unless overridden.

    A hook whose `state_dict` is not empty is saved with the trainer and has a `load_state_dict`.
    """

    # A weak reference, set by TrainerBase.register_hooks.
    trainer: "TrainerBase" = None

    def before_train(self) -> None:
        """Called once, before the first step."""

    def after_train(self) -> None:
        """Called once, after the last step, or after a step that raised."""

    def before_step(self) -> None:
        """Called before each step."""

    def after_step(self) -> None:
        """Called after each step."""

    def state_dict(self) -> dict:
        return {}


class TrainerBase:
    """A loop over `run_step`, which subclasses define.

    `iter` is the current iteration, from `start_iter` to `max_iter` - 1, and `max_iter` after a training that
    was not broken off; `storage` is the EventStorage of the running training.
    """

    def __init__(self):
        self._hooks: list[HookBase] = []
        self.iter = self.start_iter = 0
        self.max_iter: int
        self.storage: EventStorage

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Add hooks, run in this order; None is left out."""
        for hook in filter(None, hooks):
            # The trainer owns the hook; a strong reference back would be a cycle.
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations `start_iter` to `max_iter` - 1. `after_train` runs even where a step raises."""
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                # Hooks tell by iter == max_iter that the training was not broken off.
                self.iter += 1
            finally:
                self.after_train()

    def before_train(self) -> None:
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.after_train()

    def before_step(self) -> None:
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def after_step(self) -> None:
        for hook in self._hooks:
            hook.after_step()

    def run_step(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define run_step")

    def state_dict(self) -> dict:
        """The iteration, and the state of each hook that has one under the name of its class."""
        # The first of several hooks of one class is the one that is saved.
        hooks = {type(hook).__qualname__: hook.state_dict() for hook in reversed(self._hooks)}
        hooks = {name: state for name, state in hooks.items() if state}
        return {"iteration": self.iter} | ({"hooks": hooks} if hooks else {})

    def load_state_dict(self, state_dict: dict) -> None:
        """Inverse of `state_dict`; the state of a hook that is not registered is left out with a warning."""
        self.iter = state_dict["iteration"]
        hooks = {type(hook).__qualname__: hook for hook in reversed(self._hooks)}
        for name, state in state_dict.get("hooks", {}).items():
            if name in hooks:
                hooks[name].load_state_dict(state)
            else:
                logger.warning("No hook %s is registered: its state is not loaded", name)


class DatasetEvaluator:
    """Collects inputs and outputs batch by batch, and evaluates them at the end."""

    def reset(self) -> None:
        """Called before the first batch."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Called with each batch and with what the model answered to it."""

    def evaluate(self) -> dict | None:
        """Called after the last batch; {task: {metric: number}}, or None except on the main process."""


def inference_on_dataset(model, data_loader: Iterable[list[dict]], evaluator: DatasetEvaluator) -> dict:
    """Run `model` over `data_loader` in eval mode without gradients; return `evaluator.evaluate()`, or {}.

    `data_loader` has a length. The model's training mode is restored, also where something raises.
    """
    import torch

    total = len(data_loader)
    logger.info("Start inference on %d batches", total)
    evaluator.reset()
    was_training = model.training
    model.eval()
    start = last_line = time.perf_counter()
    try:
        with torch.no_grad():
            for index, inputs in enumerate(data_loader, start=1):
                evaluator.process(inputs, model(inputs))
                now = time.perf_counter()
                if now - last_line > _SECONDS_BETWEEN_LINES:
                    last_line = now
                    per_batch = (now - start) / index
                    left = per_batch * (total - index)
                    logger.info("Inference %d/%d, %.4f s a batch, %.0f s left", index, total, per_batch, left)
    finally:
        model.train(was_training)
    logger.info("Inference took %.1f s", time.perf_counter() - start)
    return evaluator.evaluate() or {}
