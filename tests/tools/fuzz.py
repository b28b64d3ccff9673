"""Mutates real checkpoints and converts them: `python tests/tools/fuzz.py [--count 100000] [--seed 0]`.

The checkpoints are small ones of make_files.py. Each is mutated at the level of bytes, of zip records, of pickle
opcodes or of the safetensors header, and converted in a worker process with bounded memory. A mutant may be refused
with `CheckpointError`, or converted, with a result that reads back. Anything else is a failure: another exception, more
than ten seconds, more memory than the bound, a file left behind, a command that ran. A worker stops at its first
failure and keeps that mutant; the exit code is then 1.
"""

import argparse
import collections
import io
import multiprocessing
import os
import pickletools
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)
warnings.simplefilter("ignore")

import numpy as np

from paddle_clip import CheckpointError, convert
from paddle_clip.checkpoints import reading

SECONDS = 10
# Where files are in memory, if there is such a folder: a conversion waits for a disk a third of its time.
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None
MEMORY = 1 << 30  # bytes of address space beyond what the worker has at its start; the files are under 10 MB
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1]
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
GLOBALS = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"cposix\nsystem\n", b"ctorch\nHalfStorage\n", b"cnumpy\nndarray\n"]


def mutate(content, source):
    """A mutant of a file's bytes, and the kind of mutation."""
    kinds = [bytes_level]
    if content[:2] == b"PK":
        kinds += [zip_records, zip_pickle, zip_pickle, zip_entries]
    elif content[8:9] == b"{":  # safetensors: the length before it may begin with a pickle's 0x80
        kinds += [header_level, header_level]
    else:
        kinds += [pickle_level, pickle_level]
    kind = source.choice(kinds)
    return kind(bytearray(content), source), kind.__name__


def number(source):
    """A number at a limit or near one, in 1, 2, 4 or 8 little-endian bytes."""
    size = source.choice([1, 2, 4, 8])
    value = (source.choice(INTERESTING) + source.randint(-2, 2)) % (1 << 8 * size)
    return value.to_bytes(size, "little")


def bytes_level(data, source):
    for _ in range(source.choice([1, 1, 2, 8, 64])):
        # Most changes are near the ends, where the structures are.
        edge = source.choice([len(data), 4096, 200])
        place = source.randrange(min(edge, len(data)))
        place = place if source.random() < 0.5 else len(data) - 1 - place
        action = source.randrange(6)
        if action == 0:
            data[place] ^= 1 << source.randrange(8)
        elif action == 1:
            new = number(source)
            data[place : place + len(new)] = new
        elif action == 2:
            del data[place : place + source.choice([1, 2, 16, 4096])]
        elif action == 3:
            data[place:place] = source.randbytes(source.choice([1, 2, 16, 300]))
        elif action == 4:
            length = source.choice([4, 64, 1000])
            other = source.randrange(len(data))
            data[place : place + length] = data[other : other + length]
        else:
            del data[place:]
        if not data:
            break
    return bytes(data)


def zip_records(data, source):
    """Changes a field of a local header, of the directory or of its end."""
    signature = source.choice([b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"])
    places, start = [], data.find(signature)
    while start >= 0:
        places.append(start)
        start = data.find(signature, start + 1)
    if not places:
        return bytes_level(data, source)
    for _ in range(source.choice([1, 1, 3])):
        place = source.choice(places) + source.randrange(4, 46)
        new = number(source)
        data[place : place + len(new)] = new
    return bytes(data)


def rebuild(data, change):
    """A zip after a change of its entries, a list of (name, content)."""
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in change(entries):
            archive.writestr(name, content)
    return target.getvalue()


def zip_pickle(data, source):
    """Changes the pickle; the rest is sound, checksums too."""

    def change(entries):
        return [(n, pickle_level(bytearray(c), source) if n.endswith("data.pkl") else c) for n, c in entries]

    return rebuild(data, change)


def zip_entries(data, source):
    """Drops, doubles, renames, resizes or swaps entries."""

    def change(entries):
        for _ in range(source.choice([1, 1, 4])):
            if len(entries) < 2:
                break
            index, other = source.randrange(len(entries)), source.randrange(len(entries))
            (name, content), action = entries[index], source.randrange(5)
            if action == 0:
                del entries[index]
            elif action == 1:
                entries.append((name, content))
            elif action == 2:
                entries[index] = (source.choice(["../../x", "/etc/x", "a/data.pkl", entries[other][0], "/"]), content)
            elif action == 3:
                entries[index] = (name, content[: source.randrange(len(content) + 1)] + b"\0" * source.choice([0, 8]))
            else:
                entries[index], entries[other] = (name, entries[other][1]), (entries[other][0], content)
        return entries

    return rebuild(data, change)


def pickle_level(data, source):
    """Changes, drops, doubles or inserts opcodes."""
    end = min(len(data), 200_000)
    try:
        places = [place for _, _, place in pickletools.genops(bytes(data[:end]))]
    except Exception:
        places = list(range(0, end, 7))
    places = places or [0]
    for _ in range(source.choice([1, 1, 2, 5])):
        place, other = source.choice(places), source.choice(places)
        action = source.randrange(6)
        if action == 0:
            data[place : place + 1] = source.choice(OPCODES)
        elif action == 1:
            data[place:place] = source.choice(OPCODES) + number(source)
        elif action == 2:
            data[place + 1 : place + 9] = number(source)
        elif action == 3:
            data[place:place] = source.choice(GLOBALS) + source.choice(
                [b"", b"X\x04\x00\x00\x00echo\x85R", b")R", b")\x81"]
            )
        elif action == 4:
            data[place:place] = data[min(place, other) : max(place, other)][:5000]
        else:
            del data[min(place, other) : min(max(place, other), min(place, other) + 200)]
    return bytes(data)


def header_level(data, source):
    """Changes the JSON header of a safetensors file, and keeps its length field right half of the time."""
    (size,) = struct.unpack("<Q", data[:8])
    text = bytes(data[8 : 8 + size])
    for _ in range(source.choice([1, 1, 3])):
        old = source.choice([b"[", b"]", b"F16", b"F32", b"shape", b"0", b"1", b",", b":", b"{", b"}", b'"', b"weight"])
        new = source.choice([b"", b"-1", b"1e400", b"null", b"[" * 5000, b"9" * 50, b"BF16", b"\xff", b"bias", b"I64"])
        place = text.find(old, source.randrange(len(text)))
        if place >= 0:
            text = text[:place] + new + text[place + len(old) :]
    size = len(text) if source.random() < 0.5 else size
    return struct.pack("<Q", size) + text + bytes(data[8 + struct.unpack("<Q", data[:8])[0] :])


def attempt(path, output, original):
    """Converts a mutant and returns the outcome; raises an error that no file may cause."""
    try:
        convert(path, output, "keep")
    except (CheckpointError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise AssertionError(f"unexpected {error!r}") from error
        outcome = "refused"
        if os.listdir(os.path.dirname(output)):
            raise AssertionError("a file was left behind") from error
    else:
        written = reading.read(output)
        same = written.keys() == original.keys() and all(
            np.array_equal(written[name].reshape(-1).view(np.uint8), array.reshape(-1).view(np.uint8))
            and written[name].shape == array.shape
            for name, array in original.items()
        )
        outcome = "converted, same values" if same else "converted, the mutant's values"
        if os.listdir(os.path.dirname(output)) != [os.path.basename(output)]:
            raise AssertionError("a file was left behind")
        os.unlink(output)
    if os.path.exists("executed"):
        raise AssertionError("a command ran")
    return outcome


def worker(files, seed, count, folder, results):
    """Fuzzes in this process and puts (outcomes, seconds of the slowest mutant, failure or None) into `results`."""
    os.makedirs(os.path.join(folder, "out"))
    os.chdir(folder)
    contents, originals = {}, {}
    for file in files:
        with open(file, "rb") as original:
            contents[file] = original.read()
        convert(file, os.path.join(folder, "original.pdparams"), "keep")
        read = reading.read(os.path.join(folder, "original.pdparams"))
        originals[file] = {name: np.array(array) for name, array in read.items()}
        del read
    os.unlink(os.path.join(folder, "original.pdparams"))
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} seconds")))
    outcomes, slowest, path = collections.Counter(), 0.0, os.path.join(folder, "mutant")
    for number in range(count):
        source = random.Random(f"{seed} {number}")
        file = source.choice(files)
        content, kind = mutate(contents[file], source)
        with open(path, "wb") as target:
            target.write(content)
        start = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            outcome = attempt(path, os.path.join(folder, "out", "x.pdparams"), originals[file])
        except BaseException as error:
            kept = tempfile.mkstemp(prefix="mutant-")[1]
            shutil.copy(path, kept)
            return results.put((outcomes, slowest, f"{kept}: {kind} of {file}, seed {seed} {number}: {error!r}"))
        signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - start)
        outcomes[f"{kind}: {outcome}"] += 1
    results.put((outcomes, slowest, None))


def fuzz(files, count, seed, processes=2):
    """Fuzzes in worker processes and returns the outcomes, the seconds of the slowest mutant, and the failures."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    outcomes, slowest, failures = collections.Counter(), 0.0, []
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        share = -(-count // processes)
        workers = [
            context.Process(
                target=worker, args=(files, f"{seed}-{index}", share, os.path.join(folder, str(index)), results)
            )
            for index in range(processes)
        ]
        for process in workers:
            process.start()
        for _ in workers:
            while results.empty() and any(process.is_alive() for process in workers):
                time.sleep(0.2)
            if results.empty():
                failures.append("a worker died")
                continue
            found, seconds, failure = results.get()
            outcomes += found
            slowest = max(slowest, seconds)
            failures += [failure] if failure else []
        for process in workers:
            process.join()
    return outcomes, slowest, failures


def corpus(folder):
    """The checkpoints of a folder that make_files.py wrote, and their conversions, as absolute paths."""
    names = ("tiny_vit.pt", "tiny_vit_state_dict.pt", "tiny_legacy.pt", "tiny_resnet.pt")
    files = [os.path.join(folder, name) for name in names]
    for extension in (".pdparams", ".safetensors"):
        files.append(os.path.join(folder, f"fuzz{extension}"))
        convert(files[1], files[-1], "keep")
    return [os.path.abspath(file) for file in files]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", default="0")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, os.path.join(HERE, "make_files.py"), folder], check=True)
        outcomes, slowest, failures = fuzz(corpus(folder), arguments.count, arguments.seed)
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:>8,}  {outcome}")
    seconds = time.perf_counter() - start
    total = sum(outcomes.values())
    print(f"{total:>8,}  mutants in {seconds:.0f} s, the slowest {slowest:.2f} s, {len(failures)} failures")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
