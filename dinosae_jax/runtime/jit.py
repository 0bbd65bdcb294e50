"""How far the compiler optimises: on a CPU, where it costs minutes, by how often a program runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

LEVEL = "xla_backend_optimization_level"  # 0 to 3, the default


def jit_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns jax.jit of a program that runs a few times at most, such as an initialisation.

    On CPU the compiler's optimisation costs more time than it saves for such programs (an
    initialisation of the tiny autoencoder: 21 s of processor time against 5 s), so it is off.

    Args:
      function: the function to compile.
      **options: options of jax.jit.
    """
    return jax.jit(function, **options, **_on_cpu(0))


def jit_often(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns jax.jit of a program of training, which runs many times.

    On CPU at level 1: its products and convolutions are calls of a library, so that a step takes
    as long as at level 3, and the programs of the quickstart compile in 72 s of processor time
    less.

    Args:
      function: the function to compile.
      **options: options of jax.jit.
    """
    return jax.jit(function, **options, **_on_cpu(1))


def _on_cpu(level: int) -> dict[str, Any]:
    said = LEVEL in os.environ.get("XLA_FLAGS", "")
    return {} if jax.default_backend() != "cpu" or said else {"compiler_options": {LEVEL: level}}
