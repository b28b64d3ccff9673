"""Gives files made by hand to the command line: `python tests/tools/hostile.py`.

Each is made to crash, to stall or to fill the memory. The command that reads it has 4 GB and 20 seconds, and must end
with exit code 1 and one error line of at most 1,000 characters. Otherwise the script exits 1.
"""

import io
import json
import os
import pathlib
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib

from building import doubled, entry, integer, legacy_file, plain_file, safetensors, tensor, text, torch_file

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MEMORY = 4 << 30  # bytes of address space
SECONDS = 20
LONGEST = 1000  # characters of a line

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


def checkpoints(folder):
    """Files that no program writes, for `convert`."""
    for writer in (torch_file, legacy_file, plain_file):
        for name, opcodes in VALUES.items():
            writer(folder / f"{writer.__name__}_{name}", opcodes)
    for name, content in HEADERS.items():
        (folder / f"header_{name}").write_bytes(content)
    others = {
        "index_of_shorts": json.dumps({"weight_map": {"a": "header_short"}}),
        "index_with_nul": json.dumps({"weight_map": {"a": "\0"}}),
        "index_with_surrogate": json.dumps({"weight_map": {"a": "\ud800"}}),
        "index_of_itself": json.dumps({"weight_map": {"a": "index_of_itself"}}),
        "index_above": json.dumps({"weight_map": {"a": "../a"}}),
        "index_of_many": json.dumps({"weight_map": {str(number): f"s{number}" for number in range(100_000)}}),
        "index_deep": '{"weight_map":' + "[" * 1_000_000,
        "zeros": "\0" * 100_000,
        "nothing": "",
    }
    for name, content in others.items():
        (folder / name).write_text(content)
    with zipfile.ZipFile(folder / "zip_bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 28))
    with zipfile.ZipFile(folder / "zip_of_many", "w") as archive:
        for number in range(30_000):
            archive.writestr(f"x/data/{number}", b"")
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    return {path.name: ["convert", str(path), "--check"] for path in sorted(folder.iterdir())}


def arrays(folder):
    """Files of features, for `search`, and of a folder of parts, for `merge`."""
    header = "{'descr': %s, 'fortran_order': False, 'shape': %s, }"

    def npy(descr="'<f4'", shape="(2, 2)", content=bytes(16)):
        described = (header % (descr, shape)).encode() + b"\n"
        return b"\x93NUMPY\2\0" + struct.pack("<I", len(described)) + described + content

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy(shape="(30000, 30000)", content=bytes(1 << 28)))
    made = {
        "huge_shape": npy(shape="(2305843009213693952, 4)"),
        "negative_shape": npy(shape="(-1, -16)"),
        "many_axes": npy(shape=f"({'1, ' * 100_000})"),
        "deep_header": npy(shape="(" * 5000),
        "long_header": npy(shape="9" * 60_000),
        "objects": npy(descr="'|O'"),
        "no_numbers": npy(descr="'<U4'", shape="(1, 1)"),
        "huge_dtype": npy(descr="'<V2147483647'"),
        "call_in_header": npy(descr="__import__('os').abort()"),
        "expands": packed.getvalue(),
        "pickle": b"cos\nabort\n(tR.",
        "cut_off": npy()[:20],
    }
    for name, content in made.items():
        (folder / f"{name}.npy").write_bytes(content)
        (folder / f"{name}.json").write_text(json.dumps({"paths": ["a", "b"], "damaged": []}))
    beside = {
        "deep": '{"paths":' + "[" * 500_000,
        "wrong": '{"paths": {}, "damaged": 1}',
        "too_many": json.dumps({"paths": ["a"] * 100_000, "damaged": []}),
        "huge_number": '{"paths": [' + "9" * 1_000_000 + '], "damaged": []}',
    }
    for name, content in beside.items():
        (folder / f"paths_{name}.npy").write_bytes(npy())
        (folder / f"paths_{name}.json").write_text(content)
    (folder / "table.parquet").write_bytes(b"PAR1" + bytes(1000) + struct.pack("<I", 2**31 - 1) + b"PAR1")
    files = [*sorted(folder.glob("*.npy")), folder / "table.parquet"]
    return {file.name: ["search", str(file), "a", "--model", "tiny"] for file in files} | {
        "merged": ["merge", str(folder / "objects.npy"), "-o", str(folder / "merged.npy")]
    }


def exports(folder):
    """Folders of exports, for `classify`."""
    content = {f"{tower}{suffix}": b"{}" for tower in ("image", "text") for suffix in (".json", ".pdiparams")}
    sizes = {"image_resolution": 32, "context_length": 77, "embed_dim": 64, "vocab_size": 49408, "images_at_once": 8}
    described = {
        "format": "paddle_clip export",
        "version": 1,
        "paddle": "3.3.1",
        "dtype": "float32",
        "logit_scale": 4.6,
    }
    described |= {**sizes, "tokens_at_once": 640, "crc32": {name: zlib.crc32(of) for name, of in content.items()}}
    writes = {"#": "1.save_combine", "I": [], "O": [], "A": []}
    changes = {
        "sound_but_empty": {},
        "nan": {"logit_scale": float("nan")},
        "huge": {"image_resolution": 10**300},
        "deep": {"preprocessing": json.loads("[" * 900 + "]" * 900)},
        "no_files": {"crc32": {}},
        "files_elsewhere": {"crc32": {"../image.json": 1}},
        "negative": {"embed_dim": -1},
    }
    for name, change in changes.items():
        (folder / name).mkdir()
        for file, of in content.items():
            (folder / name / file).write_bytes(of)
        (folder / name / "config.json").write_text(json.dumps({**described, **change}))
    program = json.dumps({"program": {"regions": [{"blocks": [{"ops": [writes]}]}]}}).encode()
    for name, of in {"writes_files": program, "deep_program": b'{"program":' + b"[" * 1_000_000}.items():
        (folder / name).mkdir()
        for file in content:
            (folder / name / file).write_bytes(of)
        (folder / name / "config.json").write_text(
            json.dumps({**described, "crc32": {n: zlib.crc32(of) for n in content}})
        )
    return {
        path.name: ["classify", "@samples", "--labels", "a", "--model", str(path)] for path in sorted(folder.iterdir())
    }


def pictures_and_texts(folder):
    """Pictures that start other programs or expand, for `embed`, and endless texts, for `classify`."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def png(width, height, content):
        size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
        )

    pictures = {
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        "huge.png": png(2**31 - 1, 2**31 - 1, b""),
        "wide.png": png(2**30, 1, b""),
        "bomb.png": png(50_000, 50_000, bytes(1 << 24)),
        "cut_off.png": png(100, 100, b"")[:40],
        "nothing.jpg": b"",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    texts = {
        "letters": "a" * 250_000,
        "entities": "&amp;" + "amp;" * 60_000,
        "number": "&#" + "9" * 5000 + ";",
        "too_long": "a " * 200_000,
        "no_text": "\udc80",
    }
    calls = {name: ["embed", str(folder / name), "-o", str(folder / "x.npy"), "--model", "tiny"] for name in pictures}
    for name, content in texts.items():
        (folder / name).write_text(content, errors="surrogateescape")
        calls[name] = ["classify", "@samples", "--model", "tiny", "--labels-file", str(folder / name)]
    return calls


KINDS = (checkpoints, arrays, exports, pictures_and_texts)


def attempt(arguments):
    """Runs a command under the limits; returns what is wrong, or None, its line and its seconds."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "paddle_clip", *arguments],
            env={**os.environ, "PYTHONPATH": ROOT, "GLOG_minloglevel": "2"},
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=SECONDS,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS} s", "", SECONDS
    seconds, line = time.perf_counter() - start, done.stderr.removeprefix("error: ").rstrip("\n")
    if done.returncode != 1:
        return f"exit code {done.returncode}", line, seconds
    if not done.stderr.startswith("error: ") or "\n" in line or len(line) > LONGEST:
        return f"{len(line)} characters in {line.count(chr(10)) + 1} lines", line, seconds
    return None, line, seconds


def main():
    failed, seconds = 0, {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            for file, arguments in kind(pathlib.Path(name)).items():
                wrong, line, seconds[f"{kind.__name__}, {file}"] = attempt(arguments)
                failed += wrong is not None
                if wrong:
                    print(f"{kind.__name__}, {file}: {wrong}: {line[-300:]}", flush=True)
        print(f"{kind.__name__}: {sum(key.startswith(kind.__name__ + ',') for key in seconds)} files", flush=True)
    slowest = max(seconds, key=seconds.get)
    print(f"{len(seconds)} files, {failed} failures; the slowest {seconds[slowest]:.2f} s: {slowest}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
