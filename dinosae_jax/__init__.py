"""DINO-SAE in JAX/Flax."""

import importlib
import importlib.metadata
from typing import Any

_LAZY = {
    "Autoencoder": "dinosae_jax.inference.autoencoder",
    "Generator": "dinosae_jax.inference.generator",
}


def __getattr__(name: str) -> Any:
    """Imports the public classes when they are first asked for; the package itself stays light."""
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
