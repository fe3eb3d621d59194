"""Exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dfm_d2.engine.checkpoint import TRAINING_ONLY
from dfm_d2.framework import HookBase


class ModelEMA:
    """The average of a model's weights over the iterations.

    After update n = 0, 1, ...:  ema <- a_n ema + (1 - a_n) w,  a_n = min(decay, (1 + n) / (10 + n)).
    The ramp a_n forgets the initial weights quickly; it is over after about 10 / (1 - decay) updates.
    Floating-point buffers (running statistics) are averaged too; integer ones are copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        """``decay`` in (0, 1); the average starts as the model's present weights."""
        self.model = model
        self.decay = decay
        self.restart()

    def restart(self) -> None:
        """Begin a new average at the model's present weights."""
        self.updates = 0
        self.weights = self._own_weights()

    def _own_weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        ratio = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in self.model.state_dict().items():
            if value.dtype.is_floating_point:
                self.weights[name].lerp_(value, 1.0 - ratio)
            else:
                self.weights[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights; afterwards its own again, bit for bit."""
        own = self._own_weights()
        self.model.load_state_dict(self.weights)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """{"updates": int, "weights": {parameter name: tensor}}."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; ValueError when the names or shapes are not this model's.

        What only training uses and was not trained then begins at the model's present weights.
        """
        present = self.model.state_dict()
        for name, value in self.weights.items():
            default = present[name] if name.startswith(TRAINING_ONLY) else None
            saved = state_dict["weights"].get(name, default)
            if saved is None or saved.shape != value.shape:
                raise ValueError(
                    f"The checkpoint's averaged weights do not have {name} {tuple(value.shape)}."
                )
            value.copy_(saved)
        self.updates = state_dict["updates"]


class EMAHook(HookBase):
    """Takes the weights of every iteration into the average."""

    def __init__(self, ema: ModelEMA):
        self.ema = ema

    def after_step(self) -> None:
        self.ema.update()
