"""Config keys as data: name, default, choices and bounds in one place. Needs no torch and no framework."""

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("greater than", operator.gt),
    "most": ("at most", operator.le),
    "below": ("less than", operator.lt),
}
_NOUNS = {int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Key:
    """A config key and the values that it may have.

    name: with dots. default: None for a key of Detectron2, which has one.
    choices: what the value may be. least, most: its bounds; above, below: bounds that it must not reach. Of a
    list, each entry is meant; None is in all bounds.
    of: type of the entries of a list whose default is empty. filled: whether a list must have an entry.
    lengths: how many entries a list may have; empty: any number.
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
    filled: bool = False
    lengths: Sequence[int] = ()
    gone: Mapping[str, str] = field(default_factory=dict)

    def problem(self, value: Any) -> str:
        """What is wrong with a value of the right type, as the end of an error message; empty: nothing."""
        is_list = isinstance(value, (list, tuple))
        entries, each = (value, "each") if is_list else ([value] if value is not None else [], "it")
        if str(value) in self.gone:
            return self.gone[str(value)]
        if self.choices and not all(entry in self.choices for entry in entries):
            return f"choose {'among' if is_list else 'one of'} {', '.join(self.choices)}"
        if self.of and not all(
            type(entry) is self.of and (self.of is str or abs(entry) < 2**31) for entry in entries
        ):
            return f"each must be {_NOUNS[self.of]}"
        if self.lengths and len(entries) not in self.lengths:
            return f"it must have {' or '.join(map(str, self.lengths))} numbers"
        if self.filled and not entries:
            return "it must not be empty"
        bounds = [
            (*_BOUNDS[name], getattr(self, name)) for name in _BOUNDS if getattr(self, name) is not None
        ]
        if all(holds(entry, bound) for _, holds, bound in bounds for entry in entries):  # never for NaN
            return ""
        return f"{each} must be {' and '.join(f'{words} {bound}' for words, _, bound in bounds)}"


def add_keys(cfg, keys: Iterable[Key]) -> None:
    """Add those keys to a config, in place, that are not Detectron2's own."""
    for key in keys:
        if key.default is not None:
            node, (*path, last) = cfg, key.name.split(".")
            for part in path:
                node = node.setdefault(part, type(cfg)())
            node[last] = copy.copy(key.default)


def get_key(cfg, name: str) -> Any:
    """The value of a dotted key."""
    for part in name.split("."):
        cfg = cfg[part]
    return cfg


def problems_of(cfg, keys: Iterable[Key]) -> Iterator[str]:
    """One error message for each key whose value is none of its choices or out of its bounds."""
    for key in keys:
        value = get_key(cfg, key.name)
        if problem := key.problem(value):
            yield f"{key.name} is {value!r}; {problem}."


def lookup(config: Any, key: str) -> Any:
    """The value of a dotted key in nested dicts, None where it is missing."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
