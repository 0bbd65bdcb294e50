"""A pickle interpreter that cannot run anything: a stack machine over an allow-list of opcodes.

Python's unpickler imports whatever the stream names and calls it. This machine has no import and no
`getattr`: a global is a key of a table that the caller gives, the only things that can be called
are `Function` values of that table, and every opcode that torch's tensor files do not need is
refused. The opcodes are decoded by `pickletools.genops`, which only reads.
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from weights_conversion.readers.stored import RefusedFileError, short


@dataclasses.dataclass(frozen=True)
class Function:
    """An entry of the table of globals that a stream may call; `call` takes the argument tuple."""

    call: Callable[[tuple[Any, ...]], Any]


@dataclasses.dataclass(frozen=True)
class Class:
    """An entry of the table whose instances get their content by BUILD.

    `build` takes the arguments of the instance and its state; the result takes the place of the
    instance.
    """

    build: Callable[[tuple[Any, ...], Any], Any]


@dataclasses.dataclass
class _Instance:
    """An instance whose BUILD has not come yet, or what BUILD made of it."""

    kind: Class
    arguments: tuple[Any, ...]
    built: Any = None


MAX_STEPS = 1_000_000  # ten times what a training checkpoint of a large model takes
_MARK = object()
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"}
_PYTHON_2_TEXTS = {"BINSTRING", "SHORT_BINSTRING"}
_LITERALS = _NUMBERS | _TEXTS | _PYTHON_2_TEXTS
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def check_key(key: Any) -> None:
    """Refuses a key of a dictionary that is no plain value.

    Nested tuples as keys could make one hash take forever.
    """
    if type(key) not in (str, int, float, bool, type(None)):
        raise RefusedFileError(f"the pickle uses a {type(key).__name__} as a key")


class _Machine:
    def __init__(self, names: Mapping[tuple[str, str], Any], load: Callable[[Any], Any]):
        self.names = names
        self.load = load
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.unfinished = 0

    def pop(self, kind: type | None = None) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise RefusedFileError("the pickle takes a value from an empty stack")
        value = self.stack.pop()
        if kind is not None and type(value) is not kind:
            raise RefusedFileError(
                f"the pickle holds a {type(value).__name__} where a {kind.__name__} belongs"
            )
        return value

    def pop_to_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                values = self.stack[start + 1 :]
                del self.stack[start:]
                return values
        raise RefusedFileError("the pickle closes a group that it never opened")

    def find(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise RefusedFileError(
                f"the pickle asks for {short(module)}.{short(name)}, which tensors do not need "
                "(nothing was executed)"
            )
        return self.names[module, name]

    def set_items(self, pairs: list[Any]) -> None:
        target = self.pop(dict)
        if len(pairs) % 2:
            raise RefusedFileError("the pickle fills a dictionary with a key that has no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            check_key(key)
            target[key] = value
        self.stack.append(target)

    def append_items(self, values: list[Any]) -> None:
        target = self.pop(list)
        target.extend(values)
        self.stack.append(target)

    def reduce(self) -> None:
        arguments = self.pop(tuple)
        function = self.pop()
        if isinstance(function, Class):
            self.stack.append(_Instance(function, arguments))
            self.unfinished += 1
        elif isinstance(function, Function):
            self.stack.append(function.call(arguments))
        else:
            raise RefusedFileError(f"the pickle calls a {type(function).__name__}")

    def new_object(self) -> None:
        arguments = self.pop(tuple)
        self.stack.append(_Instance(self.pop(Class), arguments))
        self.unfinished += 1

    def set_state(self) -> None:
        """BUILD: of an OrderedDict it sets `_metadata`, which nobody reads."""
        state = self.pop()
        target = self.pop()
        if isinstance(target, _Instance) and target.built is None:
            target.built = target.kind.build(target.arguments, state)
            self.unfinished -= 1
            self.stack.append(target.built)
        elif type(target) is dict and type(state) is dict:
            self.stack.append(target)
        else:
            raise RefusedFileError(f"the pickle sets the state of a {type(target).__name__}")

    def remember(self, key: int) -> None:
        value = self.pop()
        self.stack.append(value)
        self.memo[key] = value

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise RefusedFileError("the pickle recalls a value that it never stored")
        value = self.memo[key]
        if isinstance(value, _Instance):
            value = value.built
            if value is None:
                raise RefusedFileError("the pickle recalls an object before its state is set")
        self.stack.append(value)

    def step(self, name: str, argument: Any) -> None:
        """Performs one opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise RefusedFileError(f"the pickle uses {name}, which tensor files do not need")


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def act(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return act


def _stack_global(machine: _Machine, _: Any) -> None:
    name = machine.pop(str)
    machine.stack.append(machine.find(machine.pop(str), name))


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "MARK": lambda m, a: m.stack.append(_MARK),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": lambda m, a: m.append_items([m.pop()]),
    "APPENDS": lambda m, a: m.append_items(m.pop_to_mark()),
    "SETITEM": lambda m, a: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_to_mark()),
    "GLOBAL": lambda m, a: m.stack.append(m.find(*a.split(" ", 1))),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda m, a: m.reduce(),
    "NEWOBJ": lambda m, a: m.new_object(),
    "BUILD": lambda m, a: m.set_state(),
    "BINPERSID": lambda m, a: m.stack.append(m.load(m.pop(tuple))),
    "BINPUT": lambda m, a: m.remember(a),
    "LONG_BINPUT": lambda m, a: m.remember(a),
    "MEMOIZE": lambda m, a: m.remember(len(m.memo)),
    "BINGET": lambda m, a: m.recall(a),
    "LONG_BINGET": lambda m, a: m.recall(a),
}


def interpret(
    stream: io.BytesIO,
    names: Mapping[tuple[str, str], Any],
    load: Callable[[tuple[Any, ...]], Any],
) -> Any:
    """Reads one pickle into dicts, lists, tuples, numbers, strings and the values of `names`.

    Args:
      stream: Begins with the pickle, protocols 2 to 5; is left behind its STOP.
      names: (module, name) -> the value that stands for this global. A `Function` or `Class` may be
        called by the pickle; anything else is only passed around.
      load: Called with the tuple of each persistent id; what it returns takes its place.

    Returns:
      The value at STOP.

    Raises:
      RefusedFileError: For a global outside `names`, an opcode that tensor files do not need, or a
        damaged pickle.
    """
    machine = _Machine(names, load)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name == "STOP":
                value = machine.pop()
                if machine.stack or machine.unfinished:
                    raise RefusedFileError("the pickle ends with values or bytes left over")
                return value
            if count > MAX_STEPS:
                raise RefusedFileError(f"the pickle has more than {MAX_STEPS} opcodes")
            machine.step(opcode.name, argument)
    except RefusedFileError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise RefusedFileError(f"the pickle is damaged: {short(error)}") from None
    raise RefusedFileError("the pickle has no end")
