"""Files made by hand to crash, to stall or to fill the memory: each ends in one short error, soon.

Deep structures end the process where C recurses on them, so another process reads them, under limits.
"""

import json
import sys

import pytest
from building import entry, legacy_file, plain_file, safetensors, text, torch_file

from hostile import HEADERS, VALUES
from paddle_clip import CheckpointError, tokenizer
from paddle_clip.checkpoints import reading
from paddle_clip.checkpoints.files import read_json
from paddle_clip.errors import LONGEST, listed

SECONDS = 5  # of the processor's time for a file; the slowest takes about one
# Reads the files named by its arguments and prints "name: message" for each, in a process that may take 1 GiB.
READER = f"""
import os, resource, signal, sys, time
from paddle_clip import CheckpointError
from paddle_clip.checkpoints.conversion import check
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for path in sys.argv[1:]:
    start = time.process_time()
    signal.alarm(100)
    try:
        check(path)
        message = "accepted"
    except CheckpointError as error:
        message = str(error)
    seconds = time.process_time() - start
    assert seconds < {SECONDS}, (path, seconds)
    print(f"{{os.path.basename(path)}}: {{message}}", flush=True)
"""


def read_under_limits(run, paths):
    """{name: message} of files that another process reads."""
    done = run("-W", "ignore", "-c", READER, *paths)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-1000:])
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("make", [torch_file, legacy_file, plain_file])
def test_made_pickles_are_refused(run, tmp_path, make):
    for name, opcodes in VALUES.items():
        make(tmp_path / name, opcodes)
    found = read_under_limits(run, [tmp_path / name for name in VALUES])
    assert found.keys() == VALUES.keys()
    for name, message in found.items():
        assert message != "accepted" and len(message) <= LONGEST and message.isprintable(), name


def test_made_headers_are_refused(run, tmp_path):
    for name, content in HEADERS.items():
        (tmp_path / name).write_bytes(content)
    found = read_under_limits(run, [tmp_path / name for name in HEADERS])
    assert found.keys() == HEADERS.keys()
    for name, message in found.items():
        assert message != "accepted" and len(message) <= LONGEST and message.isprintable(), name


@pytest.mark.parametrize("first", [ord("{"), 0x80, ord("P")])
def test_a_header_of_any_length_is_read(tmp_path, first):
    """The first byte of its length may be that of an index, a pickle or a zip."""
    header = json.dumps({"a": entry()}).encode()
    (tmp_path / "x").write_bytes(safetensors(header + b" " * (256 + first - len(header))))
    assert (tmp_path / "x").read_bytes()[0] == first
    assert list(reading.read(tmp_path / "x")) == ["a"]
    assert reading.shards(str(tmp_path / "x")) == [str(tmp_path / "x")]


TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)


@pytest.mark.parametrize(
    ("header", "content", "message"),
    [
        ({"a": entry()}, bytes(5), "bytes belong to no tensor"),
        ({"a": entry(offsets=(4, 8))}, bytes(8), "leaves a gap"),
        ({"a": entry(offsets=(1, 5))}, bytes(5), "leaves a gap"),
        ({"a": entry(), "b": entry()}, bytes(4), "overlaps another"),
        ({"a": entry(offsets=(0, 8))}, bytes(8), "out of bounds"),
        ({"a": entry(offsets=(4, 0))}, bytes(4), "out of bounds"),
        ({"a": entry([2**62, 4], (0, 0))}, b"", "impossible shape"),  # whose product is 0 in 64 bits
        (TWICE, bytes(4), "a name occurs twice"),
        (b"{" + b" " * (1 << 24) + b"}", b"", "header claims 16,777,218 bytes"),
    ],
)
def test_headers_that_the_format_forbids(tmp_path, header, content, message):
    """What safetensors promises of its files; see SECURITY.md."""
    (tmp_path / "x").write_bytes(safetensors(header, content))
    with pytest.raises(CheckpointError, match=message):
        reading.read(tmp_path / "x")


def test_a_short_shard_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"short")
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"a": "short"}}))
    with pytest.raises(CheckpointError, match="short is not a checkpoint"):
        reading.read(tmp_path / "x.index.json")


def test_lists_in_messages_are_short():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(number) for number in range(10, 30)]).endswith(" 20, 21 and 8 more")
    message = str(CheckpointError("start " + "\x1b\ud800x\n" * 100_000 + " the way out"))
    assert len(message) <= LONGEST and message.isprintable() and message.startswith("start")


def nested(count):
    return b"}(" + b"".join(text(f"{index}") + b"](Ne" for index in range(count)) + b"u"


def header(path, count):
    path.write_bytes(safetensors({f"{index}": entry([0], (0, 0)) for index in range(count)}, b""))


def configuration(path, count):
    path.write_text(json.dumps({f"{index}": [index, {}] for index in range(count)}))


def opcodes(writer):
    return lambda path, count: writer(path, nested(count))


def words(path, count):
    path.write_text("a cat " * count)


FORMATS = {
    "zip": (opcodes(torch_file), reading.read),
    "legacy": (opcodes(legacy_file), reading.read),
    "plain": (opcodes(plain_file), reading.read),
    "safetensors": (header, reading.read),
    "config": (configuration, lambda path: read_json(str(path))),
    "text": (words, lambda path: tokenizer.tokenize(path.read_text(), truncate=True)),
}


@pytest.mark.parametrize("form", FORMATS)
def test_work_is_linear_in_the_size(tmp_path, form):
    """The number of calls, of Python's functions and C's, not the seconds, which other processes change.

    `python tests/tools/sizes.py` prints seconds and memory.
    """
    make, read = FORMATS[form]

    def calls(count):
        steps = 0

        def step(frame, event, argument):
            nonlocal steps
            steps += event in ("call", "c_call")

        make(tmp_path / f"x{count}", count)
        sys.setprofile(step)
        try:
            read(tmp_path / f"x{count}")
        finally:
            sys.setprofile(None)
        return steps

    calls(10)  # what is done once
    assert calls(8000) < 9 * calls(1000) < 9 * 100_000
