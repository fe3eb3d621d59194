"""YAML as data: nothing of a text is run, and none of it can fill the memory."""

import math
from typing import Any

import yaml

MOST_CHARACTERS = 1_000_000  # of a YAML text, and values after its aliases


def read_yaml(text: str) -> Any:
    """What `yaml.safe_load` returns, of a text not too long, too deep or, with its aliases, too large.

    Raises yaml.YAMLError.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"more than {MOST_CHARACTERS} characters")
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        """How many values it has where each alias counts as what it repeats; infinite within itself."""
        if id(node) not in sizes:
            sizes[id(node)] = math.inf
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            each = (n for part in parts for n in (part if isinstance(part, tuple) else (part,)))
            sizes[id(node)] = 1 + sum(map(size, each))
        return sizes[id(node)]

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None and size(node) > MOST_CHARACTERS:
            raise yaml.YAMLError(f"aliases that make it more than {MOST_CHARACTERS} values, or endless")
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("lists or sections in each other, too deep") from error
    except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from error
    finally:
        loader.dispose()


def where(error: yaml.YAMLError) -> str:
    """The place and the nature of a YAML error, on one line."""
    mark = getattr(error, "problem_mark", None)
    text = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"line {mark.line + 1}: {text}" if mark is not None else text
