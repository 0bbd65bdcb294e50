"""Compilation of programs that run once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def jit_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns jax.jit of a program that runs a few times at most, such as an initialisation.

    On CPU the compiler's optimisation costs more time than it saves for such programs (an
    initialisation of the tiny autoencoder: 21 s of processor time against 5 s), so it is off.

    Args:
      function: the function to compile.
      **options: options of jax.jit.
    """
    if jax.default_backend() == "cpu":
        options["compiler_options"] = {"xla_backend_optimization_level": 0}
    return jax.jit(function, **options)
