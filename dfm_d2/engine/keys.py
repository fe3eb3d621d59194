"""Config keys as data: name, default, choices and bounds in one place. Needs no torch."""

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dfm_d2.errors import UserError

_BOUNDS = (
    ("least", "at least", operator.ge),
    ("above", "greater than", operator.gt),
    ("most", "at most", operator.le),
    ("below", "less than", operator.lt),
)
_TYPES = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a word"),
    None: (object, ""),
}


@dataclass(frozen=True)
class Key:
    """A config key and the values that it may have.

    name: with dots. default: None for a key of Detectron2, which has one.
    choices: what the value may be, or each entry of a list.
    least, most: bounds of the value, or of each entry of a list; above, below: bounds that it must not reach.
    of: type of each entry of a list. lengths: how many entries a list may have, empty: any number.
    filled: whether a list must have an entry.
    gone: {former choice: what replaced it}.
    """

    name: str
    default: Any = None
    choices: Sequence[str] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    of: type | None = None
    lengths: Sequence[int] = ()
    filled: bool = False
    gone: Mapping[str, str] = field(default_factory=dict)

    def problem(self, value: Any) -> str:
        """What is wrong with a value, as the second half of an error message; empty: nothing."""
        is_list = isinstance(value, (list, tuple))
        entries = value if is_list else (value,)
        if str(value) in self.gone:
            return self.gone[str(value)]
        if self.choices and not all(entry in self.choices for entry in entries):
            return f"choose {'among' if is_list else 'one of'} {', '.join(self.choices)}"
        if self.lengths and len(entries) not in self.lengths:
            return f"it must have {' or '.join(map(str, self.lengths))} numbers"
        if self.filled and not entries:
            return "it must not be empty"
        bounds = [
            (words, getattr(self, name), holds)
            for name, words, holds in _BOUNDS
            if getattr(self, name) is not None
        ]
        types, noun = _TYPES[self.of or (float if bounds else None)]
        # NaN is within no bounds.
        if all(
            isinstance(entry, types) and all(holds(entry, bound) for _, bound, holds in bounds)
            for entry in entries
        ):
            return ""
        allowed = " and ".join(f"{words} {bound}" for words, bound, _ in bounds)
        words = ", ".join(filter(None, [noun if is_list else "", allowed])) or noun
        return f"{'each' if is_list else 'it'} must be {words}"


def add_keys(cfg: Any, keys: Iterable[Key]) -> None:
    """Add those keys to a config, in place, that are not Detectron2's own."""
    for key in keys:
        if key.default is not None:
            _put(cfg, key.name, copy.copy(key.default))


def get_key(cfg: Any, name: str) -> Any:
    """The value of a dotted key."""
    for part in name.split("."):
        cfg = cfg[part]
    return cfg


def problems_of(cfg: Any, keys: Iterable[Key]) -> Iterator[str]:
    """One error message for each key whose value is none of its choices or out of its bounds."""
    for key in keys:
        value = get_key(cfg, key.name)
        if problem := key.problem(value):
            yield f"{key.name} is {value!r}; {problem}."


@contextmanager
def former_keys(cfg: Any, removed: Mapping[str, tuple[Any, str]], foreign: Sequence[str]) -> Iterator[None]:
    """Within it a config has keys besides its own that config files of earlier versions hold.

    removed: {key: (its default, what replaced it)}; UserError for another value than that default.
    foreign: keys of another task, of any value; "SECTION.*" is all of a section.
    """
    for name in foreign:
        section, star, _ = name.partition(".*")
        _put(cfg, section, type(cfg)(new_allowed=True) if star else None)
    for name, (default, _) in removed.items():
        _put(cfg, name, default)
    yield
    for name in foreign:
        _take(cfg, name.removesuffix(".*"))
    values = {name: _take(cfg, name) for name in removed}
    for name, (default, instead) in removed.items():
        if values[name] != default:
            raise UserError(f"{name} is {values[name]!r}, but this option was removed: {instead}.")


def _put(cfg: Any, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        cfg = cfg.setdefault(part, type(cfg)())
    cfg[last] = value


def _take(cfg: Any, name: str) -> Any:
    *path, last = name.split(".")
    return get_key(cfg, ".".join(path)).pop(last) if path else cfg.pop(last)
