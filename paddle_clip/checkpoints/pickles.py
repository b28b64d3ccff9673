"""Reads pickles as data: dicts, lists, tuples and inert nodes. Nothing a pickle names is imported or called.

A pickle's author chooses its structure. So no container of it is hashed, printed or compared, here or in the rooms
above: that would recurse in C as deep as the file says, or take twice as long with each part that is shared.
"""

import re
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..errors import CheckpointError

MAX_OPCODES = 1_000_000  # an official checkpoint needs fewer than 100,000; bounds memory, time and nesting
_MAX_GLOBAL = 256  # bytes of a global's module or name, and of a number in digits


class Node:
    """The object a pickle would make by calling `name(*args)`: name, arguments, and what is put into it later."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()):
        self.name = name  # "module.name"
        self.args = args
        self.items: dict[str, Any] = {}  # set by SETITEMS and APPENDS
        self.state: Any = None  # set by BUILD


class Persistent:
    """A persistent id, by which torch's pickles refer to the bytes of a storage outside the pickle."""

    __slots__ = ("id",)

    def __init__(self, id: Any):
        self.id = id


class Parsed(NamedTuple):
    """The content of a pickle."""

    # The pickled value, with `Node` and `Persistent` for what a real unpickler would call or look up. Sets are lists,
    # bytes are views of the data, and the keys of dicts are strings.
    tree: Any
    end: int  # where the pickle ends in the data
    persistents: list[Persistent]  # every `Persistent` of the tree
    comment: str  # a string that was pushed and dropped again, or "": the metadata of our `.pdparams` files


class Global(str):
    """A global a pickle names, as "module.name"."""


# ------------------------------------------------------------------------------------------------------------- globals
# A class, of whatever library, makes an inert node. A function might do anything when another program loads the file,
# so a pickle may call only those that make data, and those that libraries wrote for pickles to call. What runs code by
# its nature may not even be named.

_DATA = {
    "builtins": "bool bytearray bytes complex dict float frozenset int list long object range set slice str tuple type "
    "unicode xrange",
    "_codecs": "encode",
    "array": "array _array_reconstructor",
    "collections": "defaultdict deque",
    "copyreg": "_reconstructor __newobj__ __newobj_ex__",
    "datetime": "date datetime time timedelta timezone",
    "functools": "partial",
    "itertools": "chain count cycle repeat",
    "logging": "getLogger",
    "numpy": "dtype ndarray",
    "operator": "itemgetter",
    "numpy.core.multiarray": "scalar",
    "numpy.core.numeric": "_frombuffer",
    "re": "_compile",
    "time": "struct_time",
    "torch": "device dtype finfo iinfo layout memory_format qscheme",
    "torch.jit._pickle": "build_intlist build_boollist build_doublelist build_tensorlist restore_type_tag",
    "torch.serialization": "_get_layout",
    "zoneinfo.ZoneInfo": "_unpickle",
}
_MAKES_DATA = {f"{module}.{name}" for module, names in _DATA.items() for name in names.split()}
_CLASS = re.compile(r"_*[A-Z]\w*")
_FOR_PICKLES = re.compile(r"_(rebuild|reconstruct|mareconstruct|unpickle|new)(_\w+)?|__\w+_ctor|__pyx_unpickle_\w+")
_MODULES_RUN_CODE = (
    "os nt posix subprocess sys importlib imp zipimport runpy pty ctypes _ctypes code codeop commands popen2 shutil "
    "multiprocessing threading _thread socket webbrowser pickle _pickle cPickle marshal pdb bdb pydoc pip timeit "
    "cProfile profile trace"
)
_THEIR_NAMES_ELSEWHERE = "os nt posix subprocess sys importlib builtins __builtins__ __globals__"
_FUNCTIONS_RUN_CODE = "eval exec execfile system popen breakpoint FunctionType CodeType __import__ __subclasses__"


def may_name(name: str) -> bool:
    """Whether a checkpoint may name a global, "module.name"."""
    first, *others = name.split(".")
    runs_code = first in _MODULES_RUN_CODE.split() or others[-1] in _FUNCTIONS_RUN_CODE.split()
    return first == "__torch__" or not (runs_code or set(_THEIR_NAMES_ELSEWHERE.split()) & set(others))


def may_call(name: str) -> bool:
    """Whether a checkpoint may call a global that it may name."""
    last = name.rpartition(".")[2]
    by_its_name = name.startswith("__torch__.") or _CLASS.fullmatch(last) or _FOR_PICKLES.fullmatch(last)
    return bool(by_its_name) or modern(name) in _MAKES_DATA


def modern(name: str) -> str:
    """A global's name, as Python 3 and NumPy 1 call it."""
    for old, new in (("__builtin__.", "builtins."), ("copy_reg.", "copyreg."), ("numpy._core.", "numpy.core.")):
        if name.startswith(old):
            return new + name[len(old) :]
    return name


# ------------------------------------------------------------------------------------------------------------- opcodes

_MARK = object()
_FIXED = {  # opcodes followed by one number: struct format, bytes
    ord("J"): ("<i", 4),
    ord("K"): ("<B", 1),
    ord("M"): ("<H", 2),
    ord("G"): (">d", 8),
}
_SIZED: dict[
    int, tuple[str, int, str]
] = {  # opcodes followed by a length and bytes: length's format and size, encoding
    ord("X"): ("<I", 4, "utf-8"),
    0x8C: ("<B", 1, "utf-8"),
    0x8D: ("<Q", 8, "utf-8"),
    ord("T"): ("<I", 4, "latin1"),  # Python 2's strings
    ord("U"): ("<B", 1, "latin1"),
    ord("C"): ("<B", 1, ""),
    ord("B"): ("<I", 4, ""),
    0x8E: ("<Q", 8, ""),
    0x96: ("<Q", 8, ""),
}
_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY = {ord("}"): dict, ord("]"): list, ord(")"): tuple, 0x8F: list}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_MARKED: dict[int, Callable[[list[Any]], Any]] = {ord("t"): tuple, ord("l"): list, 0x91: list}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def parse(data: Any, source: str) -> Parsed:
    """Reads the pickle at the start of `data`.

    Args:
        data: a bytes-like object. Byte strings of the result are views of it, not copies.
        source: path of the file, for messages.

    Returns:
        The content of the pickle, and where it ends.

    Raises:
        CheckpointError: if the pickle is damaged, uses an opcode checkpoints do not need, or names what could run code.
    """
    try:
        return _Parser(memoryview(data), source).run()
    except CheckpointError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{source} is damaged: its pickle cannot be read ({error})") from None


class _Parser:
    """The stack machine of pickle, which makes a `Node` of each call."""

    def __init__(self, data: memoryview, source: str):
        self.data = data
        self.source = source
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Global] = {}
        self.persistents: list[Persistent] = []
        self.comment = ""

    def run(self) -> Parsed:
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)[0]
            if opcode == ord("."):
                return Parsed(self.stack.pop(), self.position, self.persistents, self.comment)
            self.step(opcode)
        raise CheckpointError(f"{self.source} is not a checkpoint: its pickle has more than {MAX_OPCODES:,} opcodes")

    def step(self, opcode: int) -> None:
        stack = self.stack
        if opcode in _FIXED:
            stack.append(self.number(*_FIXED[opcode]))
        elif opcode in _SIZED:
            layout, size, encoding = _SIZED[opcode]
            content = self.take(self.number(layout, size))
            stack.append(str(content, encoding, "surrogatepass") if encoding else content)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            stack.append(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            stack[-count:] = [tuple(stack[len(stack) - count :])]
        elif opcode in _MARKED:
            stack.append(_MARKED[opcode](self.pop_to_mark()))
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self)
        else:
            raise CheckpointError(
                f"{self.source} is refused: its pickle uses opcode {opcode:#04x}, which no checkpoint needs"
            )

    # Bytes, and what is made of them.

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise ValueError("it ends too early")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, layout: str, size: int) -> Any:
        return struct.unpack(layout, self.take(size))[0]

    def line(self, limit: int = _MAX_GLOBAL) -> bytes:
        """The bytes to the next newline, and moves behind it."""
        size = min(limit, _MAX_GLOBAL)
        while True:
            line, newline, _ = bytes(self.data[self.position : self.position + size]).partition(b"\n")
            if newline:
                self.position += len(line) + 1
                return line
            if size >= min(limit, len(self.data) - self.position):
                raise ValueError("a line does not end")
            size *= 2

    def read_integer(self) -> None:
        line = self.line(len(self.data))
        if len(line) > _MAX_GLOBAL:  # it stays a text: Python would take time in the square of its length
            self.stack.append(str(line, "latin1"))
        else:
            self.stack.append(bool(int(line)) if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def read_float(self) -> None:
        self.stack.append(float(self.line()))

    def read_long(self, layout: str, size: int) -> None:
        self.stack.append(int.from_bytes(self.take(self.number(layout, size)), "little", signed=True))

    def read_quoted(self) -> None:
        """A string of Python 2, as its `repr` wrote it."""
        quoted = str(self.line(len(self.data)), "latin1")
        if len(quoted) < 2 or quoted[0] != quoted[-1] or quoted[0] not in "'\"":
            raise ValueError("a string has no quotes")

        def character(match: re.Match[str]) -> str:
            code = match[1]
            return chr(int(code[1:], 16)) if len(code) == 3 else _ESCAPED.get(code, code)

        self.stack.append(_ESCAPE.sub(character, quoted[1:-1]))

    def read_text(self) -> None:
        self.stack.append(str(self.line(len(self.data)), "raw-unicode-escape"))

    def skip_protocol(self) -> None:
        if self.number("<B", 1) > 5:
            raise ValueError("its protocol is newer than 5")

    # Containers.

    def pop_to_mark(self) -> list[Any]:
        popped = []
        while (value := self.stack.pop()) is not _MARK:
            popped.append(value)
        return popped[::-1]

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Node):
            target.items.update((str(index), value) for index, value in enumerate(values, len(target.items)))
        else:
            target.extend(values)

    def append_one(self) -> None:
        self.append([self.stack.pop()])

    def make_dict(self) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self.set_items(zip(values[::2], values[1::2]))

    def set_items(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        target = self.stack[-1].items if isinstance(self.stack[-1], Node) else self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("it puts items into what is no dict")
        for key, value in pairs:
            name = _in_words(key)
            target[name if name not in target else f"{name[:64]} {len(target)}"] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([(key, value)])

    def set_many(self) -> None:
        values = self.pop_to_mark()
        self.set_items(zip(values[::2], values[1::2]))

    # Globals and objects.

    def find_global(self, name: str) -> Global:
        if name not in self.globals:
            if not may_name(name):
                raise self.refusal(name)
            self.globals[name] = Global(name)
        return self.globals[name]

    def refusal(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source} is refused: its pickle names {name}, which a checkpoint of weights does not need "
            "and which could run code. Re-save only the state dict, from a program you trust"
        )

    def push_global(self) -> None:
        module, name = str(self.line(), "utf-8"), str(self.line(), "utf-8")
        self.stack.append(self.find_global(f"{module}.{name}"))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str) or max(len(name), len(module)) > _MAX_GLOBAL:
            raise ValueError("a global's name is no short text")
        self.stack.append(self.find_global(f"{module}.{name}"))

    def call(self, function: Any, args: Any) -> None:
        """Pushes what a function, or a class that could be one, would return."""
        if not isinstance(args, tuple):
            raise ValueError("arguments are no tuple")
        if isinstance(function, Node):
            made = function.args[0] if function.name == "functools.partial" and function.args else None
            if not isinstance(made, Global) or not made.endswith(".__new__"):  # `__newobj_ex__` in protocols 2 and 3
                raise self.refusal(function.name)
            self.make(made, args)
        elif isinstance(function, Global) and modern(function) == "builtins.getattr" and len(args) == 2:
            self.get_attribute(*args)
        elif isinstance(function, Global) and not may_call(function):
            raise self.refusal(function)
        else:
            self.make(function, args)

    def make(self, made: Any, args: Any) -> None:
        """Pushes the node of an object of a class."""
        if isinstance(made, Persistent) and isinstance(made.id, tuple) and len(made.id) > 1:
            made = made.id[1]  # a module's class with its source, in PyTorch's format before 1.6
        if not isinstance(made, Global) or not isinstance(args, tuple):
            raise ValueError("it calls something that is not a named function")
        self.stack.append(Node(str(made), args))

    def get_attribute(self, value: Any, name: Any) -> None:
        """Protocols before 4 name a class within a class, and a method of an object, by `getattr`."""
        if not isinstance(name, str) or len(name) > _MAX_GLOBAL or not may_name(f".{name}"):
            raise self.refusal("builtins.getattr")
        if isinstance(value, Global):
            if len(value) > 2 * _MAX_GLOBAL:
                raise ValueError("a global's name is too long")
            self.stack.append(self.find_global(f"{value}.{name}"))
        else:
            self.stack.append(Node("builtins.getattr", (value, name)))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.call(function, args)

    def new_object(self) -> None:
        args, made = self.stack.pop(), self.stack.pop()
        self.make(made, args)

    def new_object_with_keywords(self) -> None:
        _keywords, args, made = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.make(made, args)

    def instance(self) -> None:
        self.push_global()
        function = self.stack.pop()
        self.call(function, tuple(self.pop_to_mark()))

    def marked_object(self) -> None:
        function, *args = self.pop_to_mark()
        self.call(function, tuple(args))

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Node):
            self.stack[-1].state = state

    def pop(self) -> None:
        dropped = self.stack.pop()
        self.comment = dropped if isinstance(dropped, str) else self.comment

    def push_persistent(self, id: Any) -> None:
        self.stack.append(Persistent(id))
        self.persistents.append(self.stack[-1])

    def memo_index(self) -> int:
        index = int(self.line())
        if not 0 <= index < 1 << 32:
            raise ValueError("a number of the memo is too large")
        return index

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


_ACTIONS: dict[int, Callable[[_Parser], Any]] = {
    ord("("): lambda parser: parser.stack.append(_MARK),
    ord("0"): _Parser.pop,
    ord("1"): _Parser.pop_to_mark,
    ord("2"): lambda parser: parser.stack.append(parser.stack[-1]),
    ord("I"): _Parser.read_integer,
    ord("L"): _Parser.read_integer,
    0x8A: lambda parser: parser.read_long("<B", 1),
    0x8B: lambda parser: parser.read_long("<I", 4),
    ord("F"): _Parser.read_float,
    ord("S"): _Parser.read_quoted,
    ord("V"): _Parser.read_text,
    ord("a"): _Parser.append_one,
    ord("e"): lambda parser: parser.append(parser.pop_to_mark()),
    0x90: lambda parser: parser.append(parser.pop_to_mark()),
    ord("d"): _Parser.make_dict,
    ord("s"): _Parser.set_item,
    ord("u"): _Parser.set_many,
    ord("c"): _Parser.push_global,
    0x93: _Parser.stack_global,
    ord("R"): _Parser.reduce,
    0x81: _Parser.new_object,
    0x92: _Parser.new_object_with_keywords,
    ord("i"): _Parser.instance,
    ord("o"): _Parser.marked_object,
    ord("b"): _Parser.build,
    ord("P"): lambda parser: parser.push_persistent(str(parser.line(), "utf-8")),
    ord("Q"): lambda parser: parser.push_persistent(parser.stack.pop()),
    ord("q"): lambda parser: parser.put(parser.number("<B", 1)),
    ord("r"): lambda parser: parser.put(parser.number("<I", 4)),
    ord("p"): lambda parser: parser.put(parser.memo_index()),
    0x94: lambda parser: parser.put(len(parser.memo)),
    ord("h"): lambda parser: parser.stack.append(parser.memo[parser.number("<B", 1)]),
    ord("j"): lambda parser: parser.stack.append(parser.memo[parser.number("<I", 4)]),
    ord("g"): lambda parser: parser.stack.append(parser.memo[parser.memo_index()]),
    0x80: _Parser.skip_protocol,
    0x95: lambda parser: parser.take(8),  # FRAME: a hint for buffering
}


def _in_words(key: Any) -> str:
    """The name of a dict's key. Numbers are texts too: a file could choose numbers that Python's hashes collide."""
    if isinstance(key, str):
        return key
    if key is None or isinstance(key, (bool, float)) or (isinstance(key, int) and abs(key) < 1 << 63):
        return str(key)
    return type(key).__name__
