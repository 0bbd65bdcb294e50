"""Hinge losses of the discriminator and the generator, and the weight that balances the latter.

Mirrors stage 1 of RAE (arXiv 2510.11690, github.com/bytetriper/RAE). The adaptive weight is that of
VQGAN (Esser et al., "Taming Transformers", arXiv 2012.09841, eq. 7) with RAE's epsilon; its two
gradients are those of the decoder's last kernel, and the last layer alone is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """Computes the hinge loss 0.5 (mean relu(1 - real) + mean relu(1 + fake)).

    Args:
      real_logits: [b, n], the discriminator's on images of the data.
      fake_logits: [b, n], the discriminator's on reconstructions.

    Returns:
      Scalar float32; 1 where all logits are 0.
    """
    real = jax.nn.relu(1.0 - real_logits.astype(jnp.float32)).mean()
    fake = jax.nn.relu(1.0 + fake_logits.astype(jnp.float32)).mean()
    return 0.5 * (real + fake)


def generator_loss(fake_logits: jax.Array) -> jax.Array:
    """Computes -mean(logits [b, n]), the hinge generator's loss: scalar float32."""
    return -fake_logits.astype(jnp.float32).mean()


def quantise(images: jax.Array) -> jax.Array:
    """Clips images in [0, 1] and rounds them to multiples of 1/255, as 8-bit files would.

    The discriminator step sees fakes this way, so that it cannot tell them from real images by
    their precision. No gradient passes.
    """
    levels = jnp.round(jnp.clip(images.astype(jnp.float32), 0.0, 1.0) * 255.0)
    return jax.lax.stop_gradient(levels / 255.0)


def adaptive_weight(
    grad_norm_reconstruction: jax.Array,
    grad_norm_adversarial: jax.Array,
    maximum: float = 1e4,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Computes clip(reconstruction / (adversarial + epsilon), 0, maximum).

    Args:
      grad_norm_reconstruction: scalar, norm of the reconstruction loss's gradient.
      grad_norm_adversarial: scalar, norm of the generator loss's gradient, same parameters.
      maximum: the value that the weight takes when the adversarial gradient vanishes.
      epsilon: RAE's 1e-6 (VQGAN has 1e-4).

    Returns:
      Scalar float32, a constant for the gradient.
    """
    ratio = grad_norm_reconstruction / (grad_norm_adversarial + epsilon)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, maximum))


def last_layer_adaptive_weight(
    head_fn: Callable[[jax.Array, jax.Array], jax.Array],
    kernel: jax.Array,
    features: jax.Array,
    grad_reconstruction: jax.Array,
    grad_adversarial: jax.Array,
    maximum: float = 1e4,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Computes the adaptive weight from pixel cotangents, through the last layer alone.

    The layer is linearised once and its VJP is applied to both cotangents. On a sharded batch
    the norms are those of the global batch's gradients.

    Args:
      head_fn: (kernel, features) -> images [b, h, w, 3], the decoder's last layer and whatever
        follows it.
      kernel: the last layer's kernel.
      features: the last layer's input.
      grad_reconstruction: [b, h, w, 3], gradient of the reconstruction losses with respect to the
        images.
      grad_adversarial: the same of the generator loss.
      maximum: see `adaptive_weight`.
      epsilon: see `adaptive_weight`.

    Returns:
      Scalar float32, a constant for the gradient.
    """
    _, vjp = jax.vjp(lambda kernel: head_fn(kernel, features), kernel)

    def norm(cotangent: jax.Array) -> jax.Array:
        return jnp.linalg.norm(vjp(cotangent)[0].astype(jnp.float32).ravel())

    return adaptive_weight(norm(grad_reconstruction), norm(grad_adversarial), maximum, epsilon)
