"""What is known of the objects of one image, field by field."""

import itertools
from typing import Any

import torch


class Instances:
    """Fields of equal length (boxes, scores, classes, ...) for the objects of one image.

    Fields are attributes: `instances.scores = tensor` sets one, `instances.scores` reads it, and
    `instances[mask]` indexes all. Names that begin with an underscore are not fields.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any):
        """`image_size` is (height, width)."""
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        return self._image_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        # Reached only where normal lookup fails; "_fields" itself is missing while unpickling.
        if name == "_fields" or name not in self._fields:
            raise AttributeError(f"these Instances have no field '{name}'")
        return self._fields[name]

    def set(self, name: str, value: Any) -> None:
        """Set a field; raises AssertionError where its length is not that of the other fields."""
        if self._fields:
            assert len(value) == len(self), (
                f"field '{name}' has length {len(value)}, the others have {len(self)}"
            )
        self._fields[name] = value

    def has(self, name: str) -> bool:
        return name in self._fields

    def get(self, name: str) -> Any:
        return self._fields[name]

    def remove(self, name: str) -> None:
        del self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """The fields themselves: changing the dict changes the Instances."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> "Instances":
        """Instances whose fields have been moved by their own `to`, where they have one."""
        moved = Instances(self._image_size)
        for name, value in self._fields.items():
            moved.set(name, value.to(*args, **kwargs) if hasattr(value, "to") else value)
        return moved

    def __getitem__(self, item) -> "Instances":
        """Index every field with an int (one object), a slice, an index vector or a mask."""
        if type(item) is int:
            if not -len(self) <= item < len(self):
                raise IndexError(f"index {item} is out of range for {len(self)} instances")
            item = slice(item, None, len(self))
        picked = Instances(self._image_size)
        for name, value in self._fields.items():
            picked.set(name, value[item])
        return picked

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without a field have no length")

    def __iter__(self):
        raise NotImplementedError("Instances cannot be iterated: index them")

    @staticmethod
    def cat(instance_lists: list["Instances"]) -> "Instances":
        """Concatenate Instances of one image size, field by field (tensors, lists, types with a `cat`)."""
        assert instance_lists, "nothing to concatenate"
        assert all(isinstance(instances, Instances) for instances in instance_lists), (
            "Instances.cat takes Instances"
        )
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        assert all(instances.image_size == first.image_size for instances in instance_lists), (
            "Instances of different image sizes cannot be concatenated"
        )
        joined = Instances(first.image_size)
        for name, value in first.get_fields().items():
            values = [instances.get(name) for instances in instance_lists]
            if isinstance(value, torch.Tensor):
                joined.set(name, torch.cat(values))
            elif isinstance(value, list):
                joined.set(name, list(itertools.chain(*values)))
            elif hasattr(type(value), "cat"):
                joined.set(name, type(value).cat(values))
            else:
                raise ValueError(f"field '{name}' of type {type(value)} cannot be concatenated")
        return joined

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        height, width = self._image_size
        count = len(self) if self._fields else 0
        return (
            f"Instances(num_instances={count}, image_height={height}, image_width={width}, fields=[{fields}])"
        )
