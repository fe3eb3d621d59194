"""A model of lists, dicts and Instances as a function of tensors, for torch.jit.trace."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfm_d2.framework._builtin.boxes import Boxes
from dfm_d2.framework._builtin.instances import Instances

# What takes the place of a thing that is no tensor and no container.
_OTHER = "other"


@dataclass(frozen=True)
class Schema:
    """How an object was flattened; called with the tensors, or others of the same meaning, rebuilds it.

    kind: "tensor", "other", "list", "tuple", "dict", "boxes" or "instances". parts: of its members.
    keys: of a dict or of the fields of Instances, sorted as the members are.
    """

    kind: str
    parts: tuple["Schema", ...] = ()
    keys: tuple[str, ...] = ()

    def __call__(self, values: tuple) -> Any:
        """Raises ValueError where there are too few or too many values."""
        rest = list(values)
        rebuilt = self._take(rest)
        if rest:
            raise ValueError(f"{len(values)} values were given, {len(rest)} more than the object holds")
        return rebuilt

    def _take(self, rest: list) -> Any:
        members = [part._take(rest) for part in self.parts]
        if self.kind in ("list", "tuple"):
            return members if self.kind == "list" else tuple(members)
        if self.kind == "dict":
            return dict(zip(self.keys, members))
        if not rest:
            raise ValueError("too few values for the object")
        value = rest.pop(0)
        if self.kind == "instances":
            return Instances(value, **dict(zip(self.keys, members)))
        return Boxes(value) if self.kind == "boxes" else value


def flatten(obj: Any) -> tuple[tuple, Schema]:
    """The leaves of nested lists, tuples, dicts (by key), Instances and Boxes, and how to rebuild them.

    Instances are their fields, sorted, and then their image size.
    """
    if isinstance(obj, Tensor):
        return (obj,), Schema("tensor")
    if isinstance(obj, Boxes):
        return (obj.tensor,), Schema("boxes")
    if isinstance(obj, (list, tuple)):
        leaves, parts = _flatten_all(obj)
        return leaves, Schema("list" if isinstance(obj, list) else "tuple", parts)
    if isinstance(obj, (Mapping, Instances)):
        fields = obj if isinstance(obj, Mapping) else obj.get_fields()
        if not all(isinstance(key, str) for key in fields):
            raise KeyError(f"only words can be keys of what is traced, not {list(fields)}")
        keys = tuple(sorted(fields))
        leaves, parts = _flatten_all([fields[key] for key in keys])
        if isinstance(obj, Mapping):
            return leaves, Schema("dict", parts, keys)
        return (*leaves, torch.as_tensor(obj.image_size)), Schema("instances", parts, keys)
    return (obj,), Schema(_OTHER)


def _flatten_all(members) -> tuple[tuple, tuple[Schema, ...]]:
    pairs = [flatten(member) for member in members]
    return tuple(leaf for leaves, _ in pairs for leaf in leaves), tuple(schema for _, schema in pairs)


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
        leaves, schema = flatten(self.inputs)
        self.flattened_inputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self.inputs_schema = schema if len(self.flattened_inputs) == len(leaves) else None
        self.outputs_schema: Schema | None = None
        if self.inputs_schema is None and not allow_non_tensor:
            other = next(type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor))
            raise ValueError(f"inputs for tracing must hold tensors only, not a {other}")

    def forward(self, *tensors: Tensor) -> tuple:
        """The answer's tensors. Raises ValueError where it holds something else."""
        if self.inputs_schema is not None:
            inputs = self.inputs_schema(tensors)
        elif all(a is b for a, b in zip(tensors, self.flattened_inputs, strict=True)):
            inputs = self.inputs
        else:
            raise ValueError("without a schema of its inputs the adapter runs on its flattened_inputs only")
        with torch.no_grad():
            leaves, schema = flatten(self.inference_func(self.model, *inputs))
        found = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        if len(found) == len(leaves):
            self.outputs_schema = schema
        elif not self.allow_non_tensor:
            raise ValueError("the model cannot be traced: its answer does not flatten to tensors alone")
        return found
