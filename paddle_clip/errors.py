"""The one error for files and weights that cannot be used, and the strict comparison that raises it."""

from collections.abc import Mapping, Sequence

LONGEST = 1000  # characters of a message
_MOST = 12  # items of a list in a message
_ROOM = 660  # characters for the lists of a message


class CheckpointError(ValueError):
    """A file or state dict cannot be used. The message says what was expected, what was found and what to do.

    What a file calls its parts may be long, or steer a terminal: characters that cannot be printed are escaped, and the
    middle of a message longer than `LONGEST` is left out.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST:
            message = f"{message[: LONGEST * 2 // 3]} … {message[-LONGEST // 4 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message)[:LONGEST])


def listed(items: Sequence[str], room: int = _ROOM, separator: str = ", ") -> str:
    """Items of a message in one line: a dozen at most, as many as have room, then how many more there are.

    Args:
        items: names and what is said of them; control characters are escaped, and long ones lose their middle.
        room: number of characters; the first item is always there.
        separator: what stands between two items.
    """
    shown: list[str] = []
    for item in items[:_MOST]:
        item = item if item.isprintable() else repr(item)
        item = item if len(item) <= 160 else f"{item[:80]}…{item[-60:]}"
        room -= len(item) + len(separator)
        if shown and room < 0:
            break
        shown.append(item)
    more = len(items) - len(shown)
    return separator.join(shown) + (f" and {more:,} more" if more else "")


Shape = tuple[int, ...]


def require_same_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str, hint: str) -> None:
    """Compares two `{name: shape}` dicts strictly.

    Args:
        expected: names and shapes of every tensor there must be.
        found: names and shapes of the tensors there are.
        source: name of the file that `found` describes, for the message.
        hint: advice at the end of the message.

    Raises:
        CheckpointError: if they differ, with the numbers of missing, unexpected and misshapen tensors and the first of
            each.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = sorted(name for name in expected.keys() & found.keys() if tuple(expected[name]) != tuple(found[name]))
    problems = {
        "missing": [f"{name} {list(expected[name])}" for name in missing],
        "unexpected": [f"{name} {list(found[name])}" for name in unexpected],
        "misshapen": [f"{name} is {list(found[name])}, expected {list(expected[name])}" for name in misshapen],
    }
    problems = {kind: items for kind, items in problems.items() if items}
    if problems:
        room = _ROOM // len(problems)
        told = "; ".join(f"{len(items)} {kind}: {listed(items, room)}" for kind, items in problems.items())
        raise CheckpointError(f"{source} does not fit: {told}. {hint}")
