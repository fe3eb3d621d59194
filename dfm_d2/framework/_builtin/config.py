"""The config node and the `@configurable` decorator."""

import functools
import inspect

from fvcore.common.config import CfgNode as _CfgNode

from dfm_d2.framework._builtin.utils import PathManager
from dfm_d2.framework._config_files import merge_config_file


class CfgNode(_CfgNode):
    """fvcore's config node, opened through PathManager. No code from a file is ever run."""

    @classmethod
    def _open_cfg(cls, filename):
        return PathManager.open(filename, "r")

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """As `merge_config_file`. `allow_unsafe` is Detectron2's; True raises ValueError, for such a file can
        run code."""
        if allow_unsafe:
            raise ValueError(
                "allow_unsafe=True would let a config file run code: the builtin framework refuses."
            )
        merge_config_file(self, cfg_filename)


def configurable(init_func):
    """Let an `__init__` be called with a config in place of its explicit arguments.

    The class has a classmethod `from_config(cfg, ...)` that returns the keyword arguments of `__init__`. What
    is passed besides the config goes to `from_config` where that takes it by name, and overrides its answer
    where it does not.

    Raises AttributeError or TypeError where `from_config` is missing or is no classmethod, and TypeError
    where its first argument is not called `cfg`.
    """
    assert inspect.isfunction(init_func) and init_func.__name__ == "__init__", (
        "@configurable decorates an __init__"
    )

    @functools.wraps(init_func)
    def wrapped(self, *args, **kwargs):
        from_config = getattr(type(self), "from_config", None)
        if from_config is None:
            raise AttributeError(
                f"{type(self).__name__} is @configurable: it needs a classmethod from_config."
            )
        if not inspect.ismethod(from_config):
            raise TypeError(f"{type(self).__name__}.from_config must be a classmethod.")
        if isinstance(args[0] if args else kwargs.get("cfg"), _CfgNode):
            init_func(self, **_explicit_arguments(from_config, args, kwargs))
        else:
            init_func(self, *args, **kwargs)

    return wrapped


def _explicit_arguments(from_config, args: tuple, kwargs: dict) -> dict:
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"{from_config.__qualname__} must take 'cfg' as its first argument.")
    takes_anything = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    passed_on = {name: value for name, value in kwargs.items() if takes_anything or name in parameters}
    arguments = from_config(*args, **passed_on)
    arguments.update({name: value for name, value in kwargs.items() if name not in passed_on})
    return arguments
