"""Words and numbers that several parts share; imports nothing, jax least of all."""

PATCH_SIZE = 16
