"""Models and data sets that are registered under a name."""

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fvcore.common.registry import Registry

# Called as (cfg) and returning an nn.Module, the whole model.
META_ARCH_REGISTRY = Registry("META_ARCH")


def build_model(cfg):
    """Build the model called `cfg.MODEL.META_ARCHITECTURE`, on `cfg.MODEL.DEVICE`; loads no weights."""
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).to(cfg.MODEL.DEVICE)


class _Catalog(UserDict):
    def remove(self, name: str) -> None:
        self.pop(name)


class _DatasetCatalog(_Catalog):
    """From the name of a dataset to a function without arguments that returns its list of dicts."""

    def register(self, name: str, func: Callable[[], list[dict]]) -> None:
        """Raises AssertionError where the name is taken."""
        assert name not in self, f"dataset '{name}' is already registered"
        self[name] = func

    def get(self, name: str) -> list[dict]:
        """Call the function registered under `name`; raises KeyError where there is none."""
        return self[name]()


class Metadata(SimpleNamespace):
    """Facts about one dataset, as attributes."""

    def set(self, **facts: Any) -> "Metadata":
        self.__dict__.update(facts)
        return self


class _MetadataCatalog(_Catalog):
    """From the name of a dataset to its Metadata."""

    def get(self, name: str) -> Metadata:
        """The Metadata of `name`, made at the first call."""
        return self.setdefault(name, Metadata(name=name))


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
