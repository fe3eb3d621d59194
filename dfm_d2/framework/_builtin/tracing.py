"""A model of lists, dicts and Instances as a function of tensors, for torch.jit.trace."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfm_d2.framework._builtin.structures import Boxes, Instances


def flatten(obj: Any) -> list:
    """The leaves of nested lists, tuples, dicts (by key), Boxes and Instances.

    Instances are their fields, sorted by name, and then their image size.
    """
    if isinstance(obj, Boxes):
        return [obj.tensor]
    if isinstance(obj, Instances):
        return [*flatten(obj.get_fields()), torch.as_tensor(obj.image_size)]
    if isinstance(obj, Mapping):
        obj = [obj[key] for key in sorted(obj)]
    if isinstance(obj, (list, tuple)):
        return [leaf for member in obj for leaf in flatten(member)]
    return [obj]


def rebuild(obj: Any, values: Iterator) -> Any:
    """`obj`, of nested lists, tuples and dicts, with the next of the values in place of each leaf."""
    if isinstance(obj, Mapping):
        return {key: rebuild(obj[key], values) for key in sorted(obj)}
    if isinstance(obj, (list, tuple)):
        return type(obj)([rebuild(member, values) for member in obj])
    return next(values)


def _tensors_of(obj: Any, allow_non_tensor: bool) -> tuple[Tensor, ...]:
    leaves = flatten(obj)
    other = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
    if other and not allow_non_tensor:
        raise ValueError(f"what is traced must take and return tensors only, not a {other[0]}")
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


class TracingAdapter(nn.Module):
    """Calls a model with inputs rebuilt from tensors and flattens what it answers.

    `torch.jit.trace(adapter, adapter.flattened_inputs)` traces it.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        inference_func: Callable[..., Any] | None = None,
        allow_non_tensor: bool = False,
    ):
        """inputs: an argument of the model, or a tuple of all: lists, tuples and dicts of tensors.
        inference_func: called as (model, *inputs) in place of the model. allow_non_tensor: leave out what is
        no tensor; inputs that hold such cannot be rebuilt: the adapter runs on `flattened_inputs` only.

        Raises ValueError where `inputs` holds something that is no tensor.
        """
        import torchvision  # noqa: F401  (batched_nms would import it while the model is traced, which fails)

        super().__init__()
        self.model = model
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.inference_func = inference_func or (lambda model, *inputs: model(*inputs))
        self.allow_non_tensor = allow_non_tensor
        self.flattened_inputs = _tensors_of(self.inputs, allow_non_tensor)
        self._fixed = len(self.flattened_inputs) < len(flatten(self.inputs))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The answer's tensors. Raises ValueError where it holds something else."""
        inputs = self.inputs
        if not self._fixed:
            inputs = rebuild(inputs, iter(tensors))
        elif not all(a is b for a, b in zip(tensors, self.flattened_inputs, strict=True)):
            raise ValueError("with inputs that are no tensors the adapter runs on its flattened_inputs only")
        with torch.no_grad():
            return _tensors_of(self.inference_func(self.model, *inputs), self.allow_non_tensor)
