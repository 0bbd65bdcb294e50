"""What the tests of both diffusion transformers share: random parameters, inputs, comparisons."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np


def batch(b=3, grid=4, channels=8, classes=10):
    """Latents [b, grid, grid, channels], times, labels (the last one null)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(b, grid, grid, channels)).astype(np.float32)
    labels = jnp.asarray([*range(b - 1), classes], jnp.int32)
    return jnp.asarray(x), jnp.linspace(0.0, 1.0, b), labels


def random_params(module, *args, scale=0.1):
    """Normal draws in every leaf: at initialisation all outputs and most gradients are zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(1)

    def draw(leaf):
        return jnp.asarray(scale * rng.normal(size=leaf.shape).astype(np.float32))

    return jax.tree.map(draw, shapes)


def apply(module, params, *args, **static):
    """The module on these inputs, compiled."""
    return jax.jit(functools.partial(module.apply, **static))({"params": params}, *args)


def value_and_gradients(module, params, args):
    """Velocity, and the gradients of its mean square with respect to parameters and input."""

    @jax.jit
    def run(params, x):
        def loss(params, x):
            v = module.apply({"params": params}, x, *args[1:])
            return jnp.mean(v**2), v

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, v), gradients = run(params, args[0])
    return v, gradients


def relative_error(a, b):
    """Euclidean norm of the difference of two trees over the norm of the second."""

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in tree))

    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return norm([np.asarray(x, np.float64) - np.asarray(y, np.float64) for x, y in leaves]) / norm(
        [y for _, y in leaves]
    )


def equations(jaxpr):
    """All equations of a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in itertools.chain.from_iterable(
            v if isinstance(v, (tuple, list)) else [v] for v in equation.params.values()
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def check_float32_parts(jaxpr):
    """Holds norms, softmax, positions, times and the residual stream of a bf16 model to float32."""
    seen = set()
    for equation in equations(jaxpr):
        name = equation.primitive.name
        if name in {"rsqrt", "exp", "sin", "cos", "reduce_sum", "reduce_max"}:
            assert equation.invars[0].aval.dtype == jnp.float32, equation
            seen.add(name)
        if name == "scan":  # the carry of the stack of blocks is the residual stream
            results = zip(equation.outvars, equation.params["jaxpr"].out_avals, strict=True)
            carry = [v.aval for v, aval in results if v.aval.shape == aval.shape]  # rest is stacked
            assert carry and all(aval.dtype != jnp.bfloat16 for aval in carry), equation
            seen.add(name)
        if name == "dot_general":
            seen.add(str(equation.invars[0].aval.dtype))
    assert {"rsqrt", "exp", "sin", "cos", "scan", "bfloat16"} <= seen


def count(module, channels, fixed_bases, grid=16):
    """Parameters (all, without the fixed bases) of a full-size model, by shapes alone."""
    x = jax.ShapeDtypeStruct((1, grid, grid, channels), jnp.float32)
    vectors = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), x, *vectors)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    fixed = sum(leaf.size for path, leaf in leaves if path[-1].key in fixed_bases)
    total = sum(leaf.size for _, leaf in leaves)
    return total, total - fixed
