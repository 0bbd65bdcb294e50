"""Small questions about the keys of a state dict, and the error when they have no answer."""

import re
from collections.abc import Mapping

from weights_conversion.rules import Shape


class UnknownLayoutError(ValueError):
    """The keys do not look like the kind that was asked for; the message is one line."""


def shape_of(shapes: Mapping[str, Shape], key: str, kind: str) -> Shape:
    """Shape of a key that every file of a kind has.

    Raises:
      UnknownLayoutError: The key is missing.
    """
    if key not in shapes:
        some = ", ".join(list(shapes)[:4])
        raise UnknownLayoutError(
            f"this is no {kind} state dict: {key} is missing among {len(shapes)} keys ({some}, "
            "...); check --kind and --container"
        )
    return shapes[key]


def count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """1 + the largest number that the pattern's group takes at the start of a key, or 0."""
    found = (re.match(pattern, key) for key in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def has(shapes: Mapping[str, Shape], pattern: str) -> bool:
    """Whether the pattern occurs in a key."""
    return any(re.search(pattern, key) for key in shapes)
