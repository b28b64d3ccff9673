"""The one error for files and weights that cannot be used, and the strict comparison that raises it."""

from collections.abc import Mapping


class CheckpointError(ValueError):
    """A file or state dict cannot be used. The message says what was expected, what was found and what to do."""


Shape = tuple[int, ...]


def require_same_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str, hint: str) -> None:
    """Compares two `{name: shape}` dicts strictly.

    Args:
        expected: names and shapes of every tensor there must be.
        found: names and shapes of the tensors there are.
        source: name of the file that `found` describes, for the message.
        hint: advice at the end of the message.

    Raises:
        CheckpointError: if they differ, with every missing, unexpected and misshapen tensor.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = sorted(name for name in expected.keys() & found.keys() if tuple(expected[name]) != tuple(found[name]))
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: " + ", ".join(f"{name} {list(expected[name])}" for name in missing))
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: " + ", ".join(f"{n} {list(found[n])}" for n in unexpected))
    if misshapen:
        described = (f"{n} is {list(found[n])}, expected {list(expected[n])}" for n in misshapen)
        problems.append(f"{len(misshapen)} misshapen: " + ", ".join(described))
    if problems:
        raise CheckpointError(f"{source} does not fit: {'; '.join(problems)}. {hint}")
