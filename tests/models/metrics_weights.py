"""Helpers of the metric networks' tests: torch state dicts as Flax trees, and seeded weights.

The recordings of full-size networks hold no weights: each tensor is drawn from numpy's legacy
generator, seeded by the tensor's name, and a crc32 of its bytes is recorded beside the outputs.
"""

import ast
import zlib

import flax.traverse_util
import numpy as np

RECORDING_SEED = 1234
LEAF_NAMES = {"weight_orig": "kernel", "weight_u": "u", "weight_v": "v"}
STATISTICS = {"running_mean": "mean", "running_var": "var"}


def group(npz, prefix):
    """The arrays of an npz file below a prefix, by the rest of their name."""
    return {k.removeprefix(prefix): npz[k] for k in npz.files if k.startswith(prefix)}


def flax_variables(state):
    """Maps a torch state dict to Flax variables by the naming rule of the module docstrings."""
    flat = {}
    for key, value in state.items():
        *parents, leaf = key.split(".")
        path = []
        for part in parents:
            if part.isdigit() and path:
                path[-1] += f"_{part}"
            else:
                path.append(part)
        collection = "params"
        if leaf in ("weight_u", "weight_v"):
            collection = "spectral"
        elif leaf in STATISTICS:
            collection, leaf = "batch_stats", STATISTICS[leaf]
        elif leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
        flat[(collection, *path, LEAF_NAMES.get(leaf, leaf))] = _to_flax_layout(leaf, value)
    return flax.traverse_util.unflatten_dict(flat)


def _to_flax_layout(leaf, value):
    if leaf not in ("kernel", "weight_orig"):
        return value
    order = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}[value.ndim]
    return value.transpose(order)


def stack_blocks(params):
    """Replaces blocks_0, blocks_1, ... by one subtree `blocks` with a leading depth axis."""
    depth = sum(name.startswith("blocks_") for name in params)
    blocks = [flax.traverse_util.flatten_dict(params[f"blocks_{i}"]) for i in range(depth)]
    stacked = {path: np.stack([block[path] for block in blocks]) for path in blocks[0]}
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    return {**rest, "blocks": flax.traverse_util.unflatten_dict(stacked)}


def seeded_state(names, shapes, kind_of, checksums):
    """Draws the tensors of a recording and compares their checksums.

    Args:
        names: state-dict keys.
        shapes: their shapes, as tuples or as text such as '(3, 4)'.
        kind_of: function from a key to the kind of its tensor, see `_seeded_tensor`.
        checksums: recorded crc32 of each tensor's float32 bytes.
    """
    state = {}
    for name, shape, checksum in zip(names, shapes, checksums, strict=True):
        sides = ast.literal_eval(str(shape))
        tensor = _seeded_tensor(str(name), sides, kind_of(str(name)))
        assert zlib.crc32(tensor.tobytes()) == checksum, f"{name} was drawn differently"
        state[str(name)] = tensor
    return state


def _seeded_tensor(name, shape, kind):
    """Draws one tensor; kinds: a gain (He normal), or one of the names below."""
    seed = (RECORDING_SEED * 1000003 + zlib.crc32(name.encode())) % 2**32
    source = np.random.RandomState(seed)
    if kind == "variance":
        return (0.8 + 0.4 * source.uniform(size=shape)).astype(np.float32)
    noise = source.standard_normal(size=shape)
    if isinstance(kind, float):
        return (noise * np.sqrt(kind / np.prod(shape[1:]))).astype(np.float32)
    mean, deviation = {"bias": (0, 0.05), "scale": (1, 0.1), "shift": (0, 0.1), "token": (0, 0.5)}[
        kind
    ]
    return (mean + deviation * noise).astype(np.float32)


def relative_error(actual, expected):
    """Largest difference over the largest magnitude of the expected values (at least 1e-30)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)


# EfficientNet-Lite0's blocks: input, kernel, stride, expansion, output.
EFFICIENTNET_BLOCKS = (
    (32, 3, 1, 1, 16),
    (16, 3, 2, 6, 24), (24, 3, 1, 6, 24),
    (24, 5, 2, 6, 40), (40, 5, 1, 6, 40),
    (40, 3, 2, 6, 80), (80, 3, 1, 6, 80), (80, 3, 1, 6, 80),
    (80, 5, 1, 6, 112), (112, 5, 1, 6, 112), (112, 5, 1, 6, 112),
    (112, 5, 2, 6, 192), (192, 5, 1, 6, 192), (192, 5, 1, 6, 192), (192, 5, 1, 6, 192),
    (192, 3, 1, 6, 320),
)  # fmt: skip


def efficientnet_state():
    """A random state dict with the keys, shapes and dtypes of the published file, in its order."""
    source = np.random.RandomState(0)
    state = {}

    def convolution(name, *shape):
        gain = np.sqrt(2.0 / np.prod(shape[1:]))
        state[f"{name}.weight"] = (gain * source.standard_normal(shape)).astype(np.float32)

    def norm(name, width):
        state[f"{name}.weight"] = (1.0 + 0.1 * source.standard_normal(width)).astype(np.float32)
        for leaf in ("bias", "running_mean"):
            state[f"{name}.{leaf}"] = (0.1 * source.standard_normal(width)).astype(np.float32)
        state[f"{name}.running_var"] = source.uniform(0.8, 1.2, width).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    convolution("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    for i, (narrow, kernel, _, expansion, channels) in enumerate(EFFICIENTNET_BLOCKS):
        block, wide = f"_blocks.{i}", expansion * narrow
        if expansion > 1:
            convolution(f"{block}._expand_conv", wide, narrow, 1, 1)
            norm(f"{block}._bn0", wide)
        convolution(f"{block}._depthwise_conv", wide, 1, kernel, kernel)
        norm(f"{block}._bn1", wide)
        convolution(f"{block}._project_conv", channels, wide, 1, 1)
        norm(f"{block}._bn2", channels)
    convolution("_conv_head", 1280, 320, 1, 1)
    norm("_bn1", 1280)
    convolution("_fc", 1000, 1280)
    state["_fc.bias"] = (0.05 * source.standard_normal(1000)).astype(np.float32)
    return state
