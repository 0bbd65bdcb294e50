"""DINO-SAE in JAX/Flax."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

_LAZY = {
    "Autoencoder": "dinosae_jax.inference.autoencoder",
    "Generator": "dinosae_jax.inference.generator",
}


def __getattr__(name: str) -> Any:
    """Imports the public classes at first use, so that the package itself imports quickly."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """The version in pyproject.toml; '0+unknown' where the package was not installed."""
    try:
        return importlib.metadata.version("dinosae-jax")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
