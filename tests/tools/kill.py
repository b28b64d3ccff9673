"""Kills a command at random moments: `python tests/tools/kill.py --command embed [--count 100]`.

A moment lies between two changes of the folder that the command writes to, each of which is as likely as the others:
between the start and the first hidden file, or between two renames. After each kill, there must be no output, the one
from before, or the complete result. The next run goes on from what is there. Now and then, and at the end, one may
finish: it must succeed, make the same bytes as one that nobody disturbed, and leave nothing else. Otherwise the script
exits 1. `python tests/tools/kill.py RN50.pt` kills conversions of a file.
"""

import argparse
import collections
import contextlib
import hashlib
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time

from commands import COMMANDS, IMAGES, TINY, outcome, prepare, start
from paddle_clip.checkpoints.reading import read
from paddle_clip.checkpoints.writing import verify_checksums

FINISHED = 0.25  # share of the runs that may finish
LOOKS = 0.001  # seconds between two looks at the folder


def listing(folder):
    """The paths of all files and folders below a folder, which may change meanwhile."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [os.path.join(place, name) for name in folders + files]
    return sorted(found)


def changes(running, folder):
    """Yields when a process has started, and each time it changes what is in a folder, until it ends."""
    seen = listing(folder)
    yield
    while running.is_alive():
        now = listing(folder)
        if now != seen:
            seen = now
            yield
        time.sleep(LOOKS)


def finish(running, folder):
    """Waits for a process, which must succeed."""
    code, errors = outcome(running, folder)
    assert code == 0, f"it failed: {errors[-1000:]}"


def digest(path):
    """A digest of a file's bytes, or of all files in a folder."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found.update(f"{file.relative_to(path)} {file.stat().st_size} ".encode() + file.read_bytes())
    return found.hexdigest()


def results(folder):
    """{name: digest} of what is not hidden in a folder."""
    return {path.name: digest(path) for path in folder.iterdir() if not path.name.startswith(".")}


def put_something_else(folder):
    """Changes each result, so that one that stays can be told from a new one."""
    for path in folder.iterdir():
        with open(path / "added" if path.is_dir() else path, "ab") as file:
            file.write(b"from before")


def state(command, folder, before, complete):
    """What a killed run left, in a word; raises if it must not be."""
    found = results(folder)
    if found.pop(command.kept, None):
        path = str(folder / command.kept)
        assert verify_checksums(read(path), path) > 0, "a checkpoint without checksums"
    if found == complete:
        return "complete"
    if found == before:
        return "untouched" if before else "missing"
    for whole in (before, complete):
        if command.late in whole and found == {name: of for name, of in whole.items() if name != command.late}:
            old = folder / f".{command.late}.old"
            assert found or digest(old) == before[command.late], "what was there before is lost"
            return f"without {command.late}"
    raise AssertionError(f"a partial or wrong output has a final name: {found}, before {before}, expected {complete}")


def until_moment(running, folder, times, moments):
    """Waits until a random moment between two changes of a folder, or until the process ends."""
    phase = moments.randrange(len(times) - 1)
    with contextlib.closing(changes(running, folder)) as changed:
        for _ in zip(range(phase + 1), changed):
            pass
    running.join(moments.uniform(0, times[phase + 1] - times[phase]))


def stopped(running, number):
    """Sends a process a signal and waits for its end; returns False if it had ended before."""
    with contextlib.suppress(ProcessLookupError):  # it may end between the two lines
        if running.is_alive():
            os.kill(running.pid, number)
            running.join()
            return True
    return False


def begin_anew(folder, moments):
    """Empties a folder, or changes what is in it; returns what is there."""
    if moments.random() < 0.5:
        put_something_else(folder)
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    return results(folder)


def kill(command, count, seed, number, images, seconds):
    """Returns how often the output was missing, untouched and complete; raises if it ever was anything else."""
    outcomes, moments, end = collections.Counter(), random.Random(seed), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        out = folder / "out"
        prepare(folder, images)
        running = start(command, folder)
        times = [time.perf_counter() for _ in changes(running, out)] + [time.perf_counter()]
        finish(running, folder)
        complete = results(out)
        assert complete.keys() == set(command.outputs)
        before = begin_anew(out, moments)
        while outcomes.total() < count and time.monotonic() < end:
            running = start(command, folder)
            until_moment(running, out, times, moments)
            if stopped(running, number):
                left = state(command, out, before, complete)
                outcomes[left] += 1
                is_last = outcomes.total() == count or time.monotonic() > end
                if left != "complete" and moments.random() > FINISHED and not is_last:
                    continue
                running = start(command, folder)
            finish(running, folder)
            assert results(out) == complete, "the run that went on made something else"
            assert sorted(os.listdir(out)) == sorted(complete), f"left behind: {os.listdir(out)}"
            before = begin_anew(out, moments)
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", help="a checkpoint to convert")
    parser.add_argument("--command", choices=COMMANDS, default="convert", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="to stop earlier (default: no limit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=IMAGES, help="number of images (default: %(default)s)")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="default: %(default)s")
    arguments = parser.parse_args()
    command = COMMANDS[arguments.command]
    if arguments.file:
        command = command._replace(arguments=command.arguments.replace(TINY, os.path.abspath(arguments.file)))
    number = signal.Signals[f"SIG{arguments.signal}"]
    outcomes = kill(command, arguments.count, arguments.seed, number, arguments.images, arguments.seconds)
    print(f"{arguments.command} killed {outcomes.total()} times: ", end="")
    print(", ".join(f"{number} {name}" for name, number in sorted(outcomes.items())))


if __name__ == "__main__":
    main()
