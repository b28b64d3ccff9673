"""Finds the arrays in what a pickle holds, and names them as state dicts do."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Optional, Union

import numpy as np

from ..errors import CheckpointError
from .casting import foreign
from .files import Checkpoint
from .pickles import MAX_OPCODES, Node, modern

_MAX_DEPTH = 64  # levels of nested modules and dicts; what lies deeper is no model's
_MAX_TENSORS = 100_000
_MAX_NAME = 1000  # characters of a tensor's name
_MAX_NAMES = 10_000_000  # of all names, which nested dicts write once and share; each is read several times
# Tensors may share bytes: tied weights, or a Lightning file that holds its model twice. Without a bound, a file of 5 MB
# described a model of 25 GB.
_MAX_SHARING = 8  # bytes of all tensors for each byte of their file
_FREE = 1 << 16  # bytes of tensors that any file may describe
_OWN = 64  # bytes of a file that a tensor takes at least, beside its numbers
_MAX_AXES = 32  # NumPy 1's limit
_UNPRINTABLE = re.compile(r"[\0-\x1f\x7f\ud800-\udfff]")

_MAX_TRANSIENT = 1000  # buffers of one module
_NUMPY_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "b1"}


def flatten(
    path: str, tree: Any, tensor: Callable[[Node], Optional[np.ndarray]], tensors: dict[str, np.ndarray], size: int
) -> None:
    """Puts the arrays of a tree of dicts, lists and nodes into `tensors`, by dotted name.

    The parts of a whole module get the names they have in its state dict. Everything else is left out.

    Args:
        path: path of the file, for messages.
        tree: the value of a pickle.
        tensor: function returning the array a node stands for, or None.
        tensors: dict that receives the arrays.
        size: bytes of the file.

    Raises:
        CheckpointError: if the tree is too deep or too large, names an array twice, has a damaged one, or describes far
            more bytes than the file has.
    """
    work = total = letters = 0
    too_deep = False
    above: set[int] = set()  # containers on the way to this one
    barren: set[int] = set()  # containers without arrays: visiting them once keeps the work linear

    def add(name: str, array: np.ndarray) -> None:
        nonlocal total, letters
        total += array.nbytes + _OWN
        letters += len(name)
        if total > _MAX_SHARING * size + _FREE:
            raise CheckpointError(
                f"{path} is refused: its tensors share their bytes, and would take over {_MAX_SHARING} times the "
                f"file's {size:,} bytes; re-save it with a copy of each tensor"
            )
        if len(name) > _MAX_NAME or letters > _MAX_NAMES or len(tensors) > _MAX_TENSORS:
            raise _too_large(path)
        if name in tensors:
            raise CheckpointError(f"{path} is not a checkpoint: it names {name} twice")
        tensors[require_name(name)] = array

    def visit(name: str, value: Any, depth: int) -> None:
        nonlocal work, too_deep
        array = tensor(value) if isinstance(value, Node) else None
        if array is not None:
            return add(name, array)
        if depth > _MAX_DEPTH or id(value) in above:
            too_deep = True
        elif id(value) not in barren:
            above.add(id(value))
            before = len(tensors)
            for key, child in _children(value):
                work += 1
                if work > 2 * MAX_OPCODES:
                    raise _too_large(path)
                if isinstance(child, (Node, dict, list, tuple)):
                    key = key[: _MAX_NAME + 1]  # `add` refuses longer names
                    visit(f"{name}.{key}"[: _MAX_NAME + 1] if name else key, child, depth + 1)
            above.remove(id(value))
            if len(tensors) == before:
                barren.add(id(value))

    try:
        visit("", tree, 0)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if too_deep and not tensors:
        raise _too_large(path)


def _too_large(path: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a checkpoint: its contents are nested too deeply or too many")


def require_name(name: str) -> str:
    """A tensor's name, if it can be printed and written; raises ValueError otherwise."""
    if _UNPRINTABLE.search(name):
        raise ValueError(f"the name of a tensor, {name!a}, has characters that are no text")
    return name


def _children(value: Any) -> Iterable[tuple[str, Any]]:
    """The (name, value) pairs in a container."""
    if isinstance(value, Node):
        state = value.state
        if isinstance(state, dict) and "_parameters" in state and "_modules" in state:
            return _parts(state)
        if modern(value.name) == "collections.OrderedDict" and value.args:  # as Python 2 pickles it
            return _pairs(value.args[0])
        value = state if isinstance(state, dict) and not value.items else value.items
    if isinstance(value, dict):
        return value.items()
    return ((str(index), child) for index, child in enumerate(value if isinstance(value, (list, tuple)) else ()))


def _pairs(pairs: Any) -> Iterator[tuple[str, Any]]:
    for pair in pairs if isinstance(pairs, list) else ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str):
            yield pair[0], pair[1]
        else:
            yield "", None


def _parts(module: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a module's state dict holds: no plain attributes, and no buffers that the module keeps out of it."""
    transient = module.get("_non_persistent_buffers_set")
    if isinstance(transient, Node):  # set(names), before pickle had an opcode for it
        transient = transient.args[0] if transient.args else None
    if not isinstance(transient, list) or len(transient) > _MAX_TRANSIENT:
        transient = []
    left_out = {name for name in transient if isinstance(name, str)}
    for part in ("_parameters", "_buffers", "_modules"):
        for name, child in _children(module.get(part)):
            yield name, None if part == "_buffers" and name in left_out else child


# -------------------------------------------------------------------------------------------------------------- arrays


def numpy_array(node: Node) -> Optional[np.ndarray]:
    """The array that a node of NumPy stands for, or None for other nodes.

    Raises:
        ValueError: if it is damaged.
    """
    name = modern(node.name)
    if name == "numpy.core.multiarray._reconstruct":
        _version, shape, dtype, fortran, content = node.state
        return _array(dtype, shape, content, "F" if fortran is True else "C")
    if name == "numpy.core.multiarray.scalar":
        return _array(node.args[0], (), node.args[1] if len(node.args) > 1 else b"")
    if name == "numpy.core.numeric._frombuffer":  # in protocol 5
        content, dtype, shape, order = node.args
        return _array(dtype, shape, content, "F" if isinstance(order, str) and order == "F" else "C")
    return None


def _array(dtype: Any, shape: Any, content: Any, order: Any = "C") -> np.ndarray:
    found = _numpy_dtype(dtype)
    if found is None:
        return foreign("of another dtype of NumPy")
    if isinstance(content, Node) and content.name == "_codecs.encode":  # bytes in pickle protocol 2
        content = content.args[0]
    elif isinstance(content, Node) and modern(content.name) == "builtins.bytes" and not content.args:
        content = b""
    if isinstance(content, str):
        content = content.encode("latin1")
    return np.frombuffer(content, found).reshape(sizes(shape), order=order)


def _numpy_dtype(node: Any) -> Optional[np.dtype]:
    """The dtype that a node stands for, or None for those that no weights have."""
    if not isinstance(node, Node) or node.name != "numpy.dtype" or not node.args or not isinstance(node.state, tuple):
        return None
    code, order = node.args[0], node.state[1] if len(node.state) > 1 else None
    if not isinstance(code, str) or code not in _NUMPY_DTYPES or not isinstance(order, str) or order not in ("<", "|"):
        return None
    return np.dtype(order + code)


def sizes(values: Any) -> tuple[int, ...]:
    """A tuple of sizes; raises ValueError if it is anything else, or too much for NumPy."""
    if isinstance(values, Node) and values.name == "torch.Size" and values.args:
        values = values.args[0]
    fits = isinstance(values, (tuple, list)) and len(values) <= _MAX_AXES
    if not fits or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError("a tensor has an impossible shape or impossible strides")
    return tuple(values)


# ------------------------------------------------------------------------------------------------------------ metadata


def add_metadata(checkpoint: Checkpoint, text: Union[str, bytes]) -> None:
    """Adds the texts of the JSON object in a text to a checkpoint's metadata; other texts are not ours."""
    with contextlib.suppress(ValueError, RecursionError):
        metadata = json.loads(text)
        if isinstance(metadata, dict):
            checkpoint.metadata.update({key: value for key, value in metadata.items() if isinstance(value, str)})
