"""Small questions about the keys of a state dict, and the error when they have no answer."""

import collections
import re
from collections.abc import Mapping

from weights_conversion.mapping import Shape


class UnknownLayoutError(ValueError):
    """The keys do not look like the kind that was asked for; the message is one line."""


def measure(
    shapes: Mapping[str, Shape], kind: str, places: Mapping[str, str], default: int | None = None
) -> int:
    r"""The size that most tensors give to an axis.

    A vote, so that one tensor which is missing or damaged does not change the configuration: it is
    then listed beside all others that do not fit.

    Args:
      shapes: Key -> shape.
      kind: What the state dict should be, for the message.
      places: Pattern of whole keys -> their axes, "n" for the one in question, "-" for another, as
        in {"cls_token": "--n", r"norm\.(weight|bias)": "n"}; tensors with another number of axes
        have no vote.
      default: The answer where there is no vote.

    Returns:
      The size, at least 1 unless the default is less.

    Raises:
      UnknownLayoutError: There is neither a vote nor a default.
    """
    votes: collections.Counter[int] = collections.Counter()
    for pattern, axes in places.items():
        found = (shape for key, shape in shapes.items() if re.fullmatch(pattern, key))
        votes.update(shape[axes.index("n")] for shape in found if len(shape) == len(axes))
    del votes[0]
    if votes:
        return votes.most_common(1)[0][0]
    if default is not None:
        return default
    names = " or ".join(pattern.replace("\\", "") for pattern in places)
    raise UnknownLayoutError(
        f"this is no {kind} state dict: {names} is missing among {len(shapes)} keys "
        f"({', '.join(list(shapes)[:4])}, ...); check --kind and --container"
    )


def count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """1 + the largest number that the pattern's group takes at the start of a key, or 0."""
    found = (re.match(pattern, key) for key in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def has(shapes: Mapping[str, Shape], pattern: str) -> bool:
    """Whether the pattern occurs in a key."""
    return any(re.search(pattern, key) for key in shapes)
