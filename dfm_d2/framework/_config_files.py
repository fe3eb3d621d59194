"""Read config files and KEY VALUE overrides safely, with errors that a user can act on."""

import difflib
import os
import re

import yaml

_BASE_KEY = "_BASE_"


def merge_config_file(cfg, path: str) -> None:
    """Merge the YAML file at `path`, and the files that its `_BASE_` names, into `cfg`, in place.

    Never runs code from a file: Python tags in YAML are refused (Detectron2's own default accepts them).

    Raises FileNotFoundError for a missing file, and ValueError for broken YAML, Python tags, unknown keys and
    values of the wrong type; the message is one sentence that names the file and the key.
    """
    _check_yaml(cfg, path, parents=())
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
    except KeyError as error:
        key = str(error.args[0]).removeprefix("Non-existent config key: ")
        raise ValueError(
            f"Config file '{path}' sets the unknown key {key}{_suggestion(cfg, key)}."
        ) from error
    except (ValueError, AssertionError) as error:
        raise ValueError(f"Config file '{path}': {_one_line(error)}.") from error


def merge_config_opts(cfg, opts: list[str] | None) -> None:
    """Merge `[KEY, VALUE, KEY, VALUE, ...]`, as typed at the end of a command, into `cfg`, in place.

    Raises ValueError, in one sentence that names the key, for an odd count, an unknown key or a value of the
    wrong type.
    """
    opts = list(opts or [])
    if len(opts) % 2:
        raise ValueError(
            f"Config overrides come in pairs KEY VALUE, but {len(opts)} words were given "
            f"({' '.join(opts)}): the value of {opts[-1]} is missing or a space is."
        )
    known = _leaf_values(cfg)
    for key, value in zip(opts[0::2], opts[1::2]):
        if key not in known:
            if any(name.startswith(f"{key}.") for name in known):
                raise ValueError(f"Config key {key} is a section: name a key inside of it.")
            raise ValueError(f"Unknown config key {key}{_suggestion(cfg, key)}.")
        if isinstance(known[key], float) and re.fullmatch(r"[+-]?\d+", str(value)):
            value = f"{value}.0"  # a whole number typed for a key that holds a float
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, AssertionError) as error:
            raise ValueError(f"Config key {key} cannot be {value!r}: {_one_line(error)}.") from error


def _check_yaml(cfg, path: str, parents: tuple[str, ...]) -> None:
    """Raise if `path`, or a file in its chain of `_BASE_`, is missing, is no mapping, or includes itself."""
    named = f"Config file '{path}'" + (f" (the {_BASE_KEY} of '{parents[-1]}')" if parents else "")
    if path in parents:
        raise ValueError(f"{named} includes itself through {_BASE_KEY}: break the circle.")
    try:
        # The node knows how its framework opens files.
        with cfg._open_cfg(path) as file:
            content = yaml.safe_load(file)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"{named} does not exist: check the path.") from error
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{named} holds a YAML tag or key that is not plain data ({_where(error)}), which is refused "
            "because such a tag can run code: remove it."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{named} is not valid YAML ({_where(error)}): correct it.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{named} is not a text file: give a YAML config file.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{named} holds no keys: it must be a YAML mapping such as 'MODEL: ...'.")
    _check_keys(cfg, content, named)
    bases = content.get(_BASE_KEY, [])
    for base in bases if isinstance(bases, list) else [bases]:
        base = os.path.expanduser(str(base))
        if not base.startswith(("/", "https://", "http://")):
            base = os.path.join(os.path.dirname(path), base)
        _check_yaml(cfg, base, (*parents, path))


def _check_keys(cfg, content: dict, named: str, prefix: str = "") -> None:
    """Raise for keys that are no words, and for sections of `cfg` that are given a value."""
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(
                f"{named} has the key {key!r}, which is not a word: put it in quotes or correct it."
            )
        default = cfg.get(key) if isinstance(cfg, dict) else None
        if isinstance(value, dict):
            _check_keys(default, value, named, f"{prefix}{key}.")
        elif isinstance(default, dict):
            raise ValueError(f"{named} sets the section {prefix}{key} to {value!r}: set a key inside of it.")


def _where(error: yaml.YAMLError) -> str:
    """The place and the nature of a YAML error, on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    text = " ".join(str(problem).split())
    return f"line {mark.line + 1}: {text}" if mark is not None else text


def _one_line(error: Exception) -> str:
    """The message of a yacs error, on one line and without a full stop at the end."""
    text = " ".join(str(error).split())
    # yacs says it as types in angle brackets; the names alone are readable.
    return re.sub(r"<class '([^']*)'>", r"\1", text).rstrip(".")


def _leaf_values(cfg, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, value in cfg.items():
        full = f"{prefix}{name}"
        leaves |= _leaf_values(value, full + ".") if isinstance(value, dict) else {full: value}
    return leaves


def _suggestion(cfg, key: str) -> str:
    close = difflib.get_close_matches(key, _leaf_values(cfg), n=1, cutoff=0.8)
    return f": did you mean {close[0]}?" if close else ": see dfm_d2/config.py and Detectron2's defaults"
