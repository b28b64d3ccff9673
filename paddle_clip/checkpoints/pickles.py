"""Reads pickles as data: dicts, lists, tuples and inert nodes. Nothing a pickle names is imported or called."""

import contextlib
import json
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from ..errors import CheckpointError
from .files import Checkpoint

MAX_OPCODES = 1_000_000  # an official checkpoint needs fewer than 100,000; bounds memory, time and nesting
_MAX_GLOBAL = 1024  # bytes of a global's module or name
_MAX_DEPTH = 64  # levels of nested modules and dicts
_MAX_TENSORS = 100_000
_MAX_NAME = 1000  # characters of a tensor's name


class Node:
    """The object a pickle would make by calling `name(*args)`: name, arguments, and what is put into it later."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()):
        self.name = name  # "module.name"
        self.args = args
        self.items: dict[Any, Any] = {}  # set by SETITEMS
        self.state: Any = None  # set by BUILD


class Persistent:
    """A persistent id, by which torch's pickles refer to the bytes of a storage outside the pickle."""

    __slots__ = ("id",)

    def __init__(self, id: Any):
        self.id = id


class Parsed(NamedTuple):
    """The content of a pickle."""

    tree: Any  # the pickled value, with `Node` and `Persistent` for what a real unpickler would call or look up
    end: int  # where the pickle ends in the data
    persistents: list[Persistent]  # every `Persistent` of the tree
    comment: str  # a string that was pushed and dropped again, or "": the metadata of our `.pdparams` files


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


def parse(data: Any, allowed: Callable[[str], bool], source: str) -> Parsed:
    """Reads the pickle at the start of `data`.

    Args:
        data: a bytes-like object. Byte strings of the result are views of it, not copies.
        allowed: function that tells whether the pickle may name a global, "module.name".
        source: path of the file, for messages.

    Returns:
        The content of the pickle, and where it ends.

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
    """The stack machine of pickle, which makes a `Node` of each call."""

    def __init__(self, data: memoryview, allowed: Callable[[str], bool], source: str):
        self.data = data
        self.allowed = allowed
        self.source = source
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.persistents: list[Persistent] = []
        self.comment = ""

    def run(self) -> Parsed:
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)[0]
            if opcode == ord("."):
                return Parsed(self.stack.pop(), self.position, self.persistents, self.comment)
            self.step(opcode)
        raise CheckpointError(f"{self.source} is not a checkpoint: its pickle has more than {MAX_OPCODES:,} opcodes")

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise ValueError("it ends too early")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, layout: str, size: int) -> Any:
        return struct.unpack(layout, self.take(size))[0]

    def line(self) -> str:
        start = self.position
        end = bytes(self.data[start : start + _MAX_GLOBAL]).index(b"\n")
        return str(self.take(end + 1)[:end], "utf-8")

    def pop_to_mark(self) -> list[Any]:
        popped = []
        while (value := self.stack.pop()) is not _MARK:
            popped.append(value)
        return popped[::-1]

    def find_global(self, module: str, name: str) -> _Global:
        found = _Global(f"{module}.{name}")
        if not self.allowed(found):
            raise CheckpointError(
                f"{self.source} is refused: its pickle names {found}, which a checkpoint of weights does not need "
                "and which could run code. Re-save only the state dict, from a program you trust"
            )
        return found

    def set_items(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, Node) else target
        for key, value in pairs:
            if not isinstance(key, (str, int)):
                raise ValueError("a dict key is neither a string nor a number")
            target[key] = value

    def step(self, opcode: int) -> None:
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


# ------------------------------------------------------------------------------------------------------ trees to arrays


def flatten(
    path: str, tree: Any, tensor: Callable[[Node], Optional[np.ndarray]], tensors: dict[str, np.ndarray]
) -> None:
    """Puts the arrays of a tree of dicts, lists and nodes into `tensors`, by dotted name.

    Args:
        path: path of the file, for messages.
        tree: the value of a pickle.
        tensor: function returning the array a node stands for, or None.
        tensors: dict that receives the arrays.

    Raises:
        CheckpointError: if the tree is too deep or too large, names an array twice, or has a damaged one.
    """
    visits = 0

    def visit(name: str, value: Any, depth: int) -> None:
        nonlocal visits
        visits += 1
        if depth > _MAX_DEPTH or visits > 10 * _MAX_TENSORS or len(tensors) > _MAX_TENSORS or len(name) > _MAX_NAME:
            raise CheckpointError(f"{path} is not a checkpoint: its contents are nested too deeply or too many")
        if isinstance(value, Node):
            array = tensor(value)
            if array is not None:
                if name in tensors:
                    raise CheckpointError(f"{path} is not a checkpoint: it names {name} twice")
                tensors[name] = array
                return
            value = value.state if isinstance(value.state, dict) and not value.items else value.items
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            for key, child in value.items():
                if isinstance(child, (Node, dict, list, tuple)):
                    key = str(key)[: _MAX_NAME + 1]  # `visit` refuses longer keys
                    visit(f"{name}.{key}" if name else key, child, depth + 1)

    try:
        visit("", tree, 0)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def add_metadata(checkpoint: Checkpoint, text: Union[str, bytes]) -> None:
    """Adds the JSON object in a text to a checkpoint's metadata; other texts are not ours and are ignored."""
    with contextlib.suppress(ValueError, RecursionError):
        metadata = json.loads(text)
        checkpoint.metadata.update(metadata if isinstance(metadata, dict) else {})
