"""The training loop and what can be hooked into it."""

import logging
import weakref

from dfm_d2.framework._builtin.events import EventStorage

logger = logging.getLogger(__name__)


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
        self.iter: int = 0
        self.start_iter: int = 0
        self.max_iter: int
        self.storage: EventStorage

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Add hooks, run in this order; None is left out."""
        for hook in hooks:
            if hook is None:
                continue
            assert isinstance(hook, HookBase), f"{hook!r} is not a HookBase"
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
        state = {"iteration": self.iter}
        hooks = {}
        for hook in self._hooks:
            hook_state = hook.state_dict()
            if hook_state:
                # The first of several hooks of one class is the one that is saved.
                hooks.setdefault(type(hook).__qualname__, hook_state)
        if hooks:
            state["hooks"] = hooks
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Inverse of `state_dict`; the state of a hook that is not registered is left out with a warning."""
        self.iter = state_dict["iteration"]
        for name, hook_state in state_dict.get("hooks", {}).items():
            hook = next((hook for hook in self._hooks if type(hook).__qualname__ == name), None)
            if hook is None:
                logger.warning("No hook %s is registered: its state is not loaded", name)
            else:
                hook.load_state_dict(hook_state)
