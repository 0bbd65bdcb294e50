"""DiT^DH: a diffusion transformer whose encoder conditions a wide head (RAE's DiTwDDTHead).

Both halves see the same noisy latent. The encoder, with the class label in its adaLN, turns it into
one conditioning vector per token; the head denoises under per-token adaLN. Released sizes, head
2048 wide and 2 deep with 16 heads, 16x16 tokens:

  | size | encoder width, depth, heads | parameters at 1024 channels: all / trainable |
  | S    |  384, 12,  6 | 197,602,900 / 197,504,340 |
  | B    |  768, 12, 12 | 295,541,332 / 295,344,468 |
  | L    | 1024, 24, 16 | 623,055,412 / 622,793,012 |
  | XL   | 1152, 28, 16 | 840,019,540 / 839,724,372 |
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinosae_jax.models import attention, dit_blocks, positions


class DiTDH(nn.Module):
    """Class-conditional diffusion transformer with a DDT head, patch size 1.

    Pairs are (encoder, head). Linear layers start from torch's default distribution, as in the
    reference (its Xavier pass is behind a flag that is never set).

    Attributes:
      input_size: side of the latent grid.
      in_channels: channels of the latent.
      hidden_size: widths; a projection joins them only where they differ.
      depth: numbers of blocks.
      num_heads: attention heads.
      mlp_ratio: hidden width of the MLP over the width, before SwiGLU's factor 2/3.
      num_classes: K; the null label is K.
      class_dropout_prob: above 0 the label table has a row for the null label.
      use_qknorm: norm of queries and keys over the head width, before RoPE.
      use_swiglu: SwiGLU instead of a GELU MLP.
      use_rope: rotary embedding in both stacks (the reference cannot be built without it).
      use_rmsnorm: RMSNorm with a scale instead of LayerNorm without parameters.
      use_pos_embed: sin-cos table on the encoder's tokens; the head never has one.
      scan_layers: one compiled block per stack in a loop, or all of them unrolled.
      remat: 'none', 'dots' or 'full' (see `dit_blocks.block_stack`).
      dtype: of the matrix products inside the blocks, the embeddings and the projection.
      output_precision: of the products of the output layer, which is float32.
    """

    input_size: int = 16
    in_channels: int = 1024
    hidden_size: tuple[int, int] = (1152, 2048)
    depth: tuple[int, int] = (28, 2)
    num_heads: tuple[int, int] = (16, 16)
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    use_qknorm: bool = False
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    use_pos_embed: bool = True
    scan_layers: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    output_precision: str = "highest"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        encoder_state: jax.Array | None = None,
        intermediates: bool = False,
    ):
        """Predicts the velocity dx/dt.

        Args:
          x: noisy latents, [b, h, w, c], or row-major tokens [b, h * w, c].
          t: [b] in [0, 1].
          y: [b] int32 labels; num_classes is the null label (NaN out when the table lacks it).
          encoder_state: [b, n, encoder width] float32, used in place of the encoder's output (the
            reference's `s`): the encoder is skipped and so is adding the time to it; the projection
            is not.
          intermediates: whether to return module outputs too.

        Returns:
          Velocity of x's shape, float32; with `intermediates` a pair of it and a dict of module
          outputs under the reference's names (`s_embedder`, `blocks.0.attn`, `s_projector`, ...);
          the head's blocks are numbered after the encoder's.

        Raises:
          ValueError: the shape of x or the attributes do not fit together.
        """
        for width, heads in zip(self.hidden_size, self.num_heads, strict=True):
            dit_blocks.check_widths(width, heads)
        grid = dit_blocks.as_grid(x, self.input_size, self.in_channels)
        encoder_width, head_width = self.hidden_size
        seen: dict[str, jax.Array] = {}
        s = encoder_state
        if s is None:
            s = self._encode(grid, t, y, seen, intermediates)
        if encoder_width != head_width:
            project = dit_blocks.dense(
                head_width, encoder_width, "torch", self.dtype, "s_projector"
            )
            s = project(s).astype(jnp.float32)
        embed = dit_blocks.PatchEmbed(head_width, 1, self.dtype, name="x_embedder")
        final = dit_blocks.FinalLayer(
            self.in_channels, self.use_rmsnorm, self.output_precision, name="final_layer"
        )

        h = embed(grid)
        seen |= {"s_projector": s, "x_embedder": h}
        h, records = self._blocks(1, "blocks_head", intermediates)(h, s, self._rope(1))
        seen["final_layer"] = final(h, s)
        velocity = seen["final_layer"].reshape(x.shape)
        if not intermediates:
            return velocity
        return velocity, seen | dit_blocks.name_blocks(records, self.depth[0])

    def _encode(
        self, grid: jax.Array, t: jax.Array, y: jax.Array, seen: dict[str, jax.Array], record: bool
    ) -> jax.Array:
        """Per-token conditioning [b, n, encoder width]; adds its module outputs to `seen`."""
        width = self.hidden_size[0]
        rows = self.num_classes + (self.class_dropout_prob > 0)
        time = dit_blocks.TimestepEmbedder(width, "fourier", "torch", name="t_embedder")(t)
        label = dit_blocks.LabelEmbedder(rows, width, name="y_embedder")(y)
        s = dit_blocks.PatchEmbed(width, 1, self.dtype, name="s_embedder")(grid)
        seen |= {"t_embedder": time, "y_embedder": label, "s_embedder": s}
        if self.use_pos_embed:
            table = positions.sincos_table(self.input_size, width)
            s = s + self.param("pos_embed", lambda _: jnp.asarray(table)[None])
        # The blocks apply silu once more to what they are given: twice here, as in the reference.
        c = nn.silu(time + label)[:, None, :]
        s, records = self._blocks(0, "blocks_encoder", record)(s, c, self._rope(0))
        if record:
            seen |= dit_blocks.name_blocks(records, 0)
        return nn.silu(time[:, None, :] + s)  # the time alone: the label reached s through c

    def _rope(self, half: int) -> attention.Rotation | None:
        if not self.use_rope:
            return None
        head_dim = self.hidden_size[half] // self.num_heads[half]
        return attention.Rotation(*positions.rope_tables(self.input_size, head_dim), distance=1)

    def _blocks(self, half: int, name: str, record: bool):
        return dit_blocks.block_stack(
            self.depth[half],
            self.scan_layers,
            self.remat,
            name,
            num_heads=self.num_heads[half],
            mlp_ratio=self.mlp_ratio,
            use_qknorm=self.use_qknorm,
            use_swiglu=self.use_swiglu,
            use_rmsnorm=self.use_rmsnorm,
            wo_shift=False,
            initialisation="torch",
            dtype=self.dtype,
            record=record,
        )
