"""Bytes that autograd keeps for a backward: each storage once, from its saving to its release."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class _Storage:
    """Counts while a saved tensor holds it: until autograd lets the last one go."""

    def __init__(self, saved: "SavedActivations", size: int):
        self.saved, self.size = saved, size
        saved.alive += size
        saved.peak = max(saved.peak, saved.alive)

    def __del__(self):
        self.saved.alive -= self.size


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """A context in which `alive` and `peak` count the bytes of tensors saved for backward.

    Views of one storage count once, those of `exclude` (parameters, which are there anyway) not at all.
    A tensor that something else than autograd keeps alive is not counted.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()):
        super().__init__(self._pack, lambda held: held[0])
        self.alive, self.peak = 0, 0
        self._excluded = {x.untyped_storage()._cdata for x in exclude}
        self._storages: WeakValueDictionary[int, _Storage] = WeakValueDictionary()

    def __enter__(self) -> "SavedActivations":
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> tuple[Tensor, Any]:
        storage = tensor.untyped_storage()
        key = storage._cdata
        held = self._storages.get(key) or _Storage(self, 0 if key in self._excluded else storage.nbytes())
        self._storages[key] = held
        # Detached: a node that saves its own output would otherwise be kept alive by it for ever.
        return tensor.detach(), held
