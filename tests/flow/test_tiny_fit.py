"""The parts together: a small network learns three clusters on S^7; every sampler finds them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dinosae_jax.flow import guidance, matching, schedule, sphere
from dinosae_jax.flow.samplers import SAMPLERS, sample

pytestmark = pytest.mark.slow  # fast: tests of the step's loss, and of samplers on exact fields

WIDTH, CLASSES, HIDDEN, BATCH = 8, 3, 64, 256
RADIUS = WIDTH**0.5
SHIFT = 2.0
CENTRES = sphere.project(jax.random.normal(jax.random.key(0), (CLASSES, 1, WIDTH)), RADIUS)
PATH = matching.make_path("geodesic", RADIUS)


def network(params, x, t, labels):
    """Two hidden layers on the point, the time and the label; label CLASSES is the null label."""
    time = sphere.align(t, x)
    times = jnp.concatenate([jnp.sin(3 * k * time) for k in (1, 2)] + [time], axis=-1)
    one_hot = jax.nn.one_hot(labels, CLASSES + 1)[:, None]
    h = jnp.concatenate([x, times, one_hot], axis=-1)
    for name in ("first", "second"):
        h = jax.nn.silu(h @ params[name] + params[f"{name}_bias"])
    return h @ params["last"]


def init(key):
    sizes = {"first": WIDTH + 3 + CLASSES + 1, "second": HIDDEN}
    keys = dict(zip(sizes, jax.random.split(key, len(sizes)), strict=True))
    params = {n: jax.random.normal(keys[n], (s, HIDDEN)) / s**0.5 for n, s in sizes.items()}
    return (
        params
        | {f"{n}_bias": jnp.zeros(HIDDEN) for n in sizes}
        | {"last": jnp.zeros((HIDDEN, WIDTH))}
    )


def draw(step):
    """Data near the centres, noise, times and labels (a fifth of them dropped) of one step."""
    key = jax.random.fold_in(jax.random.key(1), step)
    names = ("data", "noise", "time", "drop")
    indices = jnp.arange(BATCH)
    keys = {
        n: matching.example_keys(jax.random.fold_in(key, i), indices) for i, n in enumerate(names)
    }
    labels = indices % CLASSES
    x0 = sphere.rotate(keys["data"], CENTRES[labels], 0.05)
    dropped = jax.vmap(jax.random.uniform)(keys["drop"]) < 0.2
    t = schedule.draw_times(keys["time"], shift=SHIFT)
    return x0, PATH.prior(keys["noise"], (1, WIDTH)), t, jnp.where(dropped, CLASSES, labels)


@pytest.fixture(scope="module")
def fitted():
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 600))

    def objective(params, step):
        x0, x1, t, labels = draw(step)
        predict = lambda x, t: network(params, x, t, labels)  # noqa: E731
        terms = matching.loss(predict, PATH, x0, x1, t, radial_weight=0.1)
        return terms["rfm"], terms

    def update(carry, step):
        params, state = carry
        (_, terms), gradients = jax.value_and_grad(objective, has_aux=True)(params, step)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), terms

    params = init(jax.random.key(2))
    run = jax.jit(lambda carry: jax.lax.scan(update, carry, jnp.arange(600)))
    (params, _), terms = run((params, optimizer.init(params)))
    return params, jax.tree.map(np.asarray, terms)


def test_loss_falls_from_the_mean_square_speed(fitted):
    _, terms = fitted
    # angles between random directions on S^7: E W^2 = pi^2/4 + Var W, about 2.6
    assert terms["rfm"][0] == pytest.approx(2.6, rel=0.1)
    assert terms["tangential"][-20:].mean() < 0.5
    assert terms["radial"][-20:].mean() < 0.5


@pytest.mark.parametrize("method", SAMPLERS)
def test_every_sampler_reaches_the_right_cluster(fitted, method):
    params, _ = fitted
    labels = jnp.arange(96) % CLASSES
    x1 = PATH.prior(matching.example_keys(jax.random.key(9), jnp.arange(96)), (1, WIDTH))

    @jax.jit
    def generate(params):
        velocity = guidance.classifier_free(
            partial(network, params), labels, CLASSES, 1.2, (0.1, 1.0)
        )
        return sample(velocity, x1, schedule.time_grid(20, SHIFT), method, RADIUS)

    x0 = generate(params)
    angles = sphere.angle(x0, CENTRES[:, 0])  # against each class's centre: [96,3]
    assert np.mean(np.argmin(angles, axis=1) == labels) == 1.0
    assert np.mean(np.min(angles, axis=1)) < 0.25
