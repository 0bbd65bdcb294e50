"""Self-attention of a fused projection: which implementation a device gets, and why.

  | implementation | where                         | what it is                              |
  | rows           | TPU, bfloat16, rows fit VMEM  | `attention_rows`, an example at a time  |
  | flash          | TPU, bfloat16, longer rows    | jax's own Pallas kernel, heads apart    |
  | cudnn          | GPU, bfloat16                 | cuDNN's, by jax.nn                      |
  | xla            | CPU, float32, odd widths      | scores in memory                        |

The platform is that of the mesh in whose context a program is traced, so that programs for absent
devices are what those devices would run. Kernels cannot be partitioned by the compiler: they run
inside `jax.shard_map` over the batch axes. Logits and softmax are float32 in all four.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from dinosae_jax.models import attention_rows, layers
from dinosae_jax.runtime import fsdp

Implementation = Literal["rows", "flash", "cudnn", "xla"]
FLASH_BLOCK = 512  # tokens, to a multiple of which rows are filled up


@struct.dataclass
class Rotation:
    """Rotary embedding: pairs of channels of each head turn by an angle per token.

    Attributes:
      cos: [n, head width] float32, equal for both channels of a pair.
      sin: likewise.
      distance: channels between the two of a pair: 1 for neighbours, half a head for halves.
    """

    cos: jax.Array | np.ndarray
    sin: jax.Array | np.ndarray
    distance: int = struct.field(pytree_node=False)


class Choice(NamedTuple):
    """An implementation and the reason for it."""

    implementation: Implementation
    reason: str


def choose(
    platform: str, dtype: Any, tokens: int, width: int, num_heads: int, distance: int = 1
) -> Choice:
    """The implementation for a program on a platform.

    Args:
      platform: of the devices, 'tpu', 'gpu', 'cuda' or 'cpu'.
      dtype: of the fused projection.
      tokens: length n of the rows.
      width: d, all heads together.
      num_heads: heads.
      distance: of the rotated pairs.
    """
    if platform not in ("tpu", "gpu", "cuda"):
        return Choice("xla", f"no kernel for {platform}")
    if dtype != jnp.bfloat16:
        return Choice("xla", f"the kernels compute in bfloat16; got {jnp.dtype(dtype).name}")
    if platform != "tpu":
        fits = width // num_heads % 8 == 0 and width // num_heads <= 128
        return (
            Choice("cudnn", "fused") if fits else Choice("xla", "cuDNN's heads are 8 to 128 wide")
        )
    if width % attention_rows.LANES:
        return Choice("xla", f"a TPU's registers have 128 lanes, which do not divide {width}")
    fits = attention_rows.memory(tokens, width) <= _core_memory() // 2
    if fits and attention_rows.turns_within_registers(width, distance):
        return Choice("rows", "an example's rows fit in the core's memory")
    return Choice("flash", "rows are too long for the core's memory, or pairs span registers")


def attention(qkv: jax.Array, num_heads: int, rotation: Rotation | None = None) -> jax.Array:
    """Softmax self-attention with rotary embedding.

    Args:
      qkv: [b, n, 3 * d]: queries, keys and values, each with its heads side by side.
      num_heads: heads, which divide d.
      rotation: of queries and keys, computed in float32.

    Returns:
      [b, n, d] in qkv's dtype, under the name that the remat policy 'dots' keeps.
    """
    n, d = qkv.shape[1], qkv.shape[2] // 3
    distance = 1 if rotation is None else rotation.distance
    chosen = choose(_platform(), qkv.dtype, n, d, num_heads, distance).implementation
    if chosen == "rows":
        tables = None if rotation is None else _side_by_side(rotation, num_heads)
        rows = lambda x, t: attention_rows.attend(x, t, num_heads, distance)  # noqa: E731
        out = fsdp.per_device(rows, shared=1)(qkv, tables)
    else:
        q, k, v = (x.reshape(*x.shape[:2], num_heads, -1) for x in jnp.split(qkv, 3, axis=-1))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if chosen == "flash":
            out = fsdp.per_device(_flash)(q, k, v)
        else:
            run = functools.partial(jax.nn.dot_product_attention, implementation=chosen)
            out = run(q, k, v)
        out = out.reshape(*out.shape[:2], d)
    return checkpoint_name(out, layers.PRODUCT)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns pairs (a, b) to (a cos - b sin, b cos + a sin), in float32: [b, n, k, hd], like x."""
    pairs = (*x.shape[:-1], x.shape[-1] // (2 * rotation.distance), 2, rotation.distance)
    cos, sin = (table[:, None, :] for table in (rotation.cos, rotation.sin))
    wide = x.astype(jnp.float32)
    sign = jnp.array([-1.0, 1.0])[:, None]
    partner = (wide.reshape(pairs)[..., ::-1, :] * sign).reshape(x.shape)
    return (wide * cos + partner * sin).astype(x.dtype)


def _platform() -> str:
    """Of the mesh in context, whether its devices are present or not; without one this machine's.

    A kernel outside a mesh could not be partitioned, so a TPU of several devices gets none there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    return "cpu" if jax.default_backend() == "tpu" else jax.default_backend()


def _core_memory() -> int:
    """Bytes of the vector memory of a core of the mesh's TPUs."""
    return pltpu.get_tpu_info().vmem_capacity_bytes


def _side_by_side(rotation: Rotation, num_heads: int) -> attention_rows.Tables:
    return jnp.tile(rotation.cos, (1, num_heads)), jnp.tile(rotation.sin, (1, num_heads))


def _flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The kernel of jax on [b, n, k, hd], rows filled up with tokens of a segment of their own."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    b, n, _, width = q.shape
    fill = -n % FLASH_BLOCK
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, fill), (0, 0))) for x in (q, k, v))
    segment = jnp.broadcast_to((jnp.arange(n + fill) >= n).astype(jnp.int32), (b, n + fill))
    ids = flash.SegmentIds(segment, segment)
    out = flash.flash_attention(q, k, v, segment_ids=ids, sm_scale=width**-0.5)
    return out[:, :, :n].swapaxes(1, 2)
