"""How far a program is optimised on a CPU."""

import os

import jax.numpy as jnp
import pytest

from dinosae_jax.runtime import jit


@pytest.fixture
def options(monkeypatch):
    """What jax.jit is given."""
    given = {}
    monkeypatch.setattr(jit.jax, "jit", lambda function, **options: given.update(options))
    return given


@pytest.mark.parametrize(("wrap", "level"), [(jit.jit_once, 0), (jit.jit_often, 1)])
def test_the_level_on_a_cpu_unless_the_flags_say_one(options, monkeypatch, wrap, level):
    flags = os.environ["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", "")
    wrap(jnp.sin, donate_argnums=0)
    assert options == {"donate_argnums": 0, "compiler_options": {jit.LEVEL: level}}
    options.clear()
    monkeypatch.setenv("XLA_FLAGS", flags)  # of the tests
    wrap(jnp.sin)
    assert options == {}


def test_other_platforms_are_left_alone(options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jit.jax, "default_backend", lambda: "tpu")
    jit.jit_often(jnp.sin)
    assert options == {}
