"""The command `dinosae`, and `python -m dinosae_jax`: what `python -m dinosae_jax.main` does."""

from __future__ import annotations

from dinosae_jax.runtime import terminal

terminal.end_on_keyboard()  # before the imports that take time

from dinosae_jax.main import run  # noqa: E402

if __name__ == "__main__":
    run()
