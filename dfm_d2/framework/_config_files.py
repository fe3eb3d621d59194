"""Read config files and KEY VALUE overrides safely, with error messages that a user can act on."""

import ast
import difflib
import functools
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from dfm_d2.errors import UserError
from dfm_d2.safe_yaml import MOST_CHARACTERS, read_yaml, where

_BASE_KEY = "_BASE_"
# Keys that may be None, which is what they are in Detectron2, or a number.
OPTIONAL_NUMBERS = ("SOLVER.WEIGHT_DECAY_BIAS",)
# Keys of Detectron2 that change the model: without it a value other than the default is an error.
NEEDS_DETECTRON2 = ("MODEL.RESNETS.RES5_DILATION", "MODEL.RESNETS.DEFORM_ON_PER_STAGE")

_logger = logging.getLogger(__name__)


# What config files of earlier versions set and the config does not have any more. Full name of a key or of a
# section: (its former default, for a section a dict; what replaced it). A default of `...`: whatever a file
# sets does no harm; the text then says why the command line may not set it.
Removed = Mapping[str, tuple[Any, str]]


def merge_config_file(cfg, path: str, removed: Removed | None = None) -> None:
    """Merge the YAML file at `path`, and the files that its `_BASE_` names, into `cfg`, in place.

    removed: a key of it changes nothing at its former default; another value is an error that says what
    replaced the key; what is harmless is ignored. Keys of Detectron2 that the framework does not have
    are left out, so that what a run under Detectron2 dumped can be read; one warning names those whose value
    is not Detectron2's default. No code from a file is ever run.

    Raises UserError for a missing file, broken YAML, Python tags, unknown keys and values of the wrong kind;
    the message is one line that names the file and the key.
    """
    merge = _Merge(cfg, removed, of_file=True)
    values = merge.read(path)
    version = values.get("VERSION", cfg.get("VERSION"))
    if version != cfg.get("VERSION"):
        raise UserError(f"Config file '{path}' has VERSION {version}: only {cfg.VERSION} can be read.")
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    if merge.ignored:
        _warn_once(f"'{path}': the framework ignores {', '.join(sorted(merge.ignored))}")


def merge_config_opts(cfg, opts: Sequence[str] | None, removed: Removed | None = None) -> None:
    """Merge `[KEY, VALUE, KEY, VALUE, ...]`, as typed at the end of a command, into `cfg`, in place.

    removed: as for `merge_config_file`, but nothing is ignored. Raises UserError, in one line that names the
    key, for an odd count, an unknown key or a value of the wrong kind.
    """
    opts = list(opts or [])
    if len(opts) % 2:
        raise UserError(
            f"Config overrides come in pairs KEY VALUE, but {len(opts)} words were given "
            f"({' '.join(opts)}): the value of {opts[-1]} is missing or a space is."
        )
    values = _Merge(cfg, removed, of_file=False).checked(
        dict(zip(opts[0::2], opts[1::2])), "The command line"
    )
    cfg.merge_from_list([word for pair in values.items() for word in pair])


@functools.cache
def unused_keys() -> dict[str, Any]:
    """Full name and default of each key of Detectron2 that the builtin config has not, frozen as data."""
    file = resources.files("dfm_d2.framework._builtin").joinpath("unused_keys.json")
    return json.loads(file.read_text(encoding="utf-8"))


@functools.cache
def _warn_once(text: str) -> None:
    """A command may read its config more than once."""
    _logger.warning(text)


class _Merge:
    """Reads and checks what is about to be merged into `cfg`; all keys are full names.

    ignored: "KEY VALUE" of what was left out and is not at its default.
    """

    def __init__(self, cfg, removed: Removed | None, of_file: bool):
        self.cfg = cfg
        self.removed = removed or {}
        self.of_file = of_file
        self.unused = unused_keys() if of_file else {}
        self.ignored: list[str] = []
        self._leaves = dict(_leaves(cfg))
        self._read: dict[str, dict[str, Any]] = {}

    def read(self, path: str, parents: tuple[str, ...] = ()) -> dict[str, Any]:
        """The checked values of a file on top of those of its bases. `parents`: the files that led to it."""
        of = f" (the {_BASE_KEY} of '{parents[-1][-200:]}')" if parents else ""
        named = f"Config file '{path[-200:]}'{of}"
        file = os.path.realpath(path)
        if file in map(os.path.realpath, parents):
            raise UserError(f"{named} includes itself through {_BASE_KEY}: break the circle.")
        if file in self._read:
            return self._read[file]
        content = _load(self.cfg, path, named)
        bases = content.pop(_BASE_KEY, [])
        values: dict[str, Any] = {}
        for base in bases if isinstance(bases, list) else [bases]:
            base = os.path.expanduser(str(base))
            if not base.startswith(("/", "https://", "http://")):
                base = os.path.join(os.path.dirname(path), base)
            values |= self.read(base, (*parents, path))
        self._read[file] = values | self.checked(dict(_leaves(content)), named)
        return self._read[file]

    def checked(self, values: dict[str, Any], named: str) -> dict[str, Any]:
        """The values that are to be merged. Raises UserError for the first that cannot be."""
        checked = {}
        for key, value in values.items():
            if key in self._leaves:
                checked[key] = self._checked_value(key, value, named)
            elif section := next((name for name in self.removed if f"{key}.".startswith(f"{name}.")), None):
                self._check_removed(key, value, section, named)
            elif key in NEEDS_DETECTRON2:
                if _plain(value) != unused_keys()[key]:
                    raise UserError(f"{named} sets {key} to {value!r}, which needs Detectron2: leave it out.")
            elif key in self.unused:
                if _plain(value) != self.unused[key]:
                    self.ignored.append(f"{key} {value!r}")
            elif any(name.startswith(f"{key}.") for name in self._leaves):
                if value != {}:
                    raise UserError(f"{named} sets the section {key} to {value!r}: set a key inside of it.")
            else:
                close = difflib.get_close_matches(key, self._leaves, n=1, cutoff=0.8)
                hint = f": did you mean {close[0]}?" if close else "."
                raise UserError(f"{named} sets the unknown key {key}{hint}")
        return checked

    def _checked_value(self, key: str, value: Any, named: str) -> Any:
        """`value`, as a float where the key holds one."""
        default = None if key in OPTIONAL_NUMBERS else self._leaves[key]
        meant = _decoded(value)
        if not _fits(meant, default):
            raise UserError(f"{named} sets {key} to {repr(value)[:200]}: it must be {_kind(default)}.")
        texts = meant if isinstance(meant, list | tuple) else [meant]
        if not all(text.isprintable() for text in texts if isinstance(text, str)):
            raise UserError(f"{named} sets {key} to {ascii(value)[:200]}: leave out what cannot be printed.")
        if isinstance(default, float) or (default is None and meant is not None):
            return float(meant)
        return value

    def _check_removed(self, key: str, value: Any, section: str, named: str) -> None:
        default, instead = self.removed[section]
        if default is ...:
            if self.of_file:
                return
            raise UserError(f"{named} sets {key}, which is no key of this tool: {instead}.")
        before = dict(_leaves(default, section))
        if key not in before or _plain(value) != _plain(before[key]):
            raise UserError(f"{named} sets {key} to {value!r}, but this option was removed: {instead}.")


def _load(cfg, path: str, named: str) -> dict:
    """The mapping that a YAML file holds."""
    try:
        # The node knows how its framework opens files.
        with cfg._open_cfg(path) as file:
            content = read_yaml(file.read(MOST_CHARACTERS + 1))
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{named} is not a text file: give a YAML config file.") from error
        reason = getattr(error, "strerror", None) or str(error)[:200]  # without the path, which may be long
        raise UserError(f"{named} does not exist or cannot be opened ({reason}): check the path.") from error
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{named} holds a YAML tag or key that is not plain data ({where(error)}), which is refused "
            "because such a tag can run code: remove it."
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{named} is not valid YAML ({where(error)}): correct it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{named} holds no keys: it must be a YAML mapping such as 'MODEL: ...'.")
    return content


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and value of whatever is no section, and of sections without anything in them."""
    if not isinstance(node, dict) or (prefix and not node):
        yield prefix, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _decoded(value: Any) -> Any:
    """What the config node will take a value for: it reads text as Python does, where it can."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value
    except (TypeError, MemoryError, RecursionError):
        return ...  # the node would fail: it is no value of any kind


def _plain(value: Any) -> Any:
    """Decoded, with lists for tuples, which YAML and JSON do not have."""
    value = _decoded(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _fits(value: Any, default: Any) -> bool:
    """Whether a key with this default can have this value."""
    if default is None:
        return value is None or _fits(value, 0.0)
    if isinstance(default, (list, tuple)):
        items = [float(item) if type(item) is int else item for item in default[:1]]
        return isinstance(value, (list, tuple)) and all(_fits(v, item) for v in value for item in items)
    if isinstance(default, float):  # neither infinite nor NaN
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is type(default) and (type(value) is not int or abs(value) < 2**31)


def _kind(default: Any) -> str:
    """The values that a key with this default can have, for an error message."""
    names = {bool: "True or False", int: "a whole number below 2**31", float: "a finite number", str: "text"}
    items = {int: " of numbers", float: " of numbers", str: " of texts"}
    if isinstance(default, (list, tuple)):
        return "a list" + (items.get(type(default[0]), "") if default else "")
    return names.get(type(default), "a finite number or None")
