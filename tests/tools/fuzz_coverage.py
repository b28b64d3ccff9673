"""Fuzzes a reader, guided by coverage: `python tests/tools/fuzz_coverage.py pickle [--seconds 60]`; takes atheris.

libFuzzer changes the files of tests/corpus/<reader>/, and changes those further that reach code no other has reached. A
file may be read, or refused with one short `CheckpointError`. Another error, more than ten seconds or too much memory
ends the run with exit code 77, 70 or 71; the file is then in the corpus, and the tests fail until it is read or
refused. `--keep FOLDER` keeps what reached new code, for the next run to go on from.
"""

import argparse
import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [ROOT, HERE]

import numpy as np
from building import entry, safetensors

CORPUS = pathlib.Path(ROOT, "tests", "corpus")
SECONDS = 10  # for one file
MEMORY = 2048  # MB, with Paddle
LONGEST_FILE = 4096  # bytes
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where files are in memory: five times as fast
# Words of the formats, which bytes drawn at random hardly make; libFuzzer finds others in what the code compares with.
WORDS = [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"\x8a\x08", b"}(", b"storage", b"cpu", b"ctorch\nFloatStorage\n"]
WORDS += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"cnumpy\ndtype\n"]
WORDS += [b"ccollections\nOrderedDict\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"_parameters", b"_modules"]
WORDS += [b'"dtype":', b'"shape":[', b'"data_offsets":[', b'"F32"', b'"weight_map":', b'"__metadata__":']
WORDS += [b"1e999", b"NaN", b"null", b"[[[[[[[[", b"99999999999999999999"]
FLOATS = np.arange(4, dtype=np.float32)


def checkpoint(folder, content):
    """A checkpoint of any form; `shard` is beside it."""
    path = folder / "file"
    path.write_bytes(content)
    reading().read(path)
    module("checkpoints.conversion").check(path)


def pickle(folder, content):
    """The pickle in a zip of PyTorch, whose checksums are right."""
    path = folder / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/data/0", FLOATS.tobytes())
    reading().read(path)
    module("checkpoints.conversion").check(path)


def features(folder, content):
    """A .npy with the paths of three images beside it."""
    path = folder / "x.npy"
    path.write_bytes(content)
    path.with_suffix(".json").write_text(json.dumps({"paths": ["a", "b", "c"], "damaged": []}))
    module("features").load_features(path)


def paths(folder, content):
    """The paths beside a .npy."""
    path = folder / "x.json"
    path.write_bytes(content)
    np.save(path.with_suffix(".npy"), FLOATS.reshape(2, 2))
    module("features").load_features(path.with_suffix(".npy"))


def journal(folder, content):
    """The journal of an interrupted `embed`."""
    module("features")._notes(content.split(b"\n")[:-1])


def probe(folder, content):
    """The .npz of a linear probe."""
    path = folder / "x.npz"
    path.write_bytes(content)
    module("probe").LinearProbe.load(path)


def description(folder, content):
    """The config.json of an export, whose files have five bytes each."""
    for name in ("image.json", "image.pdiparams", "text.json", "text.pdiparams"):
        (folder / name).write_bytes(b"bytes")
    (folder / "config.json").write_bytes(content)
    found = module("exported").read_description(str(folder))
    program = module("exported").Program([-1, 3, 224, 224], [-1, 512], [[77, 64]])
    module("exported").require_described(str(folder), "image", program, found)


def program(folder, content):
    """A program of an export."""
    path = folder / "image.json"
    path.write_bytes(content)
    module("exported").read_program(str(path))


READERS = {
    reader.__name__: reader for reader in (checkpoint, pickle, features, paths, journal, probe, description, program)
}


def module(name):
    return importlib.import_module(f"paddle_clip.{name}")


def reading():
    return module("checkpoints.reading")


def attempt(reader, folder, content):
    """Whether a file is read; raises an error that no file may cause.

    The folder is made anew, as mapped files must not shrink.
    """
    errors = module("errors")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "shard").write_bytes(safetensors({"a": entry()}))
    try:
        reader(folder, content)
    except errors.CheckpointError as error:
        message = str(error)
        assert len(message) <= errors.LONGEST and message.isprintable(), "the message is too long, or cannot be printed"
        return False
    except OSError as error:  # a shard that is missing, or cannot be there
        assert error.filename is not None and reader is checkpoint
        return False
    return True


def escaped(word):
    """Bytes as libFuzzer reads them in a dictionary."""
    return "".join(f"\\x{byte:02x}" for byte in word)


def fuzz(arguments, work):
    """Lets libFuzzer run, which ends the process; on its way out it writes the file that did harm."""
    import atheris

    reader = READERS[arguments.reader]
    found = pathlib.Path(arguments.keep or work / "found")
    found.mkdir(parents=True, exist_ok=True)
    (work / "words").write_text("".join(f'"{escaped(word)}"\n' for word in WORDS))
    options = {"artifact_prefix": f"{CORPUS / arguments.reader}/", "dict": work / "words", "seed": arguments.seed}
    options |= {"max_total_time": arguments.seconds, "runs": arguments.count, "max_len": LONGEST_FILE}
    options |= {"timeout": SECONDS, "rss_limit_mb": MEMORY, "print_final_stats": 1}
    command = [sys.argv[0], *(f"-{key}={value}" for key, value in options.items())]

    def read(content):
        attempt(reader, work / "read", content)

    with atheris.instrument_imports(include=["paddle_clip"]):
        for seed in (CORPUS / arguments.reader).iterdir():
            read(seed.read_bytes())
    atheris.Setup([*command, str(found), str(CORPUS / arguments.reader)], read)
    atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--count", type=int, default=-1, help="number of files (default: no limit)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", metavar="FOLDER")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        child = os.fork()
        if not child:
            fuzz(arguments, pathlib.Path(name))
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
