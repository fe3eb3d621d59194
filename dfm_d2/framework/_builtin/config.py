"""The config node, the default config and the `@configurable` decorator."""

import functools
import inspect
import json
import logging
from importlib import resources
from typing import Any

from fvcore.common.config import CfgNode as _CfgNode

from dfm_d2.framework._builtin.file_io import PathManager

_logger = logging.getLogger(__name__)


class CfgNode(_CfgNode):
    """fvcore's config node, opened through PathManager. No code from a file is ever run."""

    @classmethod
    def _open_cfg(cls, filename):
        return PathManager.open(filename, "r")

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file (and the files of its `_BASE_`) into this node.

        Keys of Detectron2 that dfm_d2 does not honour are left out, so that what a run under Detectron2
        dumped can be read; one warning names those whose value is not Detectron2's default.

        `allow_unsafe` exists for Detectron2's signature; True raises ValueError, because YAML tags that make
        Python objects can run code. A file of another config VERSION raises ValueError too.
        """
        if allow_unsafe:
            raise ValueError(
                "allow_unsafe=True would let a config file run code: the builtin framework refuses."
            )
        content = self.load_yaml_with_base(cfg_filename, allow_unsafe=False)
        ignored = _take_unused(content, self)
        loaded = type(self)(content)
        version = loaded.get("VERSION", self.VERSION)
        if version != self.VERSION:
            raise ValueError(f"'{cfg_filename}' has VERSION {version}: only {self.VERSION} can be read.")
        self.merge_from_other_cfg(loaded)
        if ignored:
            _warn_once(f"'{cfg_filename}': the builtin framework ignores {', '.join(ignored)}")


@functools.cache
def unused_keys() -> dict[str, Any]:
    """Full name and default of each key of Detectron2 that default_config() has not, frozen as data."""
    return json.loads(resources.files(__package__).joinpath("unused_keys.json").read_text(encoding="utf-8"))


def _take_unused(content: dict, known: dict, prefix: str = "") -> list[str]:
    """Remove from `content`, in place, the unused keys that `known` has not either.

    Returns "KEY VALUE" of each that was set to something else than Detectron2's default.
    """
    differing = []
    for key, value in list(content.items()):
        name = f"{prefix}{key}"
        own = known.get(key)
        if isinstance(value, dict) and value:
            differing += _take_unused(value, own if isinstance(own, dict) else {}, f"{name}.")
            if not value:  # nothing was in it but what is unused
                del content[key]
        elif key not in known and name in unused_keys():
            if value != unused_keys()[name]:  # YAML and JSON have no tuples
                differing.append(f"{name} {value!r}")
            del content[key]
    return differing


@functools.cache
def _warn_once(text: str) -> None:
    """A command may read its config more than once."""
    _logger.warning(text)


def get_cfg() -> CfgNode:
    """Return a new config with the default values."""
    from dfm_d2.framework._builtin.defaults import default_config  # defaults.py needs CfgNode

    return default_config()


def configurable(init_func=None, *, from_config=None):
    """Let an `__init__` or a function be called with a config in place of its explicit arguments.

    On an `__init__`, the class has a classmethod `from_config(cfg, ...)` that returns the keyword arguments
    of `__init__`. On a function, `from_config` is given to the decorator. What is passed besides the config
    goes to `from_config` where that takes it by name, and overrides its answer where it does not.

    Raises AttributeError or TypeError where `from_config` is missing or is no classmethod, and TypeError
    where its first argument is not called `cfg`.
    """
    if init_func is not None:
        assert inspect.isfunction(init_func) and init_func.__name__ == "__init__" and from_config is None, (
            "@configurable decorates an __init__, or a function with @configurable(from_config=...)"
        )
        return _configurable_init(init_func)
    if from_config is None:
        return configurable
    assert inspect.isfunction(from_config), "from_config must be a function"
    return functools.partial(_configurable_function, from_config)


def _configurable_init(init_func):
    @functools.wraps(init_func)
    def wrapped(self, *args, **kwargs):
        make_arguments = getattr(type(self), "from_config", None)
        if make_arguments is None:
            raise AttributeError(
                f"{type(self).__name__} is @configurable: it needs a classmethod from_config."
            )
        if not inspect.ismethod(make_arguments):
            raise TypeError(f"{type(self).__name__}.from_config must be a classmethod.")
        if _has_config(args, kwargs):
            init_func(self, **_explicit_arguments(make_arguments, args, kwargs))
        else:
            init_func(self, *args, **kwargs)

    return wrapped


def _configurable_function(from_config, function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if _has_config(args, kwargs):
            return function(**_explicit_arguments(from_config, args, kwargs))
        return function(*args, **kwargs)

    wrapped.from_config = from_config
    return wrapped


def _has_config(args: tuple, kwargs: dict) -> bool:
    first = args[0] if args else kwargs.get("cfg")
    return isinstance(first, _CfgNode)


def _explicit_arguments(from_config, args: tuple, kwargs: dict) -> dict:
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"{from_config.__qualname__} must take 'cfg' as its first argument.")
    takes_anything = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    passed_on = {name: value for name, value in kwargs.items() if takes_anything or name in parameters}
    arguments = from_config(*args, **passed_on)
    arguments.update({name: value for name, value in kwargs.items() if name not in passed_on})
    return arguments
