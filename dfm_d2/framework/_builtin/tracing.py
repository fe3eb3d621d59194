"""A model of lists, dicts and Instances as a function of tensors, for torch.jit.trace."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfm_d2.framework._builtin.structures import Boxes, Instances

# Takes the values for an object's leaves off the front of a list and rebuilds the object.
Rebuild = Callable[[list], Any]


def flatten(obj: Any) -> tuple[list, Rebuild]:
    """The leaves of nested lists, tuples, dicts (by key), Instances and Boxes, and how to rebuild them.

    Instances are their fields, sorted by name, and then their image size.
    """
    if isinstance(obj, Boxes):
        return [obj.tensor], lambda values: Boxes(values.pop(0))
    if isinstance(obj, (list, tuple)):
        leaves, rebuild = _flatten_all(obj)
        return leaves, lambda values: type(obj)(rebuild(values))
    if isinstance(obj, (Mapping, Instances)):
        fields = obj if isinstance(obj, Mapping) else obj.get_fields()
        keys = sorted(fields)
        leaves, rebuild = _flatten_all([fields[key] for key in keys])
        if isinstance(obj, Mapping):
            return leaves, lambda values: dict(zip(keys, rebuild(values)))

        def rebuild_instances(values: list) -> Instances:
            fields = dict(zip(keys, rebuild(values)))
            return Instances(values.pop(0), **fields)

        return [*leaves, torch.as_tensor(obj.image_size)], rebuild_instances
    return [obj], lambda values: values.pop(0)


def _flatten_all(members) -> tuple[list, Rebuild]:
    pairs = [flatten(member) for member in members]
    leaves = [leaf for leaves, _ in pairs for leaf in leaves]
    return leaves, lambda values: [rebuild(values) for _, rebuild in pairs]


class TracingAdapter(nn.Module):
    """Calls a model with inputs rebuilt from tensors and flattens what it answers.

    `torch.jit.trace(adapter, adapter.flattened_inputs)` traces it; `adapter.outputs_schema`, known after the
    first call, rebuilds the answer from the tensors that the trace gives.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        inference_func: Callable[..., Any] | None = None,
        allow_non_tensor: bool = False,
    ):
        """inputs: an argument of the model, or a tuple of all. inference_func: called as (model, *inputs) in
        place of the model. allow_non_tensor: leave out what is no tensor; nothing can then be rebuilt, and
        the adapter runs on `flattened_inputs` only.

        Raises ValueError where `inputs` holds something that is no tensor.
        """
        super().__init__()
        self.model = model
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.inference_func = inference_func or (lambda model, *inputs: model(*inputs))
        self.allow_non_tensor = allow_non_tensor
        self.outputs_schema: Callable[[tuple], Any] | None = None
        self.flattened_inputs, self.inputs_schema = self._tensors_of(self.inputs)

    def _tensors_of(self, obj: Any) -> tuple[tuple[Tensor, ...], Callable[[tuple], Any] | None]:
        """The tensors of an object and how to rebuild it from them, None where they are not all of it."""
        leaves, rebuild = flatten(obj)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        if len(tensors) == len(leaves):
            return tensors, lambda values: rebuild(list(values))
        if not self.allow_non_tensor:
            other = next(type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor))
            raise ValueError(f"what is traced must take and return tensors only, not a {other}")
        return tensors, None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The answer's tensors. Raises ValueError where it holds something else."""
        if self.inputs_schema is not None:
            inputs = self.inputs_schema(tensors)
        elif all(a is b for a, b in zip(tensors, self.flattened_inputs, strict=True)):
            inputs = self.inputs
        else:
            raise ValueError("without a schema of its inputs the adapter runs on its flattened_inputs only")
        with torch.no_grad():
            found, schema = self._tensors_of(self.inference_func(self.model, *inputs))
        self.outputs_schema = schema or self.outputs_schema
        return found
