"""A small writer of torch's zip format, so that these tests need no torch."""

import collections
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

TYPES = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
}


class Global(str):
    """`module name`, written as a GLOBAL opcode."""


class Call(collections.namedtuple("Call", "function arguments")):
    """A REDUCE of a global with an argument tuple."""


class Persistent(tuple):
    """A persistent id."""


class Pickle:
    """Writes the opcodes that torch.save uses; tensors go to `storages`."""

    def __init__(self):
        self.out = io.BytesIO()
        self.out.write(b"\x80\x02")
        self.storages: dict[str, np.ndarray] = {}

    def tensor(self, array: np.ndarray) -> Call:
        key = str(len(self.storages))
        self.storages[key] = np.ascontiguousarray(array)
        steps = np.cumprod([1, *array.shape[:0:-1]])[::-1] if array.ndim else []
        return rebuild(
            storage(key, TYPES[str(array.dtype)], array.size), 0, array.shape, map(int, steps)
        )

    def write(self, value) -> None:
        w = self.out.write
        match value:
            case np.ndarray():
                self.write(self.tensor(value))
            case Global():
                w(b"c" + value.replace(" ", "\n").encode() + b"\n")
            case Persistent():
                self.write(tuple(value))
                w(b"Q")
            case Call():
                self.write(value.function)
                self.write(tuple(value.arguments))
                w(b"R")
            case dict():
                self.write_dict(value)
            case tuple() | list():
                w(b"(" if isinstance(value, tuple) else b"](")
                for item in value:
                    self.write(item)
                w(b"t" if isinstance(value, tuple) else b"e")
            case _:
                self.write_scalar(value)

    def write_dict(self, value) -> None:
        if isinstance(value, collections.OrderedDict):
            self.write(Call(Global("collections OrderedDict"), ()))
        else:
            self.out.write(b"}")
        self.out.write(b"(")
        for key, item in value.items():
            self.write(key)
            self.write(item)
        self.out.write(b"u")

    def write_scalar(self, value) -> None:
        w = self.out.write
        match value:
            case None | True | False:
                w({None: b"N", True: b"\x88", False: b"\x89"}[value])
            case int() if -(2**31) <= value < 2**31:
                w(b"J" + struct.pack("<i", value))
            case int():
                w(b"\x8a\x09" + value.to_bytes(9, "little", signed=True))
            case float():
                w(b"G" + struct.pack(">d", value))
            case str():
                data = value.encode()
                w(b"X" + struct.pack("<I", len(data)) + data)


def storage(key: str, kind: str, numel: int) -> Persistent:
    return Persistent(("storage", Global(f"torch {kind}"), key, "cpu", numel))


def rebuild(store: Persistent, offset: int, shape, strides) -> Call:
    hooks = Call(Global("collections OrderedDict"), ())
    arguments = (store, offset, tuple(shape), tuple(strides), False, hooks)
    return Call(Global("torch._utils _rebuild_tensor_v2"), arguments)


def write_torch(path: Path, value, storages=None, **changes) -> Path:
    """Writes `value` as torch.save would.

    Args:
      path: Where to.
      value: dicts, lists, tuples, numbers, strings and numpy arrays; also the opcodes above.
      storages: Storages by key that `value` refers to by itself.
      **changes: `byteorder`, `root`, `method` (of compression), `extra` members by name, `pickle`
        (its bytes), to make damaged files.
    """
    pickle = Pickle()
    pickle.storages.update(storages or {})
    pickle.write(value)
    root = changes.get("root", path.stem)
    with zipfile.ZipFile(path, "w", changes.get("method", zipfile.ZIP_STORED)) as file:
        file.writestr(f"{root}/data.pkl", changes.get("pickle", pickle.out.getvalue() + b"."))
        file.writestr(f"{root}/byteorder", changes.get("byteorder", b"little"))
        for key, array in pickle.storages.items():
            file.writestr(f"{root}/data/{key}", array.tobytes())
        file.writestr(f"{root}/version", b"3\n")
        for name, data in changes.get("extra", {}).items():
            file.writestr(name, data)
    return path


def central_headers(data: bytes) -> list[int]:
    """Positions of the central directory's entries."""
    positions, start = [], data.find(b"PK\x01\x02")
    while start >= 0:
        positions.append(start)
        start = data.find(b"PK\x01\x02", start + 4)
    return positions


def crc(data: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(data))
