"""Pickles read as data: dicts, lists, tuples and inert nodes. Nothing a pickle names is imported or called."""

import struct
from typing import Any, NamedTuple

from .errors import CheckpointError

MAX_OPCODES = 1_000_000  # an official checkpoint needs fewer than 100,000; bounds memory, time and nesting
MAX_NAME = 1024  # bytes of a global's module or name


class Node:
    """What a pickle would have made by calling `name(*args)`: the name, the arguments and what was put in later."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name, args=()):
        self.name = name  # "module.name"
        self.args = args
        self.items = {}  # set by SETITEMS
        self.state = None  # set by BUILD


class Persistent:
    """A persistent id: how torch's pickles refer to the bytes of a storage outside the pickle."""

    __slots__ = ("id",)

    def __init__(self, id):
        self.id = id


class Parsed(NamedTuple):
    """A pickle that was read."""

    tree: Any  # the pickled value, with `Node` and `Persistent` for what a real unpickler would call or look up
    end: int  # where the pickle ends in the data
    persistents: list  # every `Persistent` of the tree
    comment: str  # a string that was pushed and dropped again, or ""; how a `.pdparams` of ours carries its metadata


class _Global(str):
    """A global a pickle names, as "module.name"."""


_MARK = object()
_FIXED = {  # opcodes followed by one number: struct format, bytes
    ord("J"): ("<i", 4),
    ord("K"): ("<B", 1),
    ord("M"): ("<H", 2),
    ord("G"): (">d", 8),
}
_SIZED = {  # opcodes followed by a length and that many bytes: format of the length, its bytes, text or not
    ord("X"): ("<I", 4, True),
    0x8C: ("<B", 1, True),
    0x8D: ("<Q", 8, True),
    ord("C"): ("<B", 1, False),
    ord("B"): ("<I", 4, False),
    0x8E: ("<Q", 8, False),
}
_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY = {ord("}"): dict, ord("]"): list, ord(")"): tuple}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


def parse(data, allowed, source):
    """Reads the pickle at the start of `data`.

    Args:
        data: a bytes-like object. Byte strings of the result are views of it, not copies.
        allowed: a predicate: may the pickle name this global, "module.name"?
        source: what the pickle is, for messages.

    Returns:
        `Parsed`.

    Raises:
        CheckpointError: if the pickle is damaged, uses an opcode checkpoints do not need, or names a global that is
            not allowed.
    """
    try:
        return _Parser(memoryview(data), allowed, source).run()
    except CheckpointError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{source} is damaged: its pickle cannot be read ({error})") from None


class _Parser:
    """The stack machine of pickle, without the calls."""

    def __init__(self, data, allowed, source):
        self.data = data
        self.allowed = allowed
        self.source = source
        self.position = 0
        self.stack = []
        self.memo = {}
        self.persistents = []
        self.comment = ""

    def run(self):
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)[0]
            if opcode == ord("."):
                return Parsed(self.stack.pop(), self.position, self.persistents, self.comment)
            self.step(opcode)
        raise CheckpointError(f"{self.source} is not a checkpoint: its pickle has more than {MAX_OPCODES:,} opcodes")

    def take(self, count):
        end = self.position + count
        if end > len(self.data):
            raise ValueError("it ends too early")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, layout, size):
        return struct.unpack(layout, self.take(size))[0]

    def line(self):
        start = self.position
        end = bytes(self.data[start : start + MAX_NAME]).index(b"\n")
        return str(self.take(end + 1)[:end], "utf-8")

    def pop_to_mark(self):
        popped = []
        while (value := self.stack.pop()) is not _MARK:
            popped.append(value)
        return popped[::-1]

    def find_global(self, module, name):
        found = _Global(f"{module}.{name}")
        if not self.allowed(found):
            raise CheckpointError(
                f"{self.source} is refused: its pickle names {found}, which a checkpoint of weights does not need "
                "and which could run code. Re-save only the state dict, from a program you trust"
            )
        return found

    def set_items(self, pairs):
        target = self.stack[-1]
        target = target.items if isinstance(target, Node) else target
        for key, value in pairs:
            if not isinstance(key, (str, int)):
                raise ValueError("a dict key is neither a string nor a number")
            target[key] = value

    def step(self, opcode):
        stack = self.stack
        if opcode in _FIXED:
            stack.append(self.number(*_FIXED[opcode]))
        elif opcode in _SIZED:
            layout, size, text = _SIZED[opcode]
            content = self.take(self.number(layout, size))
            stack.append(str(content, "utf-8", "surrogatepass") if text else content)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            stack.append(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            stack[-count:] = [tuple(stack[len(stack) - count :])]
        elif opcode == 0x8A:  # LONG1
            stack.append(int.from_bytes(self.take(self.number("<B", 1)), "little", signed=True))
        elif opcode == ord("("):  # MARK
            stack.append(_MARK)
        elif opcode == ord("t"):  # TUPLE
            stack.append(tuple(self.pop_to_mark()))
        elif opcode == ord("a"):  # APPEND
            value = stack.pop()
            stack[-1].append(value)
        elif opcode == ord("e"):  # APPENDS
            values = self.pop_to_mark()
            stack[-1].extend(values)
        elif opcode == ord("s"):  # SETITEM
            value, key = stack.pop(), stack.pop()
            self.set_items([(key, value)])
        elif opcode == ord("u"):  # SETITEMS
            values = self.pop_to_mark()
            self.set_items(zip(values[::2], values[1::2]))
        elif opcode == ord("c"):  # GLOBAL
            stack.append(self.find_global(self.line(), self.line()))
        elif opcode == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            stack.append(self.find_global(module, name))
        elif opcode in (ord("R"), 0x81):  # REDUCE, NEWOBJ
            args, function = stack.pop(), stack.pop()
            if not isinstance(function, _Global) or not isinstance(args, tuple):
                raise ValueError("it calls something that is not a named function")
            stack.append(Node(str(function), args))
        elif opcode == ord("b"):  # BUILD
            state = stack.pop()
            if isinstance(stack[-1], Node):
                stack[-1].state = state
        elif opcode == ord("0"):  # POP
            dropped = stack.pop()
            self.comment = dropped if isinstance(dropped, str) else self.comment
        elif opcode == ord("Q"):  # BINPERSID
            stack.append(Persistent(stack.pop()))
            self.persistents.append(stack[-1])
        elif opcode == ord("q"):  # BINPUT
            self.memo[self.number("<B", 1)] = stack[-1]
        elif opcode == ord("r"):  # LONG_BINPUT
            self.memo[self.number("<I", 4)] = stack[-1]
        elif opcode == 0x94:  # MEMOIZE
            self.memo[len(self.memo)] = stack[-1]
        elif opcode == ord("h"):  # BINGET
            stack.append(self.memo[self.number("<B", 1)])
        elif opcode == ord("j"):  # LONG_BINGET
            stack.append(self.memo[self.number("<I", 4)])
        elif opcode == 0x80:  # PROTO
            if self.number("<B", 1) > 5:
                raise ValueError("its protocol is newer than 5")
        elif opcode == 0x95:  # FRAME: a hint for buffering
            self.take(8)
        else:
            raise CheckpointError(
                f"{self.source} is refused: its pickle uses opcode {opcode:#04x}, which no checkpoint needs"
            )
