"""Files made by hand to crash, to stall or to fill the memory: each ends in one short error, soon.

Deep structures end the process where C recurses on them, so another process reads them, under limits.
"""

import json
import struct
import sys

import pytest
from building import doubled, entry, integer, legacy_file, plain_file, safetensors, tensor, text, torch_file

from paddle_clip import CheckpointError
from paddle_clip.checkpoints import reading
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


DEEP = b")" + b"\x85" * 200_000  # a tuple in a tuple …
DEEP_LIST = b"]" * 100_000 + b"a" * 99_999
DEEP_DICT = b"}" + (b"q\0}" + text("a") + b"h\0s") * 30_000
DEEP_NODE = b")" + b"q\0ca\nB\nh\0\x85R" * 30_000
MEGABYTE = text("n" * 1_000_000)
# {name: the opcodes of the value that a file holds}
VALUES = {
    "deep_tuple": DEEP,
    "deep_list": DEEP_LIST,
    "deep_dict": DEEP_DICT,
    "deep_node": DEEP_NODE,
    "deep_key": b"}" + DEEP + b"Ns",
    "deep_persistent": b"(" + text("storage") + DEEP + b"NNNtQ",
    "deep_storage_key": tensor(key=DEEP),
    "deep_count": tensor(count=DEEP),
    "deep_shape": tensor(shape=DEEP),
    "deep_offset": tensor(offset=DEEP),
    "deep_global": DEEP + text("a") + b"\x93",
    "deep_arguments": b"cnumpy.core.multiarray\n_reconstruct\n"
    + DEEP
    + b"\x85R("
    + (DEEP + b"q\1")
    + b"h\1h\1h\1h\1tb",
    "deep_dtype": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n"
    + DEEP
    + b"\x85R(K\3"
    + DEEP
    + b"tb"
    + b"C\1a\x86R",
    "deep_set": b"\x8f(" + DEEP + b"\x90",
    "deep_frozenset": b"(" + DEEP + b"\x91",
    "deep_parameter": tensor() + b"q\0ctorch._utils\n_rebuild_parameter\nh\0\x85R" * 20_000,
    "deep_marks": b"(" * 100_000,
    "doubled_key": b"}" + doubled(b")") + b"Ns",
    "doubled_value": b"}" + text("a") + doubled(b")") + b"s",
    "doubled_dicts": b"}" + b"".join(b"q%c}(Kah%cKbh%cu" % (i, i, i) for i in range(40)),
    "doubled_nodes": b")" + b"".join(b"q%cca\nB\nh%ch%c\x86R" % (i, i, i) for i in range(40)),
    "doubled_tensors": doubled(b"}" + text("a") + tensor() + b"s"),
    "doubled_global": doubled(b")") + text("a") + b"\x93",
    "cycle": b"]q\0h\0a",
    "cycles": b"}q\0(" + b"".join(text(f"{i}") + b"h\0" for i in range(1000)) + b"u",
    "wide_list_often": b"](" + b"N" * 200_000 + b"eq\0}(" + b"".join(text(f"{i}") + b"h\0" for i in range(9000)) + b"u",
    "wide_module_often": b"](" + b"N" * 200_000 + b"eq\0}(" + text("t") + tensor() + text("l") + b"h\0uq\1"
    b"](" + b"h\1" * 30_000 + b"e",
    "colliding_keys": b"}(" + b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(60_000)) + b"u",
    "one_key_often": b"}q\0(" + MEGABYTE + b"q\1N" + b"h\1N" * 50_000 + b"u",
    "long_key": b"}" + MEGABYTE + tensor() + b"s",
    "long_global": MEGABYTE + b"q\0" + b"h\0h\0\x93" * 100_000,
    "long_names_of_globals": b"ca"
    + b"b" * 200
    + b"\nc\n"
    + b"q\0cbuiltins\ngetattr\nq\1"
    + text("d" * 200)
    + b"q\2"
    + b"h\1h\0h\2\x86R" * 20_000,
    "huge_number": integer(1 << 8_000_000),
    "huge_numbers": b"}(" + integer(1 << 80_000_00) + b"q\0N" + b"h\0N" * 30_000 + b"u",
    "huge_decimal": b"I" + b"9" * 2_000_000 + b"\n",
    "huge_count": tensor(count=integer(1 << 8_000_000)),
    "huge_shape": tensor(shape=(integer(1 << 800_000) + b"q\0" + b"h\0" * 2).join([b"(", b"t"])),
    "huge_shape_of_nothing": tensor(shape=b"(K\0" + integer(1 << 61) * 2 + b"t", strides=b"(K\0K\0K\0t"),
    "many_axes": tensor(shape=b"(" + b"K\1" * 100_000 + b"t"),
    "no_shape": tensor(shape=b"N"),
    "negative_stride": tensor(strides=integer(-1) + b"\x85"),
    "shared_storage": b"](" + tensor() + b"q\0" + b"h\0" * 40_000 + b"e",
    "too_many_tensors": b"](" + tensor(shape=b"K\0\x85") + b"q\0" + b"h\0" * 100_000 + b"e",
    "expanded": tensor(shape=integer(1 << 40) + b"\x85", strides=b"K\0\x85"),
    "nul": b"}" + text("a\0b") + tensor() + b"s",
    "surrogate": b"}" + text("a\ud800b") + tensor() + b"s",
    "escape": b"}" + text("a\x1b[2Jb") + tensor() + b"s",
    "nul_in_key": tensor(key=text("0\0")),
    "surrogate_in_key": tensor(key=text("\ud800")),
    "long_storage_key": tensor(key=MEGABYTE),
    "memo_far": b"p4294967297\n",
    "empty_stack": b"0" * 10,
    "module_of_itself": b"ca\nB\n)\x81q\0}("
    + text("_parameters")
    + b"}"
    + text("_modules")
    + b"}"
    + text("m")
    + b"h\0sub",
    "module_without_parts": b"ca\nB\n)\x81}(" + text("_parameters") + b"K\1" + text("_modules") + b"Nub",
}


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


HEADERS = {
    "many_huge_sizes": safetensors(b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 100) + b"]}}"),
    "many_sizes": safetensors({"a": entry([2**40] * 100_000)}),
    "huge_decimal": safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,4]}}'),
    "huge_fraction": safetensors(b'{"a":{"dtype":"F32","shape":[0.' + b"9" * 1_000_000 + b'],"data_offsets":[0,4]}}'),
    "deep": safetensors(b'{"a":' + b"[" * 1_000_000),
    "deep_offsets": safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":' + b"[" * 500 + b"]" * 500 + b"}}"),
    "deep_dtype": safetensors(b'{"a":{"shape":[1],"data_offsets":[0,4],"dtype":' + b"[" * 500 + b"]" * 500 + b"}}"),
    "metadata_is_a_list": safetensors({"__metadata__": [["activation", []]], "a": entry()}),
    "metadata_is_a_number": safetensors({"__metadata__": {"activation": 1}, "a": entry()}),
    "header_is_a_list": safetensors(b"[]   {}"),
    "nul": safetensors({"a\0b": entry()}),
    "surrogate": safetensors({"a\ud800b": entry()}),
    "escape": safetensors({"a\x1b[2Jb": entry()}),
    "long_name": safetensors({"n" * 1_000_000: entry(dtype="X9")}),
    "long_dtype": safetensors({"a": entry(dtype="X" * 1_000_000)}),
    "true_as_size": safetensors({"a": entry([True])}),
    "many_tensors": safetensors({f"{'n' * 100}{i}": entry([0], (0, 0)) for i in range(10_000)}),
    "no_positions": safetensors(
        {
            name: entry(shape, (0, 0))
            for name, shape in {
                "ln_final.weight": [0],
                "text_projection": [0, 0],
                "positional_embedding": [0, 0],
                "token_embedding.weight": [0, 0],
                "visual.proj": [0, 0],
                "visual.conv1.weight": [0, 3, 0, 0],
                "visual.positional_embedding": [0, 0],
            }.items()
        }
    ),
    "layer_9999": safetensors(
        {
            "ln_final.weight": entry([1]),
            "text_projection": entry([1, 1], (4, 8)),
            "positional_embedding": entry([1, 1], (8, 12)),
            "token_embedding.weight": entry([1, 1], (12, 16)),
            "visual.proj": entry([1, 1], (16, 20)),
            "visual.conv1.weight": entry([1, 1, 1, 1], (20, 24)),
            "visual.positional_embedding": entry([2, 1], (24, 32)),
            "transformer.resblocks.9999.ln_1.weight": entry([1], (32, 36)),
        },
        b"\0" * 36,
    ),
    "short": b"short",
    "length_alone": struct.pack("<Q", 2),
}


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


@pytest.mark.parametrize(("offsets", "content"), [((0, 4), b"\0" * 5), ((4, 8), b"\0" * 8), ((1, 5), b"\0" * 5)])
def test_bytes_of_no_tensor_are_refused(tmp_path, offsets, content):
    (tmp_path / "x").write_bytes(safetensors({"a": entry(offsets=offsets)}, content))
    with pytest.raises(CheckpointError, match=r"leaves a gap|bytes belong to no tensor"):
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


@pytest.mark.parametrize("size", [1000, 32_000])
def test_work_is_linear_in_the_size(tmp_path, size):
    """The number of steps, not the seconds, which other processes change."""
    plain_file(tmp_path / "x", b"}(" + b"".join(text(f"{index}") + b"](Ne" for index in range(size)) + b"u")
    steps = 0

    def count(frame, event, argument):
        nonlocal steps
        steps += event == "call"

    sys.setprofile(count)
    try:
        assert list(reading.read(tmp_path / "x")) == ["0"]
    finally:
        sys.setprofile(None)
    assert steps < 40 * (size + 1000)
