"""A small writer of the format that torch wrote before 1.6, so that these tests need no torch."""

import collections
import pickle
import struct
from pathlib import Path

from tests.weights_conversion.torch_zip import Call, Global, Persistent, Pickle

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4, "long": 4}}


class New(collections.namedtuple("New", "cls arguments")):
    """A NEWOBJ of a global with an argument tuple."""


class Build(collections.namedtuple("Build", "instance state")):
    """A BUILD of an instance with a state."""


class LegacyPickle(Pickle):
    """Writes persistent ids with their sixth part, the view, and what Python 2 and torch 0.1 do."""

    python_2 = False

    def write(self, value) -> None:
        match value:
            case Persistent() if len(value) == 5:
                super().write(Persistent((*value, None)))
            case New() | Build():
                self.write(value[0])
                self.write(value[1])
                self.out.write(b"\x81" if isinstance(value, New) else b"b")
            case collections.OrderedDict() if self.python_2:
                items = [list(item) for item in value.items()]
                ordered = Call(Global("collections OrderedDict"), (items,))
                self.write(Build(ordered, {"_metadata": {}}))
            case str() if self.python_2 and not isinstance(value, Global):
                self.out.write(b"U" + bytes([len(value)]) + value.encode())
            case _:
                super().write(value)


def write_legacy(path: Path, value, storages=None, **changes) -> Path:
    """Writes `value` as torch.save would with `_use_new_zipfile_serialization=False`.

    Args:
      path: Where to.
      value: dicts, lists, tuples, numbers, strings and numpy arrays; also the opcodes above.
      storages: Storages by key that `value` refers to by itself.
      **changes: `python_2`; and to make damaged files `magic`, `version`, `system`, `pickle` (its
        bytes), `keys`, `counts` (by key), `tail`.
    """
    written = LegacyPickle()
    written.python_2 = changes.get("python_2", False)
    written.storages.update(storages or {})
    written.write(value)
    heads = (
        changes.get("magic", MAGIC),
        changes.get("version", 1001),
        changes.get("system", SYSTEM),
    )
    data = b"".join(pickle.dumps(head, 2) for head in heads)
    data += changes.get("pickle", written.out.getvalue() + b".")
    data += pickle.dumps(changes.get("keys", sorted(written.storages)), 2)
    counts = changes.get("counts", {})
    for key in sorted(written.storages):
        array = written.storages[key]
        data += struct.pack("<q", counts.get(key, array.size)) + array.tobytes()
    path.write_bytes(data + changes.get("tail", b""))
    return path
