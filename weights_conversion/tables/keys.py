"""Small questions about the keys of a state dict, and the error when they have no answer."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping

from weights_conversion.mapping import Shape
from weights_conversion.readers.stored import short

MAX_DIGITS = 3


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
        found = (shape for shape in found if 0 not in shape)  # sizes without any bytes
        votes.update(shape[axes.index("n")] for shape in found if len(shape) == len(axes))
    if votes:
        return votes.most_common(1)[0][0]
    if default is not None:
        return default
    names = " or ".join(pattern.replace("\\", "") for pattern in places)
    raise UnknownLayoutError(
        f"a {kind} state dict has {names}; got {len(shapes)} keys ("
        f"{short(', '.join(list(shapes)[:4]), 200)}, ...), so this is no {kind} state dict; check "
        "--kind and --container"
    )


def count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """1 + the largest number that the pattern's group takes at the start of a key, or 0.

    Raises:
      UnknownLayoutError: No published network has so many blocks.
    """
    found = (re.match(pattern, key) for key in shapes)
    numbers = [match[1] for match in found if match]
    absurd = next((number for number in numbers if len(number) > MAX_DIGITS), None)
    if absurd is not None:
        raise UnknownLayoutError(
            f"blocks are numbered with at most {MAX_DIGITS} digits; got number {short(absurd)}; "
            "check --kind and --container"
        )
    return max((int(number) + 1 for number in numbers), default=0)


def has(shapes: Mapping[str, Shape], pattern: str) -> bool:
    """Whether the pattern occurs in a key."""
    return any(re.search(pattern, key) for key in shapes)
