"""Builds checkpoints by structure and reads them: `python tests/tools/fuzz_built.py [--count 20000] [--seed 0]`.

fuzz.py mutates sound files, and hardly finds what must be built: structures that share their parts, are deep, or tell
huge sizes. Each file here is of one kind of these. It may be read, or refused with `CheckpointError`; another error,
more than ten seconds, more memory than the bound or a message that is too long is a failure. The file is kept then, and
the exit code is 1. So it is if a kind was never built. A header of safetensors that both sides read must give them the
same tensors; the table at the end counts what only one side reads.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
warnings.simplefilter("ignore")

import safetensors
from building import doubled, entry, integer, legacy_file, plain_file, tensor, text, torch_file
from building import safetensors as safetensors_file

from paddle_clip import CheckpointError
from paddle_clip.checkpoints import reading
from paddle_clip.checkpoints.conversion import check
from paddle_clip.errors import LONGEST

SECONDS = 10
MEMORY = 1 << 30  # bytes of address space beyond what the process has at its start
LENGTHS = [0, 1, 2, 3, 40, 1000, 30_000]
NUMBERS = [0, 1, 2, 4, 5, 127, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**61 - 1, 2**63 - 1, 2**64, 2**200, -1, -(2**63)]
NAMES = ["a", "", "state_dict", "model", "module.a", "visual.proj", "ln_final.weight", "0", "\0", "\ud800", "a.b" * 300]
GLOBALS = ["a\nB", "torch\nFloatStorage", "torch._utils\n_rebuild_parameter", "numpy.core.multiarray\n_reconstruct"]
GLOBALS += ["collections\nOrderedDict", "os\nsystem", "builtins\ngetattr", "torch\nSize", "numpy\ndtype"]


def leaf(source):
    kind = source.randrange(6)
    if kind == 0:
        return source.choice([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"])
    if kind == 1:
        return integer(source.choice(NUMBERS))
    if kind == 2:
        return text(source.choice(NAMES))
    if kind == 3:
        return b"G" + struct.pack(">d", source.choice([0.0, -1.5, float("nan"), float("inf")]))
    if kind == 4:
        return b"c" + source.choice(GLOBALS).encode() + b"\n"
    return tensor()


def shape(source):
    return b"(" + b"".join(integer(source.choice(NUMBERS)) for _ in range(source.choice([0, 1, 2, 5, 70]))) + b"t"


def tree(source, depth=4):
    """A value of lists, tuples, dicts, sets and objects."""
    if depth == 0 or source.random() < 0.2:
        return leaf(source)
    parts = [tree(source, depth - 1) for _ in range(source.randrange(4))]
    kind = source.randrange(7)
    if kind == 0:
        return b"](" + b"".join(parts) + b"e"
    if kind == 1:
        return b"(" + b"".join(parts) + b"t"
    if kind == 2:
        return b"}(" + b"".join(text(source.choice(NAMES)) + part for part in parts) + b"u"
    if kind == 3:
        return b"}(" + b"".join(leaf(source) + part for part in parts) + b"u"
    if kind == 4:
        return b"\x8f(" + b"".join(parts) + b"\x90"
    made = b"c" + source.choice(GLOBALS).encode() + b"\n(" + b"".join(parts) + b"t" + source.choice([b"R", b"\x81"])
    return made if kind == 5 else made + b"}(" + b"".join(text(source.choice(NAMES)) + part for part in parts) + b"ub"


def memo_bomb(source):
    """A value that holds another twice, which holds another twice …"""
    pair = source.choice([b"h%ch%c\x86", b"](h%ch%ce", b"}(X\1\0\0\0ah%cX\1\0\0\0bh%cu", b"ca\nB\nh%ch%c\x86R"])
    times = source.choice([1, 10, 40, 90])
    if pair == b"h%ch%c\x86":
        return doubled(tree(source, 2), times)
    return tree(source, 2) + b"".join(b"q%c0" % place + pair % (place, place) for place in range(times))


def shared(source):
    """One value, many times."""
    count = source.choice(LENGTHS)
    many = [b"](" + b"h\0" * count + b"e", b"}(" + b"".join(text(f"{i}") + b"h\0" for i in range(count)) + b"u"]
    return tree(source, 3) + b"q\x000" + source.choice(many)


def deep(source):
    """A value in a value in a value …"""
    depth, inner = source.choice(LENGTHS), leaf(source)
    start, end = source.choice(
        [(b"", b"\x85"), (b"](", b"e"), (b"}(X\1\0\0\0a", b"u"), (b"(", b"t"), (b"ca\nB\n", b"\x85R")]
    )
    return start * depth + inner + end * depth


def huge_dimensions(source):
    offset, count = (integer(source.choice(NUMBERS)) for _ in range(2))
    return tensor(count=count, shape=shape(source), strides=shape(source), offset=offset)


def strange_parts(source):
    """A tensor, one of whose parts is something else."""
    part = source.choice(["key", "count", "shape", "strides", "offset"])
    return tensor(**{part: source.choice([tree, deep, memo_bomb])(source)})


def header(source):
    """A header of safetensors, sound but for what one or two of its values say."""
    tensors, at = {}, 0
    for index in range(source.choice([1, 2, 5])):
        sizes = [source.choice([0, 1, 2, 3]) for _ in range(source.choice([0, 1, 2]))]
        dtype, width = source.choice(
            [("F32", 4), ("F16", 2), ("I64", 8), ("U8", 1), ("BOOL", 1), ("F64", 8), ("BF16", 2)]
        )
        length = width
        for size in sizes:
            length *= size
        tensors[f"t{index}"] = entry(sizes, [at, at + length], dtype)
        at += length
    if source.random() < 0.5:
        tensors["__metadata__"] = {"format": "pt"}
    for _ in range(source.choice([0, 1, 1, 2])):
        described = tensors[source.choice([name for name in tensors if name != "__metadata__"])]
        change = source.randrange(8)
        if change == 0:
            described[source.choice(["shape", "dtype", "data_offsets", "x"])] = source.choice(
                [None, [], {}, "F32", [source.choice(NUMBERS)] * 2, 1.5, True, [[]], [1e3, 2], "F8_E4M3", "\ud800"]
            )
        elif change == 1 and isinstance(described.get("shape"), list):
            described["shape"].insert(0, source.choice(NUMBERS))
        elif change == 2:
            offsets = described.get("data_offsets")
            if isinstance(offsets, list) and not any(isinstance(number, list) for number in offsets):
                described["data_offsets"] = [number + source.choice([-1, 1, 4]) for number in offsets[:2]]
        elif change == 3:
            tensors[source.choice(["", "\0", "\ud800", "t0", "__metadata__", "x" * 5000])] = described
        elif change == 4:
            described.pop(source.choice(["shape", "dtype", "data_offsets"]), None)
        elif change == 5:
            at += source.choice([-1, 1, 8])
        elif change == 6:
            tensors["__metadata__"] = source.choice([{"a": 1}, [], "a", None, {"a": None}, {}, {"a": "b" * 9999}])
    content = json.dumps(tensors, ensure_ascii=source.random() < 0.8).encode("utf-8", "surrogatepass")
    if source.random() < 0.2:
        content = source.choice([content + b" " * 7, content + b"\n{}", b" " + content, content[:-1], content * 2])
    if source.random() < 0.1:
        content = content.replace(b'"t0"', b'"t1"')  # twice the same name
    if source.random() < 0.05:
        content = b'{"a":' + source.choice([b"[", b'{"a":']) * source.choice(LENGTHS)
    return safetensors_file(content, bytes(max(0, at)))


PICKLES = (tree, memo_bomb, shared, deep, huge_dimensions, strange_parts)
WRITERS = (torch_file, legacy_file, plain_file)
KINDS = {f"{kind.__name__}, {writer.__name__}" for kind in PICKLES for writer in WRITERS} | {"header, safetensors"}


def build(source, path):
    """Writes a file and returns its kind."""
    if source.random() < 0.3:
        path.write_bytes(header(source))
        return "header, safetensors"
    kind, writer = source.choice(PICKLES), source.choice(WRITERS)
    opcodes = b"".join(kind(source) for _ in range(source.choice([1, 1, 3])))
    writer(path, opcodes)
    return f"{kind.__name__}, {writer.__name__}"


def attempt(path):
    """The outcome of reading a file, and its tensors if it can be read; raises an error that no file may cause."""
    try:
        tensors = reading.read(path)
    except CheckpointError as error:
        assert len(str(error)) <= LONGEST and str(error).isprintable(), "the message is too long, or cannot be printed"
        return "refused", None
    try:
        check(path)
    except CheckpointError as error:
        assert len(str(error)) <= LONGEST and str(error).isprintable(), "the message is too long, or cannot be printed"
    return "read", tensors


def compared(path, ours):
    """Which side reads a file: we, safetensors, both or neither; raises if they read different tensors."""
    try:
        theirs = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError:
        return "only we read it" if ours is not None else "neither reads it"
    if ours is None:
        return "only safetensors reads it"
    assert ours.keys() == theirs.keys(), "other tensors than safetensors reads"
    for name, read in theirs.items():
        same = list(ours[name].shape) == read["shape"] and ours[name].tobytes() == bytes(read["data"])
        assert same, "other numbers than safetensors reads"
    return "both read it"


def fuzz(count, seed, path):
    """Builds and reads files; returns what came of each kind, and the seconds of the slowest."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} seconds")))
    outcomes, slowest = collections.Counter(), 0.0
    for number in range(count):
        kind = build(random.Random(f"{seed} {number}"), path)
        signal.alarm(SECONDS)
        start = time.process_time()
        outcome, tensors = attempt(path)
        slowest = max(slowest, time.process_time() - start)
        signal.alarm(0)
        outcomes[f"{kind}: {outcome}"] += 1
        if kind == "header, safetensors":
            outcomes[f"safetensors: {compared(path, tensors)}"] += 1
    return outcomes, slowest


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", default="0")
    arguments = parser.parse_args()
    # The file of a process that ends without a word is kept too.
    path = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-built-"), "file")
    print(f"the file of a failure is {path}", flush=True)
    outcomes, slowest = fuzz(arguments.count, arguments.seed, path)
    path.unlink()
    path.parent.rmdir()
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:>8,}  {outcome}")
    print(f"{arguments.count:>8,}  files, the slowest {slowest:.2f} s")
    missing = KINDS - {outcome.split(": ")[0] for outcome in outcomes}
    if missing:
        sys.exit(f"error: never built: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
