"""LightningDiT, in the original's form and in RAE's.

One class: the two differ in the time embedding, and in which flags they use. Sizes (registry of
the original; S and L as in RAE, which has no registry), patch 1 on a 16x16 grid, RMSNorm + SwiGLU:

  | size | width | depth | heads | parameters, RAE's form, 1024 channels: all / trainable |
  | S    |   384 |    12 |     6 |  33,846,656 /  33,748,096 |
  | B    |   768 |    12 |    12 | 132,277,760 / 132,080,896 |
  | L    |  1024 |    24 |    16 | 460,447,968 / 460,185,568 |
  | XL   |  1152 |    28 |    16 | 677,838,464 / 677,543,296 |
  | 1p0B |  1536 |    24 |    24 | original's form, 32 channels: 1,029,401,120 / 1,029,007,904 |
  | 1p6B |  1792 |    28 |    28 | original's form, 32 channels: 1,631,767,120 / 1,631,308,368 |
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinosae_jax.models import attention, dit_blocks, positions

# Leaves that the reference marks as not trainable (RAE's training script trains them nevertheless).
FIXED_BASES = ("pos_embed", "W")


def drop_labels(labels: jax.Array, uniforms: jax.Array, probability: float, null: int) -> jax.Array:
    """Replaces each label by the null label where its own uniform draw is below `probability`.

    Args:
      labels: [b] int32.
      uniforms: [b] in [0, 1), one independent draw per example.
      probability: rate of replacement, 0.1 in the reference.
      null: the null label, num_classes.

    Returns:
      [b] int32.
    """
    return jnp.where(uniforms < probability, null, labels)


class LightningDiT(nn.Module):
    """Class-conditional diffusion transformer with adaLN blocks (LightningDiT; RAE's variant).

    Attributes:
      input_size: side of the latent grid.
      patch_size: side of a patch.
      in_channels: channels of the latent.
      hidden_size: width d.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_ratio: hidden width of the MLP over d, before SwiGLU's factor 2/3.
      num_classes: K; the null label is K.
      class_dropout_prob: above 0 the label table has a row for the null label. Labels are dropped
        by the caller (`drop_labels`), never here.
      use_qknorm: norm of queries and keys over the head width, before RoPE.
      use_swiglu: SwiGLU instead of a GELU MLP.
      use_rope: rotary embedding of queries and keys.
      use_rmsnorm: RMSNorm with a scale instead of LayerNorm without parameters.
      wo_shift: adaLN without shifts inside the blocks.
      learn_sigma: the output layer has twice the channels; the second half is discarded.
      time_embedding: 'sinusoidal' (original) or 'fourier' (RAE).
      scan_layers: one compiled block in a loop, or all of them unrolled.
      remat: 'none', 'dots' or 'full' (see `dit_blocks.block_stack`).
      dtype: of the matrix products inside the blocks and the patch embedding.
      output_precision: of the products of the output layer, which is float32.
    """

    input_size: int = 16
    patch_size: int = 1
    in_channels: int = 1024
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    use_qknorm: bool = False
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    wo_shift: bool = False
    learn_sigma: bool = False
    time_embedding: Literal["sinusoidal", "fourier"] = "fourier"
    scan_layers: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    output_precision: str = "highest"

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array, intermediates: bool = False):
        """Predicts the velocity dx/dt.

        Args:
          x: noisy latents, [b, h, w, c], or row-major tokens [b, h * w, c].
          t: [b] in [0, 1].
          y: [b] int32 labels; num_classes is the null label (NaN out when the table lacks it).
          intermediates: whether to return module outputs too.

        Returns:
          Velocity of x's shape, float32; with `intermediates` a pair of it and a dict of module
          outputs under the reference's names (`x_embedder`, `blocks.0.attn`, `final_layer`, ...).

        Raises:
          ValueError: the shape of x or the attributes do not fit together.
        """
        self._check()
        grid = dit_blocks.as_grid(x, self.input_size, self.in_channels)
        side = self.input_size // self.patch_size
        embed = dit_blocks.PatchEmbed(
            self.hidden_size, self.patch_size, self.dtype, name="x_embedder"
        )
        time = dit_blocks.TimestepEmbedder(
            self.hidden_size, self.time_embedding, "xavier", name="t_embedder"
        )
        rows = self.num_classes + (self.class_dropout_prob > 0)
        label = dit_blocks.LabelEmbedder(rows, self.hidden_size, name="y_embedder")
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        final = dit_blocks.FinalLayer(
            self.patch_size**2 * channels,
            self.use_rmsnorm,
            self.output_precision,
            name="final_layer",
        )

        seen = {"x_embedder": embed(grid), "t_embedder": time(t), "y_embedder": label(y)}
        h = seen["x_embedder"] + self._pos_embed(side)
        c = (seen["t_embedder"] + seen["y_embedder"])[:, None, :]
        rope = None
        if self.use_rope:
            tables = positions.rope_tables(side, self.hidden_size // self.num_heads)
            rope = attention.Rotation(*tables, distance=1)
        h, records = self._blocks(intermediates)(h, c, rope)
        seen["final_layer"] = final(h, c)
        velocity = self._unpatchify(seen["final_layer"], side)[..., : self.in_channels]
        velocity = velocity.reshape(x.shape)
        if not intermediates:
            return velocity
        return velocity, seen | dit_blocks.name_blocks(records, 0)

    def _check(self) -> None:
        dit_blocks.check_widths(self.hidden_size, self.num_heads)
        if self.input_size % self.patch_size:
            raise ValueError(
                "input_size must be a multiple of patch_size; got "
                f"{self.input_size} and {self.patch_size}; change one of them"
            )
        if self.time_embedding not in ("sinusoidal", "fourier"):
            raise ValueError(
                f"time_embedding must be 'sinusoidal' or 'fourier'; got {self.time_embedding!r}; "
                "choose one of them"
            )

    def _pos_embed(self, side: int) -> jax.Array:
        return self.param(
            "pos_embed", lambda _: jnp.asarray(positions.sincos_table(side, self.hidden_size))[None]
        )

    def _blocks(self, record: bool):
        return dit_blocks.block_stack(
            self.depth,
            self.scan_layers,
            self.remat,
            "blocks",
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            use_qknorm=self.use_qknorm,
            use_swiglu=self.use_swiglu,
            use_rmsnorm=self.use_rmsnorm,
            wo_shift=self.wo_shift,
            initialisation="xavier",
            dtype=self.dtype,
            record=record,
        )

    def _unpatchify(self, tokens: jax.Array, side: int) -> jax.Array:
        """[b, n, p * p * c] with the channel fastest -> [b, h, w, c]."""
        b, p = tokens.shape[0], self.patch_size
        patches = tokens.reshape(b, side, side, p, p, -1)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, self.input_size, self.input_size, -1)
