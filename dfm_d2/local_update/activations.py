"""Bytes that autograd keeps for a backward: each storage once, from its saving to its release."""

from collections.abc import Iterable

import torch
from torch import Tensor


class _Held:
    """A saved tensor; when autograd lets it go, so does the count."""

    def __init__(self, tensor: Tensor, key: int, owner: "SavedActivations"):
        self.tensor, self.key, self.owner = tensor, key, owner

    def __del__(self):
        self.owner._release(self.key)


class SavedActivations:
    """A context in which `alive` and `peak` count the bytes of tensors saved for backward.

    Views of one storage count once, those of `exclude` (parameters, which are there anyway) not at all.
    A tensor that something else than autograd keeps alive is not counted.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()):
        self.alive, self.peak = 0, 0
        self._excluded = {x.untyped_storage()._cdata for x in exclude}
        self._holders: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self._bytes[key] = 0 if key in self._excluded else storage.nbytes()
            self.alive += self._bytes[key]
            self.peak = max(self.peak, self.alive)
        # Detached: a node that saves its own output would otherwise be kept alive by it for ever.
        return _Held(tensor.detach(), key, self)

    def _release(self, key: int) -> None:
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self.alive -= self._bytes.pop(key)
