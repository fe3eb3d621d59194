"""Where datasets and what is known about them are found by name."""

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class _DatasetCatalog(UserDict):
    """From the name of a dataset to a function without arguments that returns its list of dicts."""

    def register(self, name: str, func: Callable[[], list[dict]]) -> None:
        """Raises AssertionError where the name is taken or `func` cannot be called."""
        assert callable(func), f"dataset '{name}' must be registered with a function"
        assert name not in self, f"dataset '{name}' is already registered"
        self[name] = func

    def get(self, name: str) -> list[dict]:
        """Call the function registered under `name`; raises KeyError where there is none."""
        if name not in self:
            raise KeyError(f"dataset '{name}' is not registered; there are: {', '.join(self) or 'none'}")
        return self[name]()

    def remove(self, name: str) -> None:
        self.pop(name)


class Metadata(SimpleNamespace):
    """Facts about one dataset, as attributes; a fact once set can only be set to the same value again."""

    name: str = "N/A"

    def __getattr__(self, key: str):
        known = ", ".join(self.__dict__) or "none"
        raise AttributeError(f"dataset '{self.name}' has no metadata '{key}'; it has: {known}")

    def __setattr__(self, key: str, value: Any) -> None:
        assert key not in self.__dict__ or self.__dict__[key] == value, (
            f"metadata '{key}' of dataset '{self.name}' is {self.__dict__[key]!r} and cannot become {value!r}"
        )
        super().__setattr__(key, value)

    def set(self, **kwargs: Any) -> "Metadata":
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


class _MetadataCatalog(UserDict):
    """From the name of a dataset to its Metadata."""

    def get(self, name: str) -> Metadata:
        """The Metadata of `name`, made at the first call."""
        assert name, "a dataset needs a name"
        if name not in self:
            self[name] = Metadata(name=name)
        return self[name]

    def remove(self, name: str) -> None:
        self.pop(name)


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
